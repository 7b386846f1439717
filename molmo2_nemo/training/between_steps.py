"""What work between two steps shares: how it leaves for a signal, and what a resumed run has still to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from molmo2_nemo.rundir.lines import cut_lines, has_step
from molmo2_nemo.training.faults import agreed

# Whether the run is to end here, and whether any rank has the wish that is passed; see stopping.py.
Leaves = Callable[[bool], tuple[bool, bool]]


def left_to_do(path: Path, step: int) -> bool:
    """Whether a run that goes on after `step` has no line of it yet; lines of later steps are dropped. A collective of
    all ranks.

    Args:
        path: of the JSON lines that the work writes.
    """
    missing = False
    if dist.get_rank() == 0:
        cut_lines(path, step)
        missing = not has_step(path, step)
    return bool(agreed([float(missing)])[0])


def say_left(what: str) -> None:
    """What rank 0 says of work that ends for a signal."""
    if dist.get_rank() == 0:
        print(f"{what}: left at a signal; the same command begins it again", flush=True)
