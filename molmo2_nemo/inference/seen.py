"""Media that several questions are about: decoded once, as long as the questions come one after another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo2_nemo.data.build import Decoded
from molmo2_nemo.data.example import Example
from molmo2_nemo.inference.prompt import Prompt

if TYPE_CHECKING:
    from collections.abc import Callable

    from molmo2_nemo.data.build import ExampleBuilder


@dataclass
class SeenMedia:
    """Makes examples of prompts, and keeps the crops of the media decoded last for further prompts that show the same,
    in the same way. Their examples share one array, which nothing may write to."""

    decoded: int = 0  # times
    reused: int = 0  # prompts that needed no decoding
    _shown: Any = None  # what the crops are of, and how it is shown
    _kept: Decoded | None = None

    def example(self, prompt: Prompt, builder: ExampleBuilder) -> Example:
        """What the model reads of a prompt; errors are those of `Prompt.example`."""
        if not prompt.images and prompt.video is None:
            return prompt.example(builder)
        config = builder.config
        media = [named(one) for one in (*prompt.images, *([] if prompt.video is None else [prompt.video]))]
        shown = (media, prompt.video is None, prompt.clip, prompt.sampling, config.image, config.video, config.limits)

        def once(decode: Callable[[], Decoded]) -> Decoded:
            if self._kept is not None and shown == self._shown:
                self.reused += 1
                return self._kept
            self._shown = self._kept = None  # one medium is held at a time
            self._kept = decode()
            self._shown = shown
            self.decoded += 1
            return self._kept

        return prompt.example(builder, once)


def named(one: bytes | Path | None) -> Any:
    """What is equal where a medium is: its bytes, or a file with its time and size."""
    if not isinstance(one, Path) or not one.exists():
        return one
    stat = one.stat()
    return one, stat.st_mtime_ns, stat.st_size
