"""Host arrays to a device without the host waiting for it: from pinned memory, asynchronous, on a side stream where
one is wanted.

A copy from pageable memory makes the host wait until the device has come to it. What is copied on a side stream is
used on another one: `Copies` keeps the event that the other has to wait for, and the tensors whose memory must not be
given away before that stream is done with them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

_made_here = threading.local()  # .tensors: where this thread notes what it copies, inside `Copies.begun`


def to_device(array: np.ndarray | Tensor, device: torch.device | str | int) -> Tensor:
    """The array on the device; on CPU the same memory. The device waits for the copy, the host does not."""
    tensor = torch.as_tensor(array)
    if torch.device(device).type == "cuda":
        # The allocator of pinned memory keeps it until the copy is done. What has gaps would be copied through pageable
        # memory.
        tensor = tensor.contiguous().pin_memory()
    moved = tensor.to(device, non_blocking=True)
    tensors = getattr(_made_here, "tensors", None)
    if tensors is not None:
        tensors.append(moved)
    return moved


@dataclass
class Copies:
    """What was copied to a device on a side stream, for the stream that uses it.

    Args:
        stream: the side stream; None: copies were made on the stream that uses them, or there is no device.
    """

    stream: Any = None
    tensors: list[Tensor] = field(default_factory=list)
    done: Any = None  # event of the side stream after the last copy

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """Inside the block everything that `to_device` copies in this thread goes through the side stream."""
        if self.stream is None:
            yield
            return
        _made_here.tensors = self.tensors
        try:
            with torch.cuda.stream(self.stream):
                yield
                self.done = torch.cuda.Event()
                self.done.record(self.stream)
        finally:
            _made_here.tensors = None

    def use(self) -> None:
        """The current stream uses the copies from here on. The device waits for them, the host does not."""
        if self.stream is None:
            return
        current = torch.cuda.current_stream(self.stream.device)
        current.wait_event(self.done)
        for tensor in self.tensors:
            tensor.record_stream(current)  # freed earlier, its memory would be the side stream's again at once
        self.tensors = []
