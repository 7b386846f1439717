"""Packs that grow within a stage: `data.progression` lists phases with shorter packs for its first steps.

A phase changes only budgets and frames. The order of the stream, the waiting examples and every count are unaffected,
so a run resumed in any phase equals the uninterrupted one, bit by bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from molmo2_nemo.data.config import DataConfig


def phases(config: DataConfig) -> list[DataConfig]:
    """The settings of each phase; the last is `config` itself without its progression."""
    found = []
    for phase in config.progression:
        packing = dataclasses.replace(
            config.packing, sequence_length=phase.sequence_length, max_crops=phase.max_crops or config.packing.max_crops
        )
        video = dataclasses.replace(config.video, max_frames=phase.max_frames or config.video.max_frames)
        found.append(dataclasses.replace(config, packing=packing, video=video, progression=[]))
    return [*found, dataclasses.replace(config, progression=[])]


def phase_at(config: DataConfig, step: int) -> int:
    """Number of the phase that optimizer step `step` (from 0) belongs to."""
    return sum(step >= phase.until_step for phase in config.progression)


def rope_factor_at(config: DataConfig, step: int) -> float | None:
    """Rotary factor of optimizer step `step` (from 0), where the progression has one; None: the model's."""
    phase = phase_at(config, step)
    return config.progression[phase].rope_factor if phase < len(config.progression) else None


def phase_problems(config: DataConfig) -> Iterator[str]:
    """What is wrong with a progression, in words; steps and sizes may only grow."""
    made = phases(config)
    before = 0
    for i, phase in enumerate(config.progression):
        if phase.until_step <= before:
            yield f"data.progression[{i}].until_step={phase.until_step}: must be more than {before}, where it begins"
        before = phase.until_step
        pairs = (
            ("sequence_length", made[i].packing.sequence_length, made[i + 1].packing.sequence_length),
            ("max_crops", made[i].packing.max_crops, made[i + 1].packing.max_crops),
            ("max_frames", made[i].video.max_frames, made[i + 1].video.max_frames),
        )
        for name, now, later in pairs:
            if not 1 <= now <= later:
                yield (
                    f"data.progression[{i}].{name}={now}: must be at least 1 and at most {later}, the value after it, "
                    "because waiting examples must fit into later packs"
                )
