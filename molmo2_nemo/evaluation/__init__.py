"""How good answers are: scorers compare an answer with its references. No torch."""
