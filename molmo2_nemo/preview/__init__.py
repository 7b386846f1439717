"""Renders what the model really sees (crops, frames, tokens, trees, masks) and how a run went, as HTML."""
