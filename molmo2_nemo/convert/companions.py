"""The files beside the weights that transformers and vLLM expect: tokenizer, processors, chat template, generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from molmo2_nemo.convert.hf_config import code_repository
from molmo2_nemo.convert.names import Format
from molmo2_nemo.convert.preprocessing import IMAGE_FILE, PIXELS, PROCESSOR_FILE, VIDEO_FILE, default_data
from molmo2_nemo.data.config import DataConfig, ImageConfig
from molmo2_nemo.data.prompts import DEMO_STYLES, MC_STYLES
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.model.config import Molmo2Config

# Images first, then the video, then subtitles, then the turns as in training: the end token of an answer is followed
# by the one that opens the next user turn. A text part may carry a style, written before it unless it is one of STYLES.
CHAT_TEMPLATE = """\
{%- set plain_styles = STYLES -%}
{%- set seen = namespace(images=0, videos=0, turns=0) -%}
{%- for message in messages if message['content'] is not string -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{%- set seen.images = seen.images + 1 -%}
{%- elif part['type'] == 'video' -%}{%- set seen.videos = seen.videos + 1 -%}{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{%- for i in range(seen.images) -%}
{%- if seen.images > 1 -%}{{- 'Image ' ~ (i + 1) -}}{%- endif -%}{{- '<|image|>' -}}
{%- endfor -%}
{{- '<|video|>' * seen.videos -}}
{%- for message in messages -%}
{%- set words = namespace(text='') -%}
{%- if message['content'] is string -%}{%- set words.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{%- set prefix = part['style'] ~ ': ' if part['style'] and part['style'] not in plain_styles else '' -%}
{%- set words.text = words.text ~ (' ' if words.text else '') ~ prefix ~ part['text'] -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'subtitle' -%}{{- words.text -}}
{%- elif message['role'] == ('user' if seen.turns % 2 == 0 else 'assistant') -%}
{%- if message['role'] == 'user' -%}
{%- if seen.turns -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{{- '<|im_start|>user\\n' ~ words.text ~ '<|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>assistant\\n' ~ words.text ~ eos_token -}}
{%- endif -%}
{%- set seen.turns = seen.turns + 1 -%}
{%- else -%}
{{- raise_exception('roles must alternate user/assistant, after an optional leading subtitle') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def write_companions(
    folder: Path,
    model_config: Molmo2Config,
    target: Format,
    tokenizer: Molmo2Tokenizer | None,
    data: DataConfig | None = None,
    generation: dict[str, Any] | None = None,
) -> None:
    """Write every file of a Hugging Face folder except config.json and the weights.

    Args:
        tokenizer: the model's; None leaves the tokenizer and generation files out.
        data: image and video settings of the run; None takes the published ones, at the model's crop size.
        generation: content of generation_config.json; None makes it from the tokenizer.
    """
    if data is None:
        data = default_data(model_config)
    files = {
        IMAGE_FILE: image_processor_json(data.image),
        VIDEO_FILE: video_processor_json(data),
        PROCESSOR_FILE: processor_json(data),
    }
    if target == "remote":
        hub = code_repository(model_config)
        names = ("image_processing_molmo2.Molmo2ImageProcessor", "video_processing_molmo2.Molmo2VideoProcessor")
        classes = dict(zip(("AutoImageProcessor", "AutoVideoProcessor"), names, strict=True))
        classes["AutoProcessor"] = "processing_molmo2.Molmo2Processor"
        for content in files.values():
            content["auto_map"] = {auto: f"{hub}--{name}" for auto, name in classes.items()}
    if tokenizer is not None:
        tokenizer.save(folder)
        generation = generation or generation_json(tokenizer, folder / "tokenizer.json")
    if generation is not None:
        files["generation_config.json"] = generation
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    styles = repr(sorted((DEMO_STYLES | MC_STYLES) | {"demo"}))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("STYLES", styles))


def shared_json(image: ImageConfig, pool: int) -> dict[str, Any]:
    """Settings that the image and the video processor share."""
    return {
        "processor_class": "Molmo2Processor",
        "size": {"height": image.crop_size, "width": image.crop_size},
        "patch_size": image.patch_size,
        "pooling_size": [pool, pool],
        **PIXELS,  # all of it: transformers 5 leaves the pixels of videos as they are unless its file says otherwise
    }


def image_processor_json(image: ImageConfig) -> dict[str, Any]:
    """preprocessor_config.json."""
    return shared_json(image, image.pool) | {
        "image_processor_type": "Molmo2ImageProcessor",
        "max_crops": image.max_crops,
        "overlap_margins": [image.margin, image.margin],
    }


def video_processor_json(data: DataConfig) -> dict[str, Any]:
    """video_preprocessor_config.json."""
    return shared_json(data.image, data.video.pool) | {
        "video_processor_type": "Molmo2VideoProcessor",
        "num_frames": data.video.max_frames,
        "max_fps": int(data.video.max_fps) if float(data.video.max_fps).is_integer() else data.video.max_fps,
        "sampling_fps": 2,
        "frame_sample_mode": "uniform_last_frame",
        "do_sample_frames": True,
    }


def processor_json(data: DataConfig) -> dict[str, Any]:
    """processor_config.json: the special tokens around and between visual tokens."""
    return {
        "processor_class": "Molmo2Processor",
        "image_use_col_tokens": True,
        "use_single_crop_col_tokens": False,
        "use_single_crop_start_token": True,
        "video_use_col_tokens": False,
        "use_frame_special_tokens": data.video.frame_tokens,
    }


def generation_json(tokenizer: Molmo2Tokenizer, file: Path) -> dict[str, Any]:
    """generation_config.json; `file` is the saved tokenizer.json. Without a padding token, EOS fills batches."""
    pad = tokenizer.config.get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    pad_id = Tokenizer.from_file(str(file)).token_to_id(pad) if pad else None
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id if pad_id is None else pad_id,
    }
