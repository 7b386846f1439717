"""Shards on an object store: any address that fsspec opens (s3://, gs://, https://, ...). docs/object_stores.md."""
