"""Draw what the model really sees: crops with pooling windows, frames, tokens, message trees, attention masks, weights.

Takes a stage's mixture, a folder of shards, one shard, or one record. Writes an HTML page (self-contained, no network)
and PNGs. Packs are those that training begins with; nothing is trained and no GPU is used."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from molmo2_nemo.cli.options import add_config_dir_arguments, check_writable
from molmo2_nemo.data.objects.address import is_url
from molmo2_nemo.errors import UserError, plural, writing

EXAMPLES = """\
examples:
  molmo2 preview recipe=tiny stage=sft --packs 2
  molmo2 preview demo/data/sft                             # a folder of shards, with recipe=tiny's settings
  molmo2 preview /data/shards/mine recipe=8b stage=long --out /tmp/look
  molmo2 preview demo/data/sft/sft-000000.tar              # one shard
  molmo2 preview demo/data/sft --record tree-cat
  molmo2 preview recipe=tiny stage=long --rank 3/8         # what the fourth of eight data-parallel ranks begins with
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="SHARDS|KEY=VALUE", help="a folder of shards or one .tar, and settings"
    )
    parser.add_argument("--packs", type=int, default=1, metavar="N", help="how many packs to draw (default 1)")
    parser.add_argument("--record", metavar="KEY", help="draw this record alone; KEY or SHARD:KEY")
    parser.add_argument(
        "--rank",
        default="0/1",
        metavar="K/N",
        help="data-parallel rank K (from 0) of N whose packs to draw (default 0/1)",
    )
    parser.add_argument("--out", default="preview", metavar="DIR", help="where the page goes (default preview/)")
    add_config_dir_arguments(parser)


def run(args: argparse.Namespace) -> int:
    folders = [value for value in args.overrides if "=" not in value]
    if len(folders) > 1:
        raise UserError(f"one folder or shard at a time, not {len(folders)}; settings are written key=value")
    if not 1 <= args.packs <= 100:
        raise UserError(f"--packs {args.packs}: between 1 and 100 packs can be drawn")
    check_writable("--out", Path(args.out))
    rank, ranks = _rank(args.rank)
    if folders:  # looked at before the imports, which take seconds
        _check_shards(folders[0])

    from molmo2_nemo.data.config import SourceConfig
    from molmo2_nemo.data.objects.address import place_of
    from molmo2_nemo.preview import collect
    from molmo2_nemo.preview.page import write_pages
    from molmo2_nemo.settings.compose import compose

    settings = [value for value in args.overrides if "=" in value]
    cfg = compose(settings, args.config_dir, args.config_name)
    where = " ".join(settings) or "recipe=tiny"
    with tempfile.TemporaryDirectory() as scratch:
        if folders:
            shards = place_of(folders[0])
            alone = isinstance(shards, Path) and shards.suffix == ".tar"
            path = _alone(shards, Path(scratch)) if alone else shards  # type: ignore[arg-type]
            cfg.data.sources = {Path(shards.name).stem or "shards": SourceConfig(path=str(path))}
            where = f"{shards}, {where}"
        views = [collect.record(cfg, args.record)] if args.record else collect.packs(cfg, args.packs, rank, ranks)
    about = f"{where}: {cfg.data.image.crop_size}-pixel crops, stage {cfg.stage.name}, seed {cfg.data.seed}"
    with writing(Path(args.out)):
        paths = write_pages(views, cfg, collect.tokenizer_of(cfg), Path(args.out), about)
    print(f"{paths[0]}  ({len(views)} pack{'s' * (len(views) > 1)}, {len(paths) - 1} PNGs beside it)")
    return 0


def _rank(text: str) -> tuple[int, int]:
    parts = text.split("/")
    if len(parts) == 2 and all(part.isdecimal() for part in parts) and int(parts[0]) < int(parts[1]):
        return int(parts[0]), int(parts[1])
    raise UserError(f"--rank {text}: expected K/N with K from 0 to N - 1, such as 3/8")


def _check_shards(given: str) -> None:
    """Refuses a path that is neither a folder nor a .tar file. An address at an object store is looked at later.

    Raises:
        UserError: names the path.
    """
    if is_url(given):
        return
    path = Path(given)
    if path.suffix == ".tar" and not path.is_file():
        raise UserError(f"{path}: no such shard")
    if path.suffix != ".tar" and not path.is_dir():
        raise UserError(f"no folder at {path}. Give the folder that holds the shards and manifest.parquet, or one .tar")


def _alone(shard: Path, folder: Path) -> Path:
    """Makes `folder` a data set of one shard: a link to the shard, and a manifest for it alone."""
    from molmo2_nemo.data.media_once import FIELD
    from molmo2_nemo.data.record import BadRecord
    from molmo2_nemo.data.tar_manifest import write_manifest

    def left_out(_: str, key: str, error: BadRecord) -> None:
        if error.fault is None or not error.fault.field.startswith(FIELD):
            raise error
        lost.append(key)

    lost: list[str] = []
    (folder / shard.name).symlink_to(shard.resolve())
    write_manifest(folder, shard.stem, left_out=left_out)
    if lost:
        out = plural(len(lost), "record")
        print(f"{out} of {shard.name} left out: their media lie in other tars; preview the folder")
    return folder
