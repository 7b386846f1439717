"""Micro-batches made ready one ahead of training: a thread reads the loader, plans on the host and copies to the
device, while the device computes the micro-batch before.

Nothing else changes: micro-batches come in the loader's order, each with the loader's state after it, which counts only
once training takes it. One that was made ready and not taken is read again after a resume. The end of the data and
errors of the loader come where training would have met them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Made = TypeVar("Made")
Batch = TypeVar("Batch")


class Ahead(Generic[Batch, Made]):
    """Iterable over what `make` makes of the source's micro-batches, one of them ready before it is asked for.

    Args:
        source: iterated once, by the thread; its first micro-batch is taken by whoever iterates first (processes that
            decode must not be forked off beside a thread).
        make: called in the thread.
        most: micro-batches that training will take: none is read beyond them. None: not known.
    """

    def __init__(self, source: Iterable[Batch], make: Callable[[Batch], Made], most: int | None = None) -> None:
        self.source, self.make, self.most = source, make, most
        self._ready: queue.SimpleQueue[Made | BaseException] = queue.SimpleQueue()
        self._next: Made | BaseException | None = None  # looked at, not yet handed out
        self._permits = threading.Semaphore(1)  # micro-batches that may be made; one more for each that is taken
        self._closed = False
        self._thread: threading.Thread | None = None
        self._made: Iterator[Made] = iter(())

    def __iter__(self) -> Iterator[Made]:
        """One iteration, however often it is asked for (Lightning asks several times before the first micro-batch)."""
        if self._thread is None:
            batches = iter(self.source)
            first: Batch | BaseException
            try:
                first = next(batches)
            except Exception as error:  # noqa: BLE001 - raised where training takes the first micro-batch
                first = error
            self._thread = threading.Thread(target=self._run, args=(batches, first), name="ahead", daemon=True)
            self._thread.start()
            self._made = self._hand_out()
        return self._made

    def look(self) -> Made | None:
        """What comes next, without taking it; None at the end of the data or before an error."""
        iter(self)
        if self._next is None:
            self._next = self._ready.get()
        return None if isinstance(self._next, BaseException) else self._next

    def close(self) -> None:
        """Let the thread end; it may be reading, so it is not waited for long."""
        self._closed = True
        self._permits.release()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10)

    def _hand_out(self) -> Iterator[Made]:
        try:
            while True:
                self.look()
                made = self._next
                if isinstance(made, StopIteration):
                    return
                if isinstance(made, BaseException):
                    raise made
                self._next = None  # an end or an error stays, for whoever looks again
                self._permits.release()
                assert made is not None
                yield made
        finally:
            self.close()

    def _run(self, batches: Iterator[Batch], first: Batch | BaseException) -> None:
        number = 0
        try:
            while self.most is None or number < self.most:
                self._permits.acquire()
                if self._closed:
                    break
                if number == 0 and isinstance(first, BaseException):
                    raise first
                batch = first if number == 0 else next(batches)
                self._ready.put(self.make(batch))  # type: ignore[arg-type]
                number += 1
            self._ready.put(StopIteration())
        except BaseException as error:  # noqa: BLE001 - it is the training thread's to raise
            self._ready.put(error)
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()
