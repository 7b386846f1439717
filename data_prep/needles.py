"""Films with needles -> three small data sets of shards, for recipe=needle.

python -m data_prep.needles needle/data        # makes needle/data/pretrain, .../sft, .../long
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from molmo2_nemo.data.config import VideoConfig
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.needles.needle import Needle


@dataclass(frozen=True)
class Films:
    """What a data set holds."""

    count: int
    frames: tuple[int, ...]  # lengths of haystacks, of which each film has one
    subtitles: float  # share of films with subtitles, which hide a sentence
    seed: int


SETS = {
    "pretrain": Films(3000, (3,), 0.5, 1),
    "sft": Films(2000, (4, 8, 16), 0.5, 2),
    "long": Films(800, (16, 32, 64, 128), 0.5, 3),
}


def build_sets(out: Path, share: float = 1.0, *, overwrite: bool = False) -> dict[str, int]:
    """Write the data sets of the three stages; returns records per set.

    Args:
        share: of the films of each.

    Raises:
        DataError: see `build_needles`.
    """
    counts = {}
    for name, films in SETS.items():
        count = max(1, round(films.count * share))
        head = build_needles(
            out / name, count, films.frames, seed=films.seed, subtitles=films.subtitles, overwrite=overwrite
        )
        counts[name] = head["records"]
    return counts


def build_needles(
    out: Path,
    films: int,
    frames: Sequence[int],
    *,
    seed: int = 0,
    subtitles: float = 0.5,
    kinds: Sequence[str] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a data set of films, each with a needle and its questions, the same for the same arguments.

    Args:
        frames: lengths of haystacks, of which each film has one.
        subtitles: share of films with subtitles, which hide a sentence.
        kinds: of questions (`Needle.questions`); default: all.

    Returns:
        The manifest's head.
    Raises:
        DataError: the folder is there (without `overwrite`), or cannot be written.
    """
    records = needle_records(films, frames, seed, subtitles, kinds)
    return write_shards(out, records, records_per_shard=500, overwrite=overwrite)


def needle_records(
    films: int, frames: Sequence[int], seed: int, subtitles: float, kinds: Sequence[str] | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of each record."""
    rng = np.random.default_rng(seed)
    for number in range(films):
        length, depths = int(rng.choice(frames)), rng.uniform(0, 1, 2)
        text_depth = float(depths[1]) if rng.uniform() < subtitles else None
        needle = Needle(int(rng.integers(2**62)), length, float(depths[0]), text_depth)
        video = VideoConfig(max_frames=length)
        text = json.dumps(record(needle, video, kinds))
        yield f"needle-{number:06d}", {"json": text.encode(), "mp4": needle.film(video)}


def record(needle: Needle, video: VideoConfig, kinds: Sequence[str] | None = None) -> dict[str, Any]:
    """A record with one question of each kind."""
    lines = [{"start": start, "end": end, "text": text} for start, end, text in needle.subtitles(video)]
    of = [pair for kind, pair in needle.questions().items() if kinds is None or kind in kinds]
    asked = [{"style": "user_qa", "question": question, "answer": answer} for question, answer in of]
    return {"video": "mp4", "annotations": asked} | ({"subtitles": lines} if lines else {})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.needles", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=float, default=1.0, help="of the films of each data set (default: 1)")
    parser.add_argument("--overwrite", action="store_true", help="replace data sets that are there")
    args = parser.parse_args(argv)
    try:
        counts = build_sets(args.out, args.share, overwrite=args.overwrite)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, count in counts.items():
        print(f"{args.out / name}: {count} records")
    return 0


if __name__ == "__main__":
    sys.exit(main())
