"""What a trained model is asked, and how much it is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.example import Example
from molmo2_nemo.data.media import read_media
from molmo2_nemo.data.record import Subtitle
from molmo2_nemo.errors import UserError

if TYPE_CHECKING:
    from molmo2_nemo.data.build import Decoded, ExampleBuilder


@dataclass(frozen=True)
class Prompt:
    """One question about images, a video, or nothing."""

    question: str
    images: Sequence[bytes | Path] = ()  # encoded files, or where they are: then they are read when they are needed
    video: bytes | Path | None = None  # the same; not beside images
    style: str | None = "user_qa"  # kind of the answer, as in annotations; None: the question is taken as it is
    # Start, end (seconds of the film), text; or lines of a record, whose times count from the clip; or only a text
    subtitles: Sequence[tuple[float, float, str]] | Sequence[Subtitle] | str = ()
    clip: tuple[float, float] | None = None  # seconds of the film: the part that is shown
    options: Sequence[str] = ()  # of a multiple-choice question
    reference: Any = None  # what it is compared with: a text, an object of JSON values, or a list of them
    history: Sequence[tuple[str, str]] = ()  # earlier questions and answers, the first of which opens the conversation
    sampling: dict[str, Any] = field(default_factory=dict)  # overrides of frame sampling, as in a record

    def clipped_subtitles(self) -> list[Subtitle] | str:
        """The lines heard in the clip, their times counted from its start."""
        if isinstance(self.subtitles, str):
            return self.subtitles
        start, end = self.clip or (0.0, float("inf"))
        lines = []
        for line in self.subtitles:
            if isinstance(line, Subtitle):
                lines.append(line)
            elif line[0] < end and line[1] > start:
                lines.append(Subtitle(max(line[0], start) - start, min(line[1], end) - start, line[2]))
        return lines

    def example(
        self, builder: ExampleBuilder, once: Callable[[Callable[[], Decoded]], Decoded] | None = None
    ) -> Example:
        """What the model reads.

        Args:
            once: see `ExampleBuilder.prompt`.

        Raises:
            UserError: media that are not there or cannot be read, or images and a video together.
        """
        video = read_media(self.video, "video") if isinstance(self.video, Path) else self.video
        return builder.prompt(
            [read_media(image, "image") if isinstance(image, Path) else image for image in self.images],
            video,
            self.question,
            self.style,
            options=self.options or None,
            history=self.history,
            subtitles=self.clipped_subtitles(),
            clip=self.clip,
            sampling=self.sampling,
            once=once,
        )


@dataclass(frozen=True)
class Shown:
    """What of its run's settings a model's answers replace (test-time scaling). None: as in the run.

    Args:
        frames: most frames of a video (data.video.max_frames).
        fps: most frames per second (data.video.max_fps).
        max_crops: tiles of an image, the global view not counted (data.image.max_crops).
        high_res: as many tiles of a single image as training's high resolution has (data.image.high_res_max_crops).

    Raises:
        UserError: a number out of range, or both of the last two.
    """

    frames: int | None = None
    fps: float | None = None
    max_crops: int | None = None
    high_res: bool = field(default=False)

    def __post_init__(self) -> None:
        for option, value in (("--frames", self.frames), ("--max-crops", self.max_crops)):
            if value is not None and value < 1:
                raise UserError(f"{option} {value}: must be at least 1")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise UserError(f"--fps {self.fps}: must be above 0")
        if self.high_res and self.max_crops is not None:
            raise UserError("--high-res and --max-crops both say how many tiles an image has: give one of them")

    def settings(self, run: DataConfig) -> DataConfig:
        """The run's data settings with these in place of its own; the run's stay as they are."""
        image, video = run.image, run.video
        if self.high_res:
            image = dataclasses.replace(image, max_crops=image.high_res_max_crops)
        if self.max_crops is not None:
            image = dataclasses.replace(image, max_crops=self.max_crops)
        if self.frames is not None:
            video = dataclasses.replace(video, max_frames=self.frames)
        if self.fps is not None:
            video = dataclasses.replace(video, max_fps=self.fps)
        return dataclasses.replace(run, image=image, video=video)
