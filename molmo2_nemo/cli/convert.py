"""Convert between published Hugging Face folders (safetensors) and the trainer's checkpoints, both ways."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

from molmo2_nemo.errors import UserError

EXAMPLES = """\
examples:
  molmo2 convert import Molmo2-8B checkpoints/8b
  molmo2 convert export demo/run demo/hf
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("direction", choices=["import", "export"], help="Hugging Face to checkpoint, or back")
    parser.add_argument("source", type=Path, help="folder to read")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the target if it exists")
    parser.add_argument(
        "--format",
        choices=["native", "remote"],
        default="native",
        help="export: native for transformers 5 and later, remote for the published remote code's names",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="stored type (default: the source's)")


def run(args: argparse.Namespace) -> int:
    from molmo2_nemo.cli.runs import resolve_checkpoint

    if args.target.exists() and not args.overwrite:
        raise UserError(f"{args.target} exists; name another folder or give --overwrite")
    if args.direction == "import":
        print(import_folder(args.source, args.target, dtype=args.dtype, overwrite=args.overwrite))
    else:
        source = resolve_checkpoint(args.source)
        print(export_checkpoint(source, args.target, format=args.format, dtype=args.dtype, overwrite=args.overwrite))
    return 0


def import_folder(source: Path, target: Path, *, dtype: str | None = None, overwrite: bool = False) -> Path:
    """A Hugging Face folder as a checkpoint that `init_from` takes."""
    from molmo2_nemo.cli.worker import quiet

    quiet()
    import torch

    from molmo2_nemo.convert import import_hf

    return import_hf(source, target, dtype=getattr(torch, dtype) if dtype else None, overwrite=overwrite)


def export_checkpoint(
    source: Path,
    target: Path,
    *,
    format: Literal["native", "remote"] = "native",
    dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """A checkpoint as a Hugging Face folder, tokenizer included."""
    from molmo2_nemo.cli.worker import quiet

    quiet()
    import torch

    from molmo2_nemo.convert import export_hf

    return export_hf(source, target, format=format, dtype=getattr(torch, dtype) if dtype else None, overwrite=overwrite)
