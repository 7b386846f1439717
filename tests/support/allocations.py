"""What tensors a computation makes: bytes alive at its peak, and the largest tensor, on any device.

Counted at the dispatcher by the storage of every tensor that an operation returns, so the numbers are exact, the same
on every run, and free of what allocators keep. Memory inside a kernel that is given back before it returns is not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Allocations(TorchDispatchMode):
    """Use as a context. Tensors made before it do not count.

    Attributes:
        alive: bytes of storages made inside that still live.
        peak: most bytes alive at once.
        largest: (elements, operation) of the largest tensor; expanded views count their storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.largest: tuple[int, str] = (0, "")
        self._known: set[int] = set()
        self._elsewhere = False

    def __enter__(self) -> Allocations:
        super().__enter__()
        return self

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What is made inside does not count: buffers that on a GPU would be host memory."""
        self._elsewhere = True
        try:
            yield
        finally:
            self._elsewhere = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and not self._elsewhere:
                self._count(tensor, before, str(func))
        return result

    def _count(self, tensor: torch.Tensor, before: set[int], name: str) -> None:
        storage = tensor.untyped_storage()
        identity, size = storage._cdata, storage.nbytes()
        if identity in before or identity in self._known:
            return
        self._known.add(identity)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        self.largest = max(self.largest, (size // tensor.element_size(), name))
        weakref.finalize(storage, self._release, identity, size)

    def _release(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.alive -= size
