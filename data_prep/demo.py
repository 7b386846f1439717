"""Demo data: real images and a real film clip -> three small data sets of webdataset shards.

python -m data_prep.demo OUT        # makes OUT/pretrain, OUT/sft, OUT/long
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_prep import demo_records
from data_prep.prepare import Options, prepare
from data_prep.sources.base import Context, Manual, Row, Sample, Skip, Source
from data_prep.sources.own import entry_sample
from molmo2_nemo.errors import DataError

MEDIA = Path(__file__).parent / "demo_media"
SETS = {"pretrain": demo_records.pretrain, "sft": demo_records.sft, "long": demo_records.long}


def build_demo(out_dir: str | Path) -> dict[str, int]:
    """Write the three data sets under `out_dir`, replacing earlier ones; returns records per set.

    Each set is complete or absent: it is written to a temporary folder and renamed.
    """
    out = Path(out_dir)
    options = Options(records_per_shard=8, folders=(MEDIA,), cache=out / ".cache", overwrite=True, strict=True)
    return {name: prepare(_source(name), out / name, options, rows=SETS[name]).head["records"] for name in SETS}


def _source(name: str) -> Source:
    return Source(
        name=name,
        mixes={},
        kind="images and a film clip",
        origin=Manual("nothing: the media come with the package", ()),
        licence="see data_prep/demo_media/ATTRIBUTION.md",
        fields={"key": str},
        records=_records,
    )


def _records(rows: Iterable[Row], ctx: Context) -> Iterator[Sample | Skip]:
    for entry in rows:
        yield entry_sample(entry, entry["key"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.demo", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    args = parser.parse_args(argv)
    try:
        counts = build_demo(args.out)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, count in counts.items():
        print(f"{args.out / name}: {count} records")
    return 0


if __name__ == "__main__":
    sys.exit(main())
