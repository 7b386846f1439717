"""Adapters through which other people's evaluation frameworks ask an exported model. They need transformers 5, not NeMo."""
