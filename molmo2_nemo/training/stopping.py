"""All ranks leave together when any of them was sent a signal; signals.py has the whole story."""

from __future__ import annotations

import torch.distributed as dist

from molmo2_nemo.errors import Preempted
from molmo2_nemo.training import signals
from molmo2_nemo.training.faults import agreed


class StopTogether:
    """Asks all ranks whether any was sent SIGTERM or SIGUSR1. `stopped` then names the signal, on every rank."""

    def __init__(self) -> None:
        self.stopped: str | None = None

    def start(self) -> None:
        """Called before the first step, after the host has put its own signal handlers in place.

        Raises:
            Preempted: there was one already.
        """
        signals.catch()
        if self._asked()[0]:
            raise Preempted(f"{self.stopped} came before the first step; nothing was trained")

    def leaves(self, step: int, wish: bool = False) -> tuple[bool, bool]:
        """Whether the run is to end after this step, and whether any rank has the `wish`. A collective of all ranks,
        after every step; whoever keeps training waiting between two steps asks now and then (validation.py)."""
        before = self.stopped
        asked, wished = self._asked(wish)
        if asked and before is None and dist.get_rank() == 0:
            print(f"{self.stopped}: saving step {step}, then leaving", flush=True)
        return asked, wished

    def _asked(self, wish: bool = False) -> tuple[bool, bool]:
        number, wished = agreed([float(signals.received() or 0), float(wish)])
        self.stopped = signals.name(int(number)) if number else None
        return number != 0, wished != 0
