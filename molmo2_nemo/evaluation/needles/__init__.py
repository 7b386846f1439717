"""Needles: a picture, or a sentence, at a known depth of a long film, and questions that only it answers."""
