"""Which times of a clip are sampled, in seconds from its start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from molmo2_nemo.data.config import VideoConfig
from molmo2_nemo.errors import UserError

FPS_MODE = "fps"
FPS_KEYS = ("sampling_fps", "candidate_sampling_fps")  # read in this mode only


@dataclass(frozen=True)
class TimeSampler:
    """The sampling times of a clip of a given duration.

    `uniform_last_frame`: every 1/max_fps seconds, and the end itself; if these are more than `max_frames`, then
    `max_frames` times spread evenly from start to end. `fps`: the largest of the ascending `candidate_fps` at which
    `max_frames` frames still span the clip; if none does, the first, which truncates the clip.
    """

    max_frames: int
    max_fps: float = 2.0
    mode: str = "uniform_last_frame"
    candidate_fps: tuple[float, ...] = (1.0,)

    @classmethod
    def of(cls, config: VideoConfig, sampling: Mapping[str, Any], video_fps: float) -> TimeSampler:
        """Settings of the run, overridden by a record's `sampling`.

        Keys: `mode` (or `frame_sample_mode`), `candidate_sampling_fps`, `sampling_fps`, `max_fps`, `max_frames`.
        Without candidates, `fps` tries the multiples of `sampling_fps` up to 10 that divide the video's own rate,
        rounded; where there is none, `sampling_fps` itself. (The released code refuses films whose rate it does not
        divide.)
        """
        mode = str(sampling.get("mode", sampling.get("frame_sample_mode", "uniform_last_frame")))
        wanted = sampling.get("candidate_sampling_fps")
        if not wanted:
            step = int(sampling.get("sampling_fps") or 1)
            own = round(video_fps)
            wanted = [rate for rate in range(step, 11, step) if own and own % rate == 0] or [step]
        frames = min(int(sampling.get("max_frames", config.max_frames)), config.max_frames)
        rates = tuple(sorted(float(rate) for rate in wanted))
        return cls(frames, float(sampling.get("max_fps", config.max_fps)), mode, rates)

    def __call__(self, duration: float) -> np.ndarray:
        """Seconds from the clip's start: float64 [n], 1 <= n <= max_frames."""
        if self.max_frames < 1 or self.max_fps <= 0 or min(self.candidate_fps) <= 0:
            raise UserError(f"video sampling needs max_frames >= 1 and rates > 0, got {self}")
        if self.mode == "uniform_last_frame":
            if (self.max_frames - 1) / self.max_fps < duration:
                return np.linspace(0, duration, self.max_frames, endpoint=True, dtype=np.float64)
            return np.concatenate([np.arange(0, duration, 1 / self.max_fps), [duration]]).astype(np.float64)
        if self.mode == "fps":
            rate = self.candidate_fps[0]
            for candidate in self.candidate_fps:
                if self.max_frames / candidate < duration:
                    break
                rate = candidate
            times = np.arange(self.max_frames, dtype=np.float64) / rate
            return times[times < duration] if duration > 0 else times[:1]
        raise UserError(f"unknown video sampling mode {self.mode!r}; known: uniform_last_frame, fps")


def film_lost(config: VideoConfig, sampling: Mapping[str, Any], video_fps: float, duration: float) -> str | None:
    """What the run's `max_frames` takes from a clip of that duration, as a kind of tally.py: frames at the wanted rate,
    or its end. Nothing where the record itself wants no more frames."""
    if sampling.get("max_frames", config.max_frames + 1) <= config.max_frames:
        return None
    sampler = TimeSampler.of(config, sampling, video_fps)
    if sampler.mode == "uniform_last_frame":
        return "films_thinned" if (sampler.max_frames - 1) / sampler.max_fps < duration else None
    return "films_cut" if sampler.max_frames / sampler.candidate_fps[0] < duration else None


def repeats_frames(config: VideoConfig, sampling: Mapping[str, Any], video_fps: float, duration: float) -> bool:
    """Whether more frames a second are shown than the film has, so that frames are shown several times."""
    if not video_fps:
        return False
    times = TimeSampler.of(config, sampling, video_fps)(duration)
    return len(times) > 2 and float(times[1] - times[0]) < 0.98 / video_fps


def unread_keys(sampling: Mapping[str, Any]) -> dict[str, str]:
    """The keys of a record's `sampling` that `TimeSampler` does not use, each with the reason."""
    unread: dict[str, str] = {}
    if "mode" in sampling and "frame_sample_mode" in sampling:
        unread["frame_sample_mode"] = "mode says it already"
    mode = str(sampling.get("mode", sampling.get("frame_sample_mode", "uniform_last_frame")))
    if mode == FPS_MODE and "max_fps" in sampling:
        unread["max_fps"] = "the mode fps takes sampling_fps or candidate_sampling_fps"
    if mode == FPS_MODE and sampling.get("candidate_sampling_fps") and "sampling_fps" in sampling:
        unread["sampling_fps"] = "candidate_sampling_fps takes its place"
    if mode != FPS_MODE:
        why = f"the mode {mode} takes max_fps; only the mode fps takes this"
        unread |= {name: why for name in FPS_KEYS if name in sampling}
    return unread
