"""Ask a trained model about images or a video; the answer is greedy unless --temperature is given."""

from __future__ import annotations

import argparse
from pathlib import Path

from molmo2_nemo.cli.options import add_sampling_arguments, sampling_of, warn
from molmo2_nemo.data.media import read_media, said_of_cut
from molmo2_nemo.errors import UserError

EXAMPLES = """\
examples:
  molmo2 ask demo/run --image cat.jpg "Which animal is this?"
  molmo2 ask runs/tiny/long --video clip.mp4 --max-new-tokens 64 "What happens?"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a checkpoint, or the folder of a finished stage or run")
    parser.add_argument("question", help="what to ask")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; may be repeated")
    parser.add_argument("--video", metavar="FILE", help="a video")
    parser.add_argument(
        "--style",
        default="user_qa",
        metavar="NAME",
        help="style of the answer: user_qa (default), long_caption, ...; own:NAME for one of your own data",
    )
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from molmo2_nemo.data.styles import asked_style
    from molmo2_nemo.processes import quiet
    from molmo2_nemo.rundir.config_file import truncated_of_checkpoint
    from molmo2_nemo.rundir.summary import resolve_checkpoint

    if args.image and args.video:
        raise UserError("--image and --video: give images or one video, not both")
    style = asked_style(args.style)
    sampling = sampling_of(args)
    cut: list[Path] = []
    images = [read_media(Path(name), "image", cut) for name in args.image]
    video = read_media(Path(args.video), "video") if args.video else None
    checkpoint = resolve_checkpoint(args.checkpoint)
    warn(said_of_cut(cut, truncated_of_checkpoint(checkpoint)))
    quiet()
    from molmo2_nemo.inference.generate import answer

    remarks: list[str] = []
    said = answer(checkpoint, images, video, args.question, style=style, sampling=sampling, remarks=remarks)
    warn(remarks)
    print(said)
    return 0
