"""Make a folder of plain webdataset tars readable for training: `python -m data_prep.index FOLDER`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from molmo2_nemo.data.record import DataError
from molmo2_nemo.data.shard_writer import write_manifest


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.index", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with *.tar shards")
    parser.add_argument("--name", help="name of the data set (default: the folder's)")
    args = parser.parse_args(argv)
    try:
        manifest = write_manifest(args.folder, args.name or args.folder.resolve().name, parse=True)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.folder}: {manifest['records']} records in {len(manifest['shards'])} shards")
    return 0


if __name__ == "__main__":
    sys.exit(main())
