"""Draws what the model really sees: crops, frames, tokens, trees and masks, as one HTML page and PNGs."""
