"""From `conf/` and overrides to a typed RunConfig: Hydra composes plain values, the dataclasses are the schema."""
