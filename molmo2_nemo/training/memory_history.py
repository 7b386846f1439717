"""What the CUDA allocator knows when memory runs out, and after profiled steps: a snapshot for PyTorch's viewer, and
the figures that the report draws (memory_timeline.py).

Where memory runs out a snapshot is written at once, while all is still allocated. With `log.record_memory_history` the
allocator keeps its last EVENTS allocations and frees with their Python stacks, as Megatron's setting of that name does.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from molmo2_nemo.errors import file_error
from molmo2_nemo.files import atomic, write_json
from molmo2_nemo.rundir.paths import MEMORY
from molmo2_nemo.training.memory_timeline import place, timeline

EVENTS = 100_000  # some steps of the long stage; at a few KB each, with their stacks


class MemoryHistory:
    """Writes snapshots of this process's GPU to a stage's `memory/`.

    Attributes:
        ran_out: the figures' file of the last allocation that found no room in this process, if there was one.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.rank, self.records = 0, False
        self.ran_out: Path | None = None
        self._watched = False

    @contextmanager
    def watching(self, stage_folder: Path, rank: int, *, record: bool) -> Iterator[None]:
        """Write where memory runs out and, with `record`, keep the history. Before the model is built, so that its
        stacks are in it. Without a GPU, or with another allocator than PyTorch's own, nothing happens, which rank 0
        says if `record` was asked for."""
        lacks = _lacks()
        if lacks is not None:
            if record and rank == 0:
                print(f"log.record_memory_history: {lacks}; none is recorded here", flush=True)
            yield
            return
        self.folder, self.rank, self.records, self.ran_out = stage_folder / MEMORY, rank, record, None
        torch.cuda.init()  # before it there are no allocators to tell
        if self.records:
            torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=EVENTS)
        if not self._watched:
            torch._C._cuda_attach_out_of_memory_observer(self._out_of_memory)  # type: ignore[attr-defined]
            self._watched = True
        try:
            yield
        finally:
            if self.records:
                torch.cuda.memory._record_memory_history(enabled=None)
            self.folder, self.records = None, False

    def after(self, steps: str) -> str | None:
        """Write what is recorded; what to print, None where nothing is.

        Args:
            steps: the files' name, as `steps-3-5`.
        """
        if not self.records or self.folder is None:
            return None
        written = self._write(self.folder / f"{steps}.rank-{self.rank}", torch.cuda.current_device())
        return f"memory: {written.with_suffix('.pickle')}, for https://pytorch.org/memory_viz; molmo2 report draws it"

    def _out_of_memory(self, device: int, wanted: int, limit: int, free: int) -> None:
        """PyTorch calls this before it raises. It must not fail: the error that follows is the one to see."""
        if self.folder is None:
            return
        try:
            stack = [{"filename": f.filename, "name": f.name} for f in reversed(traceback.extract_stack())]
            failed = {"wanted": wanted, "free": free, "place": place(stack[1:])}
            self.ran_out = self._write(self.folder / f"out-of-memory.rank-{self.rank}", device, failed)
        except Exception as error:  # noqa: BLE001
            why = file_error(error) if isinstance(error, OSError) else repr(error)
            print(f"rank {self.rank} cannot write a snapshot of its memory: {why}", flush=True)

    def _write(self, path: Path, device: int, failed: dict[str, Any] | None = None) -> Path:
        snapshot: dict[str, Any] = torch.cuda.memory._snapshot()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path.with_name(f"{path.name}.pickle")) as part, open(part, "wb") as file:
            pickle.dump(snapshot, file)
        figures = timeline(snapshot, device) | {
            "rank": self.rank,
            "whole": len(snapshot["device_traces"][device]) < EVENTS,
            "failed": failed,
        }
        target = path.with_name(f"{path.name}.json")
        write_json(target, figures, indent=None)
        return target


def _lacks() -> str | None:
    """Why nobody can be asked here; None where PyTorch's own allocator can: others (`backend:cudaMallocAsync` of
    PYTORCH_CUDA_ALLOC_CONF, or one that is plugged in) refuse."""
    if not torch.cuda.is_available():
        return "only a GPU's allocator keeps one"
    used = torch.cuda.get_allocator_backend()
    return None if used == "native" else f"the allocator {used} keeps none, only PyTorch's own does"


history = MemoryHistory()  # of this process, whose GPU is one
