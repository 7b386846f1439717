"""Which record is the n-th example of training: a pure function of the seed, the rates and n.

Nothing here reads data or keeps a generator running. The same n names the same (data set, epoch, record) on every rank,
in every worker and after every restart, which is what makes resume exact and elastic. The bits come from Philox and
BLAKE2 directly, so a NumPy upgrade does not change the order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from molmo2_nemo.data.config import SourceConfig
from molmo2_nemo.data.sampling import present, weights
from molmo2_nemo.errors import DataError

CHUNK = 1 << 14  # draws of a data set that are generated together
FEISTEL_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class Draw:
    """One example of the global stream."""

    source: str  # name of the data set
    epoch: int
    index: int  # record number in the data set, after shuffling


def stable_key(*parts: object) -> int:
    """A 128-bit key made from the parts, the same on every machine and Python version."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def example_rng(seed: int, draw: Draw) -> np.random.Generator:
    """The only source of randomness for building an example."""
    return np.random.Generator(np.random.Philox(key=stable_key("example", seed, draw.source, draw.epoch, draw.index)))


def permute(index: int, size: int, key: int) -> int:
    """Element `index` of a pseudo-random permutation of range(size), without building it.

    A balanced Feistel network over the smallest even number of bits that holds `size`; values outside the range are fed
    through it again (cycle walking, fewer than four rounds on average).
    """
    if size <= 1:
        return 0
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    words = [(key >> (16 * r)) & 0xFFFF | (r << 16) for r in range(FEISTEL_ROUNDS)]
    value = index
    while True:
        left, right = value >> half, value & mask
        for word in words:
            mixed = (right + word * 0x9E3779B97F4A7C15 + (key >> 64)) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) & mask)
        value = left << half | right
        if value < size:
            return value


def normalised_rates(
    sources: Mapping[str, SourceConfig], groups: Mapping[str, float] | None = None, missing: str = "error"
) -> dict[str, float]:
    """The normalised rate of each source, in alphabetical order; sources with rate 0 are left out.

    Args:
        groups: sampling rate of each group that sources name; see data/sampling.py.
        missing: "skip" leaves out sources without shards; with "error", only the shards of a group's members are looked
            for.
    Raises:
        DataError: no source, a rate that is not a finite number >= 0, only zero rates, or a group's member without
            shards.
    """
    if not sources:
        raise DataError("data.sources is empty; name at least one data set, e.g. data.sources.sft.path=demo/sft")
    if missing == "skip" or any(source.group is not None for source in sources.values()):
        sources = present(sources, missing)
    found = {name: weight for name, weight in weights(sources, groups or {}).items() if weight is not None}
    total = math.fsum(found.values())
    if total <= 0:
        raise DataError("every data.sources.*.rate is 0; nothing would be drawn")
    return {name: found[name] / total for name in sorted(found) if found[name] > 0}


class Mixture:
    """The order of all examples.

    Args:
        lengths: records per data set; must cover the names in `rates`.
        rates: share of each data set, summing to 1.
    """

    def __init__(self, seed: int, rates: Mapping[str, float], lengths: Mapping[str, int]):
        self.seed = seed
        self.names = list(rates)
        self.lengths = [lengths[name] for name in self.names]
        if min(self.lengths) < 1:
            raise DataError(f"data set {self.names[self.lengths.index(min(self.lengths))]!r} is empty")
        self._edges = np.cumsum([rates[name] for name in self.names])
        self._edges[-1] = 1.0
        self._totals = [np.zeros(len(self.names), np.int64)]  # draws of each data set before chunk c
        self._chunk = -1
        self._draws = np.zeros(0, np.int64)
        self._counts = np.zeros(0, np.int64)
        self._keys: dict[tuple[int, int], int] = {}

    def draw(self, n: int) -> Draw:
        """The n-th example of the global stream (n from 0)."""
        chunk, inner = divmod(n, CHUNK)
        if chunk != self._chunk:
            self._load(chunk)
        source = int(self._draws[inner])
        epoch, position = divmod(int(self._counts[inner]), self.lengths[source])
        key = self._keys.get((source, epoch))
        if key is None:
            key = self._keys[source, epoch] = stable_key("shuffle", self.seed, self.names[source], epoch)
        return Draw(self.names[source], epoch, permute(position, self.lengths[source], key))

    def _draw_chunk(self, chunk: int) -> np.ndarray:
        """Data set number of each example of a chunk, int64 [CHUNK]."""
        bits = np.random.Philox(key=stable_key("mixture", self.seed, chunk)).random_raw(CHUNK)
        draws = np.searchsorted(self._edges, (bits >> np.uint64(11)) * 2.0**-53, side="right")
        return np.minimum(draws, len(self.names) - 1)

    def _load(self, chunk: int) -> None:
        while len(self._totals) <= chunk:  # fast-forward: about a tenth of a second per million examples
            counts = np.bincount(self._draw_chunk(len(self._totals) - 1), minlength=len(self.names))
            self._totals.append(self._totals[-1] + counts)
        draws = self._draw_chunk(chunk)
        counts = np.empty(CHUNK, np.int64)  # how often the data set was drawn before this example
        for source, before in enumerate(self._totals[chunk]):
            where = draws == source
            counts[where] = before + np.arange(int(where.sum()))
        self._chunk, self._draws, self._counts = chunk, draws, counts
