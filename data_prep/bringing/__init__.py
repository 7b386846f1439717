"""From the name of a published data set to its media on disk: what is needed, and bringing what may be fetched.

`catalogue.yaml` says for every set what must be brought, from where, to which folder below --source, and how.
"""
