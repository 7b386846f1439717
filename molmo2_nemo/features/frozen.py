"""A frozen encoder that computes each crop once: what the store has is read, the rest is computed and kept.

Features must be a function of the crop alone, or a loss would depend on what is in the store. A product's rows may
round differently with their number and their place among others, so crops are encoded in groups of one fixed size: one
by one, unless `together` says otherwise. Then a crop's features are those of one fixed computation, whatever pack, rank
or epoch it comes in.

Shape legend: C crops of a rank's run, c of a chunk of it, P patches per crop, D_p values per patch, F feature width.
"""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from molmo2_nemo.data.config import FeatureCacheConfig
from molmo2_nemo.errors import UserError
from molmo2_nemo.features.fingerprint import fingerprint
from molmo2_nemo.features.store import HEADER, Damaged, FeatureStore, key_of
from molmo2_nemo.features.writer import Writer, bytes_of
from molmo2_nemo.transfer import to_device

GIB = 2**30
READERS = 4  # threads that hash crops and read entries
SAID = 3  # entries of one kind (damaged, different) that a process names; all are counted


@dataclass
class Counts:
    """Of one rank, of the crops that training encoded or would have encoded."""

    hits: int = 0
    misses: int = 0
    read: int = 0  # bytes
    written: int = 0  # bytes
    damaged: int = 0  # entries, computed again
    unsaved: int = 0  # crops computed and not kept: limit, full disk, or a disk slower than the encoder
    checked: int = 0  # hits computed again
    different: int = 0  # of them, those that came out otherwise


@dataclass
class Found:
    """What the store has of a rank's run of crops."""

    keys: list[bytes]  # [C]
    rows: list[int]  # [C], row of `features`, ascending; -1: not there
    features: Tensor | None = None  # [hits, P, F], host, pinned where there is a GPU
    damaged: int = 0
    encoded: set[int] = field(default_factory=set)  # chunks, by their first crop, that are counted and kept


class FrozenFeatures:
    """Encodes crops with a frozen encoder.

    Args:
        encoder: uint8 [c, P, D_p] -> [c, P, F]; its parameters are loaded before the first crop comes.
        shape: P and F.
        config: where features are kept.
        settings: all else that the encoder's results follow from; for the fingerprint.
        processes: that share the folder.

    Raises:
        UserError: the encoder is trained.
    """

    def __init__(
        self,
        encoder: nn.Module,
        shape: tuple[int, int],
        config: FeatureCacheConfig,
        settings: tuple[object, ...] = (),
        processes: int = 1,
    ) -> None:
        if any(parameter.requires_grad for parameter in encoder.parameters()):
            raise UserError("data.feature_cache: the vision encoder is trained; set stage.train_vit=false")
        self.encoder, self.shape, self.config, self.settings = encoder, shape, config, settings
        self.processes, self.together = processes, config.together or 1
        self.dtype = next(encoder.parameters()).dtype
        self.counts = Counts()
        self._random = random.Random(0)  # which hits are checked changes no number
        self._opening = threading.Lock()
        self._store: FeatureStore | None = None
        self._writer: Writer | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._said, self._full_said = {"damaged": 0, "different": 0}, False  # entries; those beyond `SAID` too

    def store(self) -> FeatureStore | None:
        """The store, opened when first asked for: by then the weights are there."""
        with self._opening:
            if self._store is None and self.config.path is not None:
                self._open(Path(self.config.path))
            return self._store

    def _open(self, folder: Path) -> None:
        patches, width = self.shape
        self._store = FeatureStore(
            folder,
            fingerprint(self.encoder, *self.settings, self.together),
            patches * width * self.dtype.itemsize,
            limit=round(self.config.max_gib * GIB),
            keep_free=round(self.config.keep_free_gib * GIB),
            processes=self.processes,
        )
        self._store.sweep()
        self._writer = Writer(self._store, self._wrote)
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="features")

    def described(self) -> str:
        """One line for the log."""
        how = "one by one" if self.together == 1 else f"{self.together} together"
        if (store := self.store()) is None:
            return f"frozen encoder: crops are encoded {how}, features are not kept"
        used, others = store.used()
        return (
            f"frozen encoder: features are kept in {store.own}, {store.size + HEADER.size:,} bytes a crop; "
            f"{used / GIB:.2f} of {self.config.max_gib:g} GiB are used, {others / GIB:.2f} of them by other encoders; "
            f"crops are encoded {how}"
        )

    def look_up(self, crops: Tensor) -> Found:
        """Hash a run of crops and read what the store has of them. Uses neither the encoder nor, if they are on the
        host, the device: it may run ahead of training in another thread.

        Args:
            crops: uint8 [C, P, D_p].
        """
        store = self.store()
        if store is None or self._pool is None or not len(crops):
            return Found([b""] * len(crops), [-1] * len(crops))
        pixels = crops.cpu().contiguous().numpy()
        keys = list(self._pool.map(key_of, pixels))
        there = [i for i, has in enumerate(self._pool.map(store.has, keys)) if has]
        found = Found(keys, [-1] * len(keys))
        pinned = torch.cuda.is_available()
        found.features = torch.empty((len(there), *self.shape), dtype=self.dtype, pin_memory=pinned)
        results = self._pool.map(self._read, [keys[i] for i in there], found.features)
        for row, (i, result) in enumerate(zip(there, results, strict=True)):
            if result is True:
                found.rows[i] = row
            found.damaged += result is None
        return found

    def _read(self, key: bytes, into: Tensor) -> bool | None:
        """Whether there was an entry; None: a damaged one."""
        assert self._store is not None
        try:
            return self._store.read(key, bytes_of(into))
        except Damaged as error:
            self._say("damaged", f"{error}; it is computed again")
            return None

    def encode(self, crops: Tensor, found: Found, at: slice) -> Tensor:
        """Features of a chunk, read or computed; counted and kept when it is encoded for the first time (it may be
        computed again in backward).

        Args:
            crops: uint8 [c, P, D_p].
            at: where they lie in the run.

        Returns:
            [c, P, F] without gradient.
        """
        rows = found.rows[at]
        hits = [i for i, row in enumerate(rows) if row >= 0]
        missed = [i for i, row in enumerate(rows) if row < 0]
        kept = self._kept(found, [rows[i] for i in hits], crops.device)
        first = at.start not in found.encoded
        if not missed and kept is not None:
            out = kept
        else:
            computed = self._computed(crops if not hits else crops[_index(missed, crops.device)])
            if first:
                self._keep([found.keys[at.start + i] for i in missed], computed)
            out = computed
            if kept is not None:
                out = computed.new_empty((len(rows), *self.shape))
                out[_index(missed, crops.device)] = computed
                out[_index(hits, crops.device)] = kept
        if first:
            found.encoded.add(at.start)
            self._count(len(hits), len(missed), found)
            self._verify(crops, hits, out)
        return out

    def _kept(self, found: Found, rows: list[int], device: torch.device) -> Tensor | None:
        """Those rows of what was read, on the device."""
        if not rows or found.features is None:
            return None
        first, stop = rows[0], rows[-1] + 1
        whole = stop - first == len(rows)  # unless one between them is damaged
        return to_device(found.features[first:stop] if whole else found.features[rows], device)

    def _computed(self, crops: Tensor) -> Tensor:
        """Features of crops in groups of one fixed size, the last filled up with black ones."""
        parts = []
        with torch.no_grad():
            for start in range(0, len(crops), self.together):
                part = crops[start : start + self.together]
                there = len(part)
                if there < self.together:
                    part = torch.cat((part, part.new_zeros(self.together - there, *part.shape[1:])))
                parts.append(self.encoder(part)[:there])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _keep(self, keys: list[bytes], features: Tensor) -> None:
        if self._writer is not None:
            self.counts.unsaved += self._writer.put(keys, features)

    def _wrote(self, size: int) -> None:
        """Called by the writer's thread."""
        self.counts.written += size
        assert self._store is not None
        if not size and self._store.stopped is not None:
            self.counts.unsaved += 1
            if not self._full_said:
                self._full_said = True
                print(f"features of the frozen encoder: {self._store.stopped}; no more are kept", flush=True)

    def _count(self, hits: int, misses: int, found: Found) -> None:
        counts = self.counts
        counts.hits += hits
        counts.misses += misses
        counts.read += hits * (HEADER.size + self._store.size) if self._store is not None else 0
        counts.damaged += found.damaged
        found.damaged = 0

    def _verify(self, crops: Tensor, hits: list[int], out: Tensor) -> None:
        """Compute some hits again."""
        for i in hits:
            if self._random.random() < self.config.verify:
                self.counts.checked += 1
                again = self._computed(crops[i : i + 1])[0]
                if not torch.equal(again, out[i]):
                    self.counts.different += 1
                    most = (again.float() - out[i].float()).abs().max().item()
                    self._say("different", f"a crop's features differ from those kept by up to {most:.3g}")

    def _say(self, kind: str, text: str) -> None:
        with self._opening:
            self._said[kind] += 1
            number = self._said[kind]
        if number <= SAID:
            print(f"features of the frozen encoder: {text}", flush=True)
        elif number == SAID + 1:
            more = f"and more {kind} ones, which the log counts as features_{kind}"
            print(f"features of the frozen encoder: {more}", flush=True)

    def _say_rest(self) -> None:
        for kind, number in self._said.items():
            if number > SAID:
                rest = f"and {number - SAID:,} more {kind} ones: {number:,} in all"
                print(f"features of the frozen encoder: {rest}", flush=True)
        self._said = dict.fromkeys(self._said, 0)

    def close(self) -> None:
        """What waits to be written is written; the threads end."""
        if self._writer is not None:
            self._writer.close()
        if self._pool is not None:
            self._pool.shutdown()
        self._say_rest()
        with self._opening:
            self._store = self._writer = self._pool = None


def _index(rows: list[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor(rows), device)
