"""What lies where in a run's folder, `output_dir`: a folder per stage, and `slurm/` for the stages' jobs."""

from __future__ import annotations

from pathlib import Path

from molmo2_nemo.settings.ranges import SLURM
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
MERGED = "merged"  # copies of checkpoints with adapters, merged for the stage that starts from them (launch/start.py)
TENSORBOARD = "tb"
MLFLOW = "mlruns"
LOGS = "logs"  # NeMo's own
EVALUATIONS = "evaluation.jsonl"
EVALUATION = "evaluation"  # <name of a checkpoint>/<task>.json and .jsonl, of molmo2 evaluate or evaluation.*
HANG = "hang"  # <attempt>/rank<N>.txt: stacks of a run that hung (training/watchdog.py)
MEMORY = "memory"  # steps-N-M.rank-R, out-of-memory.rank-R, .pickle and .json (log.record_memory_history)
PROFILE = "profile"  # steps-N-M.trace.json.gz and .txt (log.profile)

# In the run's folder, beside the stages, lies SLURM; settings/ranges.py keeps a stage from having this name. In slurm/:
JOBS = "jobs.json"
ATTEMPTS = "attempt-"  # <stage>/attempt-<job>-<restart>/
OUTCOME = "outcome"  # in an attempt: how it ended, as the first task to end reported (launch/reports.py)
VERDICT = "verdict"  # in an attempt: how it failed, as the job's script found out (verdicts.py)
# In the folder of a sweep, whose jobs' folders are numbers (launch/multirun.py)
MULTIRUN = "multirun.json"
# Beside the stages, too: a copy of each file of wordings that a stage was trained with, by its fingerprint.
TEMPLATES = "templates-"  # templates-<12 digits of the fingerprint>.json


def stage_dir(cfg: RunConfig) -> Path:
    """The folder of the stage that `cfg` describes."""
    return Path(cfg.output_dir) / cfg.stage.name


def slurm_dir(cfg: RunConfig) -> Path:
    """Where the run's jobs have their scripts, logs and records."""
    return Path(cfg.output_dir) / SLURM


def templates_copy(run: Path, sha256: str) -> Path:
    """Where a run's folder has its copy of the wordings with this fingerprint."""
    return run / f"{TEMPLATES}{sha256[:12]}.json"
