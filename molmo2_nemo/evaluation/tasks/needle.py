"""needle: a picture at a depth of a long film, and a sentence in its subtitles (as LongVILA, arXiv 2408.10188, fig. 1,
and its many forerunners on text): which of the two is found, from which depth, in how many frames.

Data: none; films are drawn and encoded when they are asked for, from the seed alone (evaluation/needles). A pass of
`--frames N` has haystacks of N frames, every one of which the model is shown; `--depths D` places, and at each two
films, with five questions on the picture and one on the sentence.
Score: exact_match. Answers are colours, and a word for the sentence; guessing gives 12.5 % for the picture, 10 %
for the sentence (`needle.chance`). The published needles are other pictures in other films, so that figures do not
compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.needles.heat_map import draw, heat_map
from molmo2_nemo.evaluation.needles.needle import LEAST_FRAMES, TEXT_KIND, Needle
from molmo2_nemo.evaluation.task import Question, Task, TaskSettings
from molmo2_nemo.files import write_json
from molmo2_nemo.inference.prompt import Prompt
from molmo2_nemo.settings.run import EvaluationConfig

FILMS = 2  # at every depth
NEEDLES = ("picture", "text")
FASTEST = 100  # frames a second: a film's times are exact to a millisecond


class NeedleItems:
    """Films with a needle each: all depths, then all depths again."""

    def __init__(self, settings: TaskSettings) -> None:
        self.settings = settings

    def __len__(self) -> int:
        return self.settings.depths * FILMS

    def needle(self, number: int, frames: int) -> Needle:
        """The needle of an item in a haystack of so many frames."""
        depths = self.settings.depths
        depth = number % depths / max(depths - 1, 1)
        return Needle(self.settings.seed * 1_000_003 + number, frames, depth, text_depth=depth)

    def questions(self, number: int, builder: ExampleBuilder) -> list[Question]:
        """See `Items`.

        Raises:
            UserError: haystacks too short for a needle.
        """
        video = builder.config.video
        needle = self.needle(number, video.max_frames)
        film, lines = needle.film(video), needle.subtitles(video)
        return [
            Question(
                f"{needle.frames} frames/{number}/{kind}",
                Prompt(asked, video=film, subtitles=lines if kind == TEXT_KIND else ()),
                (answer,),
                tags={
                    "needle": "text" if kind == TEXT_KIND else "picture",
                    "kind": kind,
                    "depth": f"{needle.depth:.2f}",
                    "frames": str(needle.frames),
                },
            )
            for kind, (asked, answer) in needle.questions().items()
        ]


class NeedleTask(Task):
    name = "needle"
    title = "a picture, or a sentence in the subtitles, at a depth of a long film"
    group = "long video QA"
    scorers = ("exact_match",)
    max_new_tokens = 8
    video = True

    def open(self, settings: TaskSettings) -> NeedleItems:
        """See `Task`.

        Raises:
            UserError: a haystack too short for a needle, or a seed that draws nothing.
        """
        if settings.frames is not None and settings.frames < LEAST_FRAMES:
            raise UserError(f"task needle: haystacks of {settings.frames} frames; they need {LEAST_FRAMES} or more")
        if settings.seed < 0:
            raise UserError(f"task needle: films are drawn from a seed of 0 or more, not {settings.seed}")
        return NeedleItems(settings)

    def check(self, settings: TaskSettings, data: DataConfig) -> None:
        """See `Task`.

        Raises:
            UserError: more depths than a haystack has places, or films that are too fast to be drawn or too long to be
                read.
        """
        frames, fps = data.video.max_frames, data.video.max_fps
        if settings.depths > max(EvaluationConfig.depths, frames - 1):
            raise UserError(
                f"task needle: {settings.depths} depths in haystacks of {frames} frames, which have {frames - 1} places"
            )
        if fps > FASTEST:
            raise UserError(f"task needle: films of {fps:g} frames a second; at most {FASTEST} can be drawn")
        if (seconds := (frames - 1) / fps) > data.limits.video_seconds:
            raise UserError(
                f"task needle: {frames} frames at {fps:g} a second are a film of {seconds:.4g} s, more than the "
                f"{data.limits.video_seconds:g} s of data.limits.video_seconds"
            )

    def draw(self, lines: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """Writes needle.png, the heat maps of all lengths, and needle_map.json, their numbers."""
        maps = [found for found in (heat_map(lines, name) for name in NEEDLES) if found["depths"]]
        if maps:
            write_json(folder / "needle_map.json", {"maps": maps})
            draw(maps, folder / "needle.png", title="needles: exact match by depth and length")


TASK = NeedleTask()
