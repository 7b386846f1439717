"""What this process, and the workers that read for it, took from object stores."""

from __future__ import annotations

from collections import Counter

KINDS = ("bytes", "requests", "retries", "hits", "damaged", "not_kept")
# bytes that came; requests for records and manifests; tries after a failed one; spans of records found in the cache;
# spans that were fetched again as they were damaged; spans that the cache had no room for on the disk

counts: Counter[str] = Counter()


def take() -> dict[str, int]:
    """What was counted since the last call, for the process that this one reads for; it is forgotten here."""
    taken = dict(counts)
    counts.clear()
    return taken


def add(taken: dict[str, int]) -> None:
    counts.update(taken)
