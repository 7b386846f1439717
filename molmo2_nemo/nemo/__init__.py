"""The host: NeMo 2.7 on Lightning. Classes that these call, and that call training/."""
