"""Convert weights: published folders to checkpoints and back, base models to the start of stage 1. Safetensors only."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from molmo2_nemo.cli.options import check_folder, checkpoint_of
from molmo2_nemo.errors import UserError, file_error, writing

EXAMPLES = """\
examples:
  molmo2 convert import Molmo2-8B checkpoints/8b
  molmo2 convert export demo/run demo/hf
  molmo2 convert init --llm Qwen3-8B --vit siglip2-so400m-patch14-384 checkpoints/8b-start
"""
DIRECTIONS = {  # what each does, examples
    "import": (
        "a Molmo2 in Hugging Face format to a checkpoint",
        """\
examples:
  molmo2 convert import Molmo2-8B checkpoints/8b
  molmo2 convert import Molmo2-8B checkpoints/8b --dtype bfloat16 --overwrite
""",
    ),
    "export": (
        "a checkpoint to a folder for transformers and vLLM",
        """\
examples:
  molmo2 convert export demo/run demo/hf                  # the last finished stage of a run
  molmo2 convert export runs/8b/sft hf-8b --dtype bfloat16
  molmo2 convert export runs/8b/sft hf-8b-remote --format remote
""",
    ),
    "init": (
        "base models to the checkpoint that stage 1 starts from",
        """\
examples:
  molmo2 convert init --llm Qwen3-8B --vit siglip2-so400m-patch14-384 checkpoints/8b-start
  molmo2 convert init --llm Qwen3-4B-Instruct-2507 --vit siglip2-so400m-patch14-384 --model 4b checkpoints/4b-start
""",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from molmo2_nemo.model.config import PRESETS
    from molmo2_nemo.settings.run import RunConfig

    models = [name for name in PRESETS if name != "tiny"]
    directions = parser.add_subparsers(dest="direction", metavar="import|export|init", required=True)
    importing, exporting, starting = (
        directions.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=examples,
        )
        for name, (summary, examples) in DIRECTIONS.items()
    )
    importing.add_argument("source", type=Path, help="folder of a Molmo2, native or remote-code format (detected)")
    exporting.add_argument("source", type=Path, help="a checkpoint, or the folder of a stage or run")
    exporting.add_argument(
        "--format",
        choices=["native", "remote"],
        default="native",
        help="native for transformers 5 and later, remote for the published remote code's names (default: native)",
    )
    starting.add_argument("--llm", type=Path, required=True, help="folder of Qwen3-4B-Instruct-2507, Qwen3-8B, ...")
    starting.add_argument("--vit", type=Path, required=True, help="folder of siglip2-so400m-patch14-384")
    starting.add_argument(
        "--model",
        choices=models,
        help="refuse base models that are not this model's",
    )
    starting.add_argument("--seed", type=int, default=RunConfig.seed, help="seed of the connector and the extra rows")
    for direction in (importing, exporting, starting):
        direction.add_argument("target", type=Path, help="folder to write")
        stored = "float32" if direction is starting else "the source's"
        direction.add_argument("--dtype", choices=["float32", "bfloat16"], help=f"stored type (default: {stored})")
        direction.add_argument("--overwrite", action="store_true", help="replace the target if it exists")


def run(args: argparse.Namespace) -> int:
    check_folder("the target", args.target)
    if args.target.exists() and not args.overwrite:
        raise UserError(f"{args.target} exists; name another folder or give --overwrite")
    if args.direction == "import":
        print(import_folder(args.source, args.target, dtype=args.dtype, overwrite=args.overwrite))
    elif args.direction == "init":
        options = {"model": args.model, "seed": args.seed, "dtype": args.dtype, "overwrite": args.overwrite}
        print(init_folder(args.llm, args.vit, args.target, **options))
    else:
        source = checkpoint_of(args, args.source)
        done = export_folder(source, args.target, format=args.format, dtype=args.dtype, overwrite=args.overwrite)
        print(f"{done}\n{how_to_load(done)}")
    return 0


def how_to_load(exported: Path) -> str:
    """Which program reads an exported folder, and with what call."""
    from molmo2_nemo.convert.model_card import CARD_FILE

    call = f"transformers.AutoModelForImageTextToText.from_pretrained({str(exported)!r})"
    tokens = "" if (exported / "tokenizer.json").is_file() else "; without a tokenizer: none was found to write"
    return f"load it with transformers 5{tokens}:\n  {call}\n  {exported / CARD_FILE} has a whole example"


@contextmanager
def one_line(target: Path) -> Iterator[Any]:
    """Imports torch quietly; inside the block, errors about files or weights become one line for the user.

    Args:
        target: the folder that the conversion writes.
    """
    from molmo2_nemo.processes import quiet

    quiet()
    import torch

    from molmo2_nemo.errors import ConversionError

    try:
        with writing(target):
            yield torch
    except ConversionError as error:
        raise UserError(" ".join(str(error).split())) from error
    except OSError as error:
        raise UserError(file_error(error)) from error


def import_folder(source: Path, target: Path, *, dtype: str | None = None, overwrite: bool = False) -> Path:
    """A Hugging Face folder as a checkpoint that `init_from` takes; prints what is not as it was, or was decided."""
    with one_line(target) as torch:
        from molmo2_nemo.convert import import_checkpoint
        from molmo2_nemo.convert.checkpoints import MODEL_FILE

        kind = getattr(torch, dtype) if dtype else None
        done = import_checkpoint(source, target, dtype=kind, overwrite=overwrite)
        for note in json.loads((done / MODEL_FILE).read_text())["notes"]:
            print(f"note: {note}")
        return done


def export_folder(
    source: Path,
    target: Path,
    *,
    format: Literal["native", "remote"] = "native",
    dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """A checkpoint as a Hugging Face folder, tokenizer included."""
    with one_line(target) as torch:
        from molmo2_nemo.convert import export_checkpoint

        kind = getattr(torch, dtype) if dtype else None
        return export_checkpoint(source, target, format=format, dtype=kind, overwrite=overwrite)


def init_folder(
    llm: Path,
    vit: Path,
    target: Path,
    *,
    seed: int,
    model: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Base models as the checkpoint that stage 1 starts from; prints what was left behind."""
    with one_line(target) as torch:
        from molmo2_nemo.convert import init_checkpoint
        from molmo2_nemo.convert.checkpoints import MODEL_FILE
        from molmo2_nemo.convert.initial import ORIGIN_FILE

        kind = getattr(torch, dtype or "float32")
        done = init_checkpoint(llm, vit, target, model=model, seed=seed, dtype=kind, overwrite=overwrite)
        name = json.loads((done / MODEL_FILE).read_text())["name"]
        origin = json.loads((done / ORIGIN_FILE).read_text())
        dropped = origin["dropped"]
        for note in origin["notes"]:
            print(f"note: {note}")
        print(f"model {name}; {len(dropped)} tensors of the vision model left out on purpose, listed in {ORIGIN_FILE}")
        return done
