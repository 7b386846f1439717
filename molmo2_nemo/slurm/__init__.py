"""Stages as Slurm jobs: settings, the login node, the job script, and what has been submitted. Imports no torch."""
