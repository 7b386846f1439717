"""Through these, evaluation frameworks of others ask an exported model. They need transformers 5, not NeMo."""
