"""A needle in a haystack: where it lies in a film so that it is sampled, the film's bytes, and what is asked.

The film has as many frames a second as the model samples (`data.video.max_fps`), and one frame fewer than the haystack
is long, because the end of a film is sampled, too: a haystack of N frames is N sampled frames. Where the model samples
fewer (`data.video.max_frames`), the needle is at a sampled frame, and shown up to the next one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from molmo2_nemo.data.config import VideoConfig
from molmo2_nemo.data.video.sampling import TimeSampler
from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.needles.haystack import EARLY, FILLERS, drawn_scenes, encode, film_scenes
from molmo2_nemo.evaluation.needles.pictures import ANSWERS, QUESTIONS, NeedlePicture

WORDS = ("apple", "boat", "cake", "drum", "egg", "fish", "goat", "horse", "kite", "lamp")  # in no `FILLERS`
TEXT_KIND = "word"  # the needle that is a sentence
TEXT_QUESTION = "What is the secret word?"
LEAST_FRAMES = 3
LINE_EVERY = 8  # frames of a haystack to one line of subtitles


@dataclass(frozen=True)
class Place:
    """Where a needle lies."""

    sampled: int  # which of the sampled frames shows it, from 0
    shown: tuple[int, int]  # the film's frames that show it: first, and one behind the last
    of: int  # sampled frames
    film_frames: int

    @classmethod
    def at(cls, depth: float, frames: int, video: VideoConfig) -> Place:
        """The sampled frame nearest to a depth: 0 the first, 1 the last but one (the last shows the same frame).

        Args:
            frames: of the haystack.

        Raises:
            UserError: too few frames for a needle, or a depth that is none.
        """
        if frames < LEAST_FRAMES:
            raise UserError(f"a haystack of {frames} frames: a needle needs at least {LEAST_FRAMES}")
        if not 0 <= depth <= 1:
            raise UserError(f"a needle at depth {depth}: expected 0 (first frame) to 1 (last)")
        film = frames - 1
        times = TimeSampler.of(video, {}, video.max_fps)(film / video.max_fps - EARLY)
        numbers = np.minimum(np.floor((times + EARLY) * video.max_fps).astype(int), film - 1)
        apart = np.unique(numbers)
        sampled = round(depth * (len(apart) - 1))
        end = apart[sampled + 1] if sampled + 1 < len(apart) else film
        return cls(sampled, (int(apart[sampled]), int(end)), len(times), film)


@dataclass(frozen=True)
class Needle:
    """A film with a picture at one depth, and its subtitles with a sentence at another; made from a seed alone."""

    seed: int
    frames: int  # of the haystack
    depth: float  # of the picture, 0 to 1
    text_depth: float | None = None  # of the sentence; None: no subtitles

    @property
    def picture(self) -> NeedlePicture:
        return NeedlePicture.drawn(self._rng(0))

    def place(self, video: VideoConfig) -> Place:
        return Place.at(self.depth, self.frames, video)

    def film(self, video: VideoConfig, haystack: bytes | None = None) -> bytes:
        """The film, an mp4.

        Args:
            video: how the model samples it.
            haystack: a film to hide the picture in; default: drawn scenes.

        Raises:
            UserError, DataError: see `Place.at` and `film_scenes`.
        """
        place = self.place(video)
        count = place.film_frames
        scenes = drawn_scenes(count, self._rng(1)) if haystack is None else film_scenes(haystack, count)
        return encode(self._with_picture(scenes, place), video.max_fps)

    def _with_picture(self, scenes: Iterator[np.ndarray], place: Place) -> Iterator[np.ndarray]:
        needle = self.picture.pixels()
        for number, frame in enumerate(scenes):
            yield needle if place.shown[0] <= number < place.shown[1] else frame

    @property
    def word(self) -> str:
        """What the sentence says."""
        return str(self._rng(2).choice(WORDS))

    def subtitles(self, video: VideoConfig) -> list[tuple[float, float, str]]:
        """A line for every `LINE_EVERY` frames: start and end in seconds, text; one of them the needle's."""
        if self.text_depth is None:
            return []
        rng, length = self._rng(3), LINE_EVERY / video.max_fps
        heard = Place.at(self.text_depth, self.frames, video).shown[0] / video.max_fps  # at a sampled frame
        count = -(-self.frames // LINE_EVERY)
        texts = [str(text) for text in rng.choice(FILLERS, count)]
        texts[int(heard / length)] = f"The secret word is {self.word}."
        return [(n * length, (n + 1) * length, text) for n, text in enumerate(texts)]

    def questions(self) -> dict[str, tuple[str, str]]:
        """Kind -> question and answer."""
        picture = self.picture
        asked = {kind: (question, picture.colours[kind]) for kind, question in QUESTIONS.items()}
        return asked if self.text_depth is None else asked | {TEXT_KIND: (TEXT_QUESTION, self.word)}

    def _rng(self, part: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, part])


def chance(kind: str) -> float:
    """The accuracy of guessing."""
    return 1 / len(WORDS if kind == TEXT_KIND else ANSWERS)
