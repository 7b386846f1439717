"""Hydra's own settings (`hydra.*`): this project composes with Hydra and starts runs itself, so each is answered with
the setting or option that does here what it does there."""

from __future__ import annotations

KINDS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")  # of --info (hydra_view.py)

# Beginning of the key -> what to write instead; {value} is what was asked for.
INSTEAD = {
    "hydra.run.dir": "a run's folder is output_dir={value}; Hydra makes none beside it",
    "hydra.sweep.dir": "a sweep's folder is output_dir={value}; its jobs get the folders 0, 1, 2 in it",
    "hydra.sweep.subdir": "jobs of a sweep get the folders 0, 1, 2 in output_dir, and multirun.json says what each is",
    "hydra.launcher": "cluster=slurm with --multirun submits each job to Slurm; without it they run one after another",
    "hydra.sweeper": "with --multirun key=a,b, choice(...), range(...) and glob(...) on the command line are swept",
    "hydra.searchpath": "--config-dir DIR adds a folder of your own files",
    "hydra.job.chdir": "the working folder stays where the command was called",
    "hydra.job.name": "a run is known by output_dir and by the stage's name",
    "hydra.job.env_set": "set variables before the command, or for Slurm's jobs with cluster.slurm.env.NAME=VALUE",
    "hydra.verbose": "MOLMO2_VERBOSE=1 shows what libraries log",
    "hydra.job_logging": "MOLMO2_VERBOSE=1 shows what libraries log",
    "hydra.hydra_logging": "MOLMO2_VERBOSE=1 shows what libraries log",
    "hydra.callbacks": "what happens in a run is set with log.*, validation.* and evaluation.*",
}


def of_hydra(key: str, value: str | None) -> str:
    """The error for a setting of Hydra's own.

    Args:
        key: dotted, or a group of Hydra's with slashes.
        value: as it was given.
    """
    dotted = key.replace("/", ".").partition("@")[0]
    said = next((text for start, text in INSTEAD.items() if f"{dotted}.".startswith(f"{start}.")), None)
    if said is None:
        said = "runs are started by this command and not by Hydra; --cfg hydra prints what Hydra itself composes"
    return f"{key} has no effect here: {said.format(value=value or '...')}"
