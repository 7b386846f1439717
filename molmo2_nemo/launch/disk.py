"""Whether the file system of a run's folder has room for its checkpoints: found before anything is loaded."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

from molmo2_nemo.cost.parameters import held
from molmo2_nemo.errors import plural, sized
from molmo2_nemo.launch.capacity import ANYWAY
from molmo2_nemo.model.config import PRESETS
from molmo2_nemo.plan.words import model_of
from molmo2_nemo.rundir import checkpoint_manifest
from molmo2_nemo.rundir.paths import CHECKPOINTS, stage_dir
from molmo2_nemo.settings.run import RunConfig


def disk_problems(cfg: RunConfig, free: float | None = None) -> Iterator[str]:
    """That the checkpoints which will lie there at a time take more than is free, in one sentence; nothing where they
    fit.

    Args:
        free: bytes, for tests; None: of the file system of `output_dir`.
    """
    if not cfg.cluster.check_memory or cfg.model.preset not in PRESETS or cfg.save_every < 1:
        return
    place = stage_dir(cfg)
    there = checkpoint_manifest.finished(place / CHECKPOINTS)
    count = to_come(cfg, [checkpoint_manifest.step_of(path) for path in there])
    if free is None:
        free = free_bytes(place)
    each = checkpoint_bytes(cfg)
    if count * each <= free:
        return
    beside = f" beside the {len(there)} that are there" if there else ""
    fewer = "" if cfg.checkpoint.keep_last <= 1 and cfg.checkpoint.keep_every is None else (
        ", or keep fewer (checkpoint.keep_last=1, checkpoint.keep_every=null)"
    )  # fmt: skip
    yield (
        f"output_dir={cfg.output_dir}: {plural(count, 'checkpoint')} of {sized(each)} will lie there at a time"
        f"{beside}, {sized(free)} are free on that file system. Make room, name another{fewer}; {ANYWAY}"
    )


def to_come(cfg: RunConfig, there: list[int]) -> int:
    """How many checkpoints are written, at most, before one that is no longer kept goes: a new one is whole before an
    older is removed.

    Args:
        there: the steps of those that exist.
    """
    first = (max(there, default=0) // cfg.save_every + 1) * cfg.save_every
    saves = range(first, cfg.stage.max_steps, cfg.save_every)
    count = len(saves) + (cfg.stage.max_steps > max(there, default=0))
    if not count:
        return 0
    newest = max(1, cfg.checkpoint.keep_last) + 1  # with the one that is being written; of the rest some are kept
    rest = len(there) + count - newest
    kept = 0
    if (every := cfg.checkpoint.keep_every) and rest > 0:
        later, both = saves[: max(0, rest - len(there))], math.lcm(every, cfg.save_every)
        kept = sum(step % every == 0 for step in sorted(there)[:rest])
        kept += len(range(0, later.stop, both)) - len(range(0, later.start, both))
    return max(1, kept + min(newest, len(there) + count) - len(there))


def checkpoint_bytes(cfg: RunConfig) -> float:
    """Bytes of a whole checkpoint in any layout: the weights, and of what is trained master weights and two moments in
    fp32. Without the tables' padding and the files' heads, which are small."""
    mine = held(model_of(cfg), cfg.stage, 1, 1)
    return (4.0 if cfg.cluster.precision == "fp32" else 2.0) * mine.all + 12.0 * mine.trained


def free_bytes(folder: Path) -> float:
    """Bytes that a user may still write on the file system of a folder, or of where it will be made; infinite where it
    is none of files (/proc), as writing says what is wrong then."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    found = shutil.disk_usage(folder)
    return float(found.free) if found.total else float("inf")
