"""Ask a trained model about images or a video; the answer is greedy unless --temperature is given."""

from __future__ import annotations

import argparse
from pathlib import Path

from molmo2_nemo.cli.options import (
    add_layout_arguments,
    add_sampling_arguments,
    add_shown_arguments,
    checkpoint_of,
    on_ranks,
    sampling_of,
    shown_of,
    warn,
    warn_once,
)
from molmo2_nemo.data.media import read_media, said_of_cut
from molmo2_nemo.errors import UserError

EXAMPLES = """\
examples:
  molmo2 ask demo/run --image cat.jpg "Which animal is this?"
  molmo2 ask runs/8b --video talk.mp4 --subtitles talk.srt --frames 224 "What is on the last slide?"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a checkpoint, or the folder of a stage or run")
    parser.add_argument("question", help="what to ask")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; may be repeated")
    parser.add_argument("--video", metavar="FILE", help="a video")
    parser.add_argument(
        "--style",
        default="user_qa",
        metavar="NAME",
        help="style of the answer: user_qa (default), long_caption, ...; own:NAME for one of your own data",
    )
    parser.add_argument("--subtitles", metavar="FILE", help="of the video: .srt, .vtt, .ass, .ssa or .json")
    parser.add_argument(
        "--clip", nargs=2, type=float, metavar=("START", "END"), help="the part of the video that is shown, in seconds"
    )
    add_shown_arguments(parser)
    add_sampling_arguments(parser)
    add_layout_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from molmo2_nemo.data.styles import asked_style
    from molmo2_nemo.data.subtitle_files import read_subtitles
    from molmo2_nemo.evaluation.prompt_file import check_question, read_clip, without_effect
    from molmo2_nemo.inference.prompt import Prompt
    from molmo2_nemo.launch.ranks import layout_of
    from molmo2_nemo.processes import quiet
    from molmo2_nemo.rundir.config_file import truncated_of_checkpoint

    if args.image and args.video:
        raise UserError("--image and --video: give images or one video, not both")
    style = asked_style(args.style)
    check_question(args.question)
    for option, value in (("--subtitles", args.subtitles), ("--clip", args.clip)):
        if value is not None and not args.video:
            raise UserError(f"{option} belongs to a --video")
    sampling, shown, layout = sampling_of(args), shown_of(args), layout_of(args.layout)
    cut: list[Path] = []
    images = [read_media(Path(name), "image", cut) for name in args.image]
    clip = read_clip(args.clip) if args.clip else None
    video = read_media(Path(args.video), "video", clip=clip) if args.video else None
    prompt = Prompt(
        args.question,
        images,
        video,
        style,
        read_subtitles(Path(args.subtitles)) if args.subtitles else (),
        clip,
    )
    checkpoint = checkpoint_of(args, args.checkpoint)
    warn_once(said_of_cut(cut, truncated_of_checkpoint(checkpoint)))
    warn_once(without_effect(shown, [prompt]))
    quiet()
    from molmo2_nemo.launch.answering import check_answering  # with torch: after what needs none

    check_answering(checkpoint, layout, shown, longest=sampling.max_new_tokens, beyond=args.beyond_range)

    def work() -> int:
        from molmo2_nemo.inference.generate import answer

        remarks: list[str] = []
        said = answer(checkpoint, prompt, sampling, shown, remarks, layout)
        warn(remarks)
        print(said)
        return 0

    return on_ranks(args, layout, work)
