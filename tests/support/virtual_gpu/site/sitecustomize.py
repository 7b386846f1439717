"""Imported by every Python process that is started with this folder on PYTHONPATH: prepares it for the virtual GPU."""

from tests.support.virtual_gpu import process

process.prepare()
