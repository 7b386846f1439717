"""Scoring answers: scorers compare an answer with its references. No torch."""
