"""How processes start and end: here, through torch's elastic launcher, as Slurm jobs."""
