"""How much of a data set is there: against its published size, and over a run.

A published mixture gives each data set its share whether all of it was prepared or eleven records: a few records that
stand in for many are seen again and again. What was published is known of some sets only; of others the manifest knows
how many records `molmo2 prepare` could not make because their media were not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from molmo2_nemo.data.config import DataConfig, SourceConfig
from molmo2_nemo.errors import plural

OWN = "own data"  # the kind of a user's own data in a manifest's head
THIN = 0.1  # of a data set: fewer of its records stand in for it, and a warning says so
NOT_FOUND, FAILED = "media not found", "download failed"  # why `prepare` skipped records that it may make another time
EXAMPLES_PER_PACK = 3.8  # of stage 2 as published: 16,348 tokens a pack (arXiv 2601.10611)


class Published(NamedTuple):
    """The size of a data set's training split, in our records, as its publisher states it."""

    records: int
    source: str


# Rounded where the source is. Data sets that are left out: no statement in the unit of our records was found.
PUBLISHED = {
    "pixmo_cap": Published(712_000, "arXiv 2409.17146, images"),
    "pixmo_cap_with_transcripts": Published(712_000, "arXiv 2409.17146, images"),
    "pixmo_ask_model_anything": Published(73_000, "arXiv 2409.17146, images"),
    "pixmo_cap_qa_as_user_qa": Published(165_000, "arXiv 2409.17146, images"),
    "pixmo_count_train": Published(36_000, "arXiv 2409.17146, images"),
    "pixmo_multi_image_qa_multi_only_max5": Published(45_000, "arXiv 2601.10611"),
    "molmo2_captions": Published(104_000, "arXiv 2601.10611, videos"),
    "molmo2_syn_captions_qa": Published(200_000, "the released mixture's remark"),
    "molmo2_syn_captions_subtitle_qa": Published(100_000, "the released mixture's remark"),
    "coco_2014_vqa_multi": Published(82_783, "COCO 2014, training images"),
    "okvqa": Published(9_009, "arXiv 1906.00067, questions"),
    "text_vqa": Published(21_953, "arXiv 1904.08920, images"),
    "tally_qa": Published(132_981, "arXiv 1810.12440, images"),
    "chart_qa_weighted": Published(28_299, "arXiv 2203.10244, questions"),
    "doc_qa": Published(39_463, "arXiv 2007.00398, questions"),
    "info_qa": Published(23_946, "arXiv 2104.12756, questions"),
    "tabwmp_da": Published(23_059, "arXiv 2209.14610, questions"),
    "dv_qa": Published(200_000, "arXiv 1801.08163, images"),
    "figure_qa": Published(100_000, "arXiv 1710.07300, images"),
    "plot_qa": Published(157_070, "arXiv 1909.00997, images"),
    "clevrer": Published(10_000, "arXiv 1910.01442, videos"),
}


@dataclass(frozen=True)
class Coverage:
    """How much of a data set there is."""

    records: int
    whole: int | None  # records of all of it; None: not known
    known: str = ""  # where `whole` is from
    limited: bool = False  # prepared with --limit

    @property
    def share(self) -> float | None:
        return None if self.whole is None else min(self.records / self.whole, 1.0)

    def words(self) -> str:
        """As "61 % of 118,287 (COCO 2014, training images)"; "" where nothing is known."""
        if self.share is None:
            return "a part of it (--limit)" if self.limited else ""
        return f"{percent(self.share)} of {self.whole:,} ({self.known})"


def percent(share: float) -> str:
    """A share as whole percent, not rounded to nothing or to all."""
    if 0 < share < 0.01:
        return "<1 %"
    return f"{min(round(100 * share), 99) if share < 1 else 100} %"


def coverage(name: str, head: Mapping[str, Any]) -> Coverage:
    """What a data set's manifest, and what was published under its name, say of how much of it is there."""
    records, skipped = int(head["records"]), head.get("skipped", {})
    absent = sum(int(skipped.get(reason, 0)) for reason in (NOT_FOUND, FAILED))
    settings = head.get("settings") or {}
    limited = 0 < int(settings.get("limit") or 0) <= records + sum(map(int, skipped.values()))
    training = settings.get("split", "train") == "train"  # the sizes below are of training splits
    published = PUBLISHED.get(name) if head.get("kind") != OWN and training else None
    if published is not None and published.records > records + absent:
        return Coverage(records, published.records, published.source, limited)
    if absent and not limited:
        return Coverage(records, records + absent, "the rest had no media")
    if published is not None:
        return Coverage(records, records, published.source, limited)
    return Coverage(records, None, limited=limited)


def standing_in(name: str, found: Coverage, source: SourceConfig | None = None) -> str:
    """What to warn of: few records that stand in for many; "" where nothing is wrong.

    Args:
        source: its place in a mixture, whose size factor may count more records than there are.
    """
    factor = source.size_factor if source is not None and source.group is not None else None
    if factor is not None and factor >= 1 and found.records < THIN * factor:
        return f"{name}: {_stand(found)} in for the {factor:,.0f} that the mixture counts"
    if found.share is not None and found.share < THIN:
        return f"{name}: {_stand(found)} in for {found.whole:,} ({found.known})"
    return ""


def _stand(found: Coverage) -> str:
    return plural(found.records, "record stands", "records stand")


# --- over a run ------------------------------------------------------------------------------------------------------


def examples_per_pack(
    sizes: Mapping[str, tuple[float, float]], shares: Mapping[str, float], config: DataConfig
) -> float:
    """How many examples a pack holds, about: as many as its tokens and crops have room for on average.

    Args:
        sizes: mean tokens and crops of an example of each data set, estimated.
        shares: of all examples; those of `sizes` need not sum to 1.
    """
    known = [name for name in sizes if shares.get(name)]
    total = sum(shares[name] for name in known)
    if not known or not total:
        return EXAMPLES_PER_PACK
    tokens, crops = (sum(shares[name] * sizes[name][i] for name in known) / total for i in range(2))
    room = [config.packing.sequence_length / tokens] if tokens else []
    room += [config.packing.max_crops / crops] if crops else []
    return max(min(room, default=EXAMPLES_PER_PACK), 1.0)


def mean_sizes(manifest: Path) -> tuple[float, float] | None:
    """Mean tokens and crops of a data set's records, as `prepare` estimated them; None where they were not measured."""
    import pyarrow.compute as compute
    import pyarrow.parquet as pq

    table = pq.read_table(manifest, columns=["tokens", "crops"])
    means = [compute.mean(table[name]).as_py() for name in ("tokens", "crops")]
    return None if None in means else (float(means[0]), float(means[1]))
