"""Entries written beside training: by a thread, from bounded memory."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from molmo2_nemo.features.store import FeatureStore

ROOM = 256 * 2**20  # bytes that may wait to be written; what finds no room is not kept this time


class Writer:
    """Writes to a store in the order in which entries come.

    Args:
        wrote: called in the thread for every crop, with the bytes that it took: 0 where it was not written.
    """

    def __init__(self, store: FeatureStore, wrote: Callable[[int], None]) -> None:
        self.store, self.wrote = store, wrote
        self._waiting: queue.SimpleQueue[tuple[list[bytes], Tensor, Any] | None] = queue.SimpleQueue()
        self._bytes, self._lock = 0, threading.Lock()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def put(self, keys: list[bytes], features: Tensor) -> int:
        """Have features of as many crops written, [c, P, F]; crops for which there was no room. Waits for no disk and
        no device."""
        if self._error is not None:
            raise self._error
        if self.store.stopped is not None:
            return len(keys)
        fit = max(0, (ROOM - self._bytes) // self.store.size)
        if kept := keys[:fit]:
            rows, copied = features[: len(kept)].detach(), None
            if rows.device.type == "cuda":
                rows = rows.to("cpu", non_blocking=True)  # to pinned memory
                copied = torch.cuda.Event()
                copied.record()
            with self._lock:
                self._bytes += len(kept) * self.store.size
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="features", daemon=True)
                self._thread.start()
            self._waiting.put((kept, rows, copied))
        return len(keys) - len(kept)

    def close(self) -> None:
        """What waits is written."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join(timeout=60)
            self._thread = None

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            keys, rows, copied = item
            try:
                if copied is not None:
                    copied.synchronize()
                for key, row in zip(keys, rows, strict=True):
                    self.wrote(self.store.write(key, bytes_of(row)))
            except Exception as error:  # noqa: BLE001 - raised where training next has something written
                self._error = error
            with self._lock:
                self._bytes -= len(keys) * self.store.size


def bytes_of(features: Tensor) -> Any:
    """The memory of a host tensor as uint8 array, without a copy where it has no gaps."""
    return features.contiguous().view(-1).view(torch.uint8).numpy()
