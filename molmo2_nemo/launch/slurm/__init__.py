"""Stages as Slurm jobs: the login node, the sbatch script, what is submitted already."""
