"""Prompt files, and scorers, which compare an answer with its references. No torch."""
