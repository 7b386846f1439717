"""An exported folder in transformers 5, asked as `molmo2 ask` asks its checkpoint: what the adapters share.

Frames of a video are chosen and decoded here, as in training: transformers' own video processor takes others (evenly
spaced numbers, without the end; docs/conversion.md). Pictures, tokens and answers are transformers'.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo2_nemo.adapters.messages import Asked
from molmo2_nemo.data.config import VideoConfig
from molmo2_nemo.data.video.read import read_video
from molmo2_nemo.errors import UserError, nearest

MAX_NEW_TOKENS = 1024  # where a task does not say
GENERATION = ("max_new_tokens", "temperature", "top_p", "num_beams")  # what of a task's settings is followed
ARGUMENTS = ("device", "dtype", "attention", "style", "max_frames", "max_fps", "max_crops")


@dataclass(frozen=True)
class Answer:
    """A generated answer."""

    text: str
    tokens: int  # the end token not counted


class Exported:
    """A model that `molmo2 convert export` wrote, in either format.

    Args:
        folder: the exported folder.
        device: default: the first GPU, else the CPU.
        dtype: a name of torch's; default: as stored.
        attention: transformers' `attn_implementation`.
        style: written before every question, such as "vqa2: "; a style of the training data.
        max_frames, max_fps: of a video; default: as exported.
        max_crops: tiles of an image, the global view not counted; default: as exported.

    Raises:
        UserError: no such folder, no Molmo2 in it, or a transformers that has none of its own.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        device: str | None = None,
        dtype: str = "auto",
        attention: str | None = None,
        style: str | None = None,
        max_frames: int | None = None,
        max_fps: float | None = None,
        max_crops: int | None = None,
    ) -> None:
        transformers = checked(Path(folder))
        import torch

        self.style = style
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        attention_is = {"attn_implementation": attention} if attention else {}
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, **attention_is)
        self.model = model.to(self.device).eval()
        if max_crops is not None:
            self.processor.image_processor.max_crops = int(max_crops)
        films = self.processor.video_processor
        self.side = int(films.size["height"])
        self.video = VideoConfig(int(max_frames or films.num_frames), float(max_fps or films.max_fps))

    def answers(self, asked: Sequence[Asked], generation: Mapping[str, Any] | None = None) -> list[Answer]:
        """Answers to questions that are worked on together, in their order; greedy unless a temperature is given.

        Args:
            generation: `max_new_tokens`, `temperature`, `top_p`, `num_beams`, and `until`: a text, or several, at
                which answers end.

        Raises:
            DataError: a video that cannot be read.
        """
        import torch

        generation = generation or {}
        inputs = self.inputs(asked).to(self.device, self.model.dtype)
        with torch.inference_mode():
            made = self.model.generate(**inputs, **generation_settings(generation))
        rows = made[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._answer(row, ends_of(generation)) for row in rows]

    def inputs(self, asked: Sequence[Asked]) -> Any:
        """What the model reads, padded on the left."""
        images = [opened(image) for one in asked for image in one.images]
        films = [self._film(one) for one in asked if one.video is not None]
        visual: dict[str, Any] = {"images": images} if images else {}
        if films:
            visual |= {"videos": [frames for frames, _ in films], "video_metadata": [times for _, times in films]}
            visual["do_sample_frames"] = False
        return self.processor(
            text=[self.prompt(one) for one in asked],
            padding=len(asked) > 1,
            padding_side="left",
            return_tensors="pt",
            **visual,
        )

    def prompt(self, asked: Asked) -> str:
        """The text of one conversation, with placeholders for what is shown."""
        shown = [{"type": "image"} for _ in asked.images] + [{"type": "video"}] * (asked.video is not None)
        messages: list[dict[str, Any]] = []
        for question, answer in (*asked.history, (asked.question, None)):
            text = f"{self.style}: {question}" if self.style else question
            content = [*(shown if not messages else []), {"type": "text", "text": text}]
            messages.append({"role": "user", "content": content})
            if answer is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return str(self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _film(self, asked: Asked) -> tuple[Any, Any]:
        """Frames uint8 [C, 3, side, side], and when they are shown, as transformers wants to be told."""
        import torch
        from transformers.video_utils import VideoMetadata

        assert asked.video is not None
        film = read_video(asked.video, self.video, side=self.side, clip=asked.clip)
        frames = torch.from_numpy(film.frames).permute(0, 3, 1, 2).contiguous()
        # numbers of frames divided by a rate are the times that are written: at a rate of 1 the numbers are the times
        return frames, VideoMetadata(total_num_frames=len(frames), fps=1.0, frames_indices=film.times.tolist())

    def _answer(self, tokens: list[int], ends: Iterable[str]) -> Answer:
        ended = self.model.generation_config.eos_token_id
        ended = [ended] if isinstance(ended, int) else list(ended or [])
        count = next((i for i, token in enumerate(tokens) if token in ended), len(tokens))
        text = self.processor.tokenizer.decode(tokens[:count], skip_special_tokens=True)
        for end in ends:
            text = text.split(end)[0]
        return Answer(text.strip(), count)


def checked(folder: Path) -> Any:
    """transformers, once it is known that it can load the folder."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json there; name a folder that `molmo2 convert export` wrote")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: no tokenizer.json there; export again from a checkpoint whose tokenizer is known")
    import transformers

    if not hasattr(transformers, "Molmo2ForConditionalGeneration"):
        raise UserError(
            f"transformers {transformers.__version__} has no Molmo2 of its own; install a newer one (5.24.0 was tried)"
        )
    return transformers


def known_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `Exported` from the text that frameworks hand over.

    Raises:
        UserError: an unknown one.
    """
    for name in given:
        if name not in ARGUMENTS:
            raise UserError(f"unknown model argument {name!r}: {nearest(name, ARGUMENTS)}")
    return {name: value for name, value in given.items() if value is not None}


def split_words(text: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """`FOLDER,KEY=VALUE,...`: the folder, generation settings, and arguments of `Exported`.

    Raises:
        UserError: an unknown key, or one without a value.
    """
    folder, *options = text.split(",")
    found: dict[str, Any] = {}
    for option in options:
        name, _, value = option.partition("=")
        if not value:
            raise UserError(f"{option!r} behind the folder: expected KEY=VALUE")
        found[name] = float(value) if "." in value else int(value) if value.isdecimal() else value
    generation = {name: found.pop(name) for name in GENERATION if name in found}
    return folder, generation, known_arguments(found)


def generation_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' settings of a task's: greedy where it asks for no temperature."""
    found = {"max_new_tokens": MAX_NEW_TOKENS} | {n: given[n] for n in GENERATION if given.get(n) is not None}
    found["do_sample"] = float(found.get("temperature", 0)) > 0
    if not found["do_sample"]:
        found = {name: value for name, value in found.items() if name not in ("temperature", "top_p")}
    return found


def ends_of(given: Mapping[str, Any]) -> list[str]:
    """The texts at which a task wants answers to end."""
    until = given.get("until") or []
    return [end for end in ([until] if isinstance(until, str) else until) if end]


def opened(image: Any) -> Any:
    """A PIL image in RGB, upright as its EXIF data say."""
    from PIL import Image, ImageOps

    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image).convert("RGB")
    from transformers.image_utils import load_image

    return load_image(str(image)).convert("RGB")
