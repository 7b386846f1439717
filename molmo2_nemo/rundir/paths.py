"""What lies where in a run's folder, `output_dir`: a folder per stage, and `slurm/` for the stages' jobs."""

from __future__ import annotations

from pathlib import Path

from molmo2_nemo.settings.run import RunConfig

# In a stage's folder. docs/running.md says what each is.
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
FAULTS = "faults.jsonl"
ERRORS = "errors.jsonl"
ATTEMPT = "attempt.json"
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"  # step=N/, each with a manifest (checkpoint_manifest.py)
TENSORBOARD = "tb"
LOGS = "logs"  # NeMo's own

# In the run's folder, beside the stages; settings/ranges.py keeps a stage from having this name.
SLURM = "slurm"
JOBS = "jobs.json"  # in slurm/


def stage_dir(cfg: RunConfig) -> Path:
    """The folder of the stage that `cfg` describes."""
    return Path(cfg.output_dir) / cfg.stage.name


def slurm_dir(cfg: RunConfig) -> Path:
    """Where the run's jobs have their scripts, logs and records."""
    return Path(cfg.output_dir) / SLURM
