"""The contract of a run's folder: what lies where (paths.py), how it is written and read. No torch here."""
