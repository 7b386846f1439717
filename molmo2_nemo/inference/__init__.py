"""Answers of a trained model, from a checkpoint."""
