"""Ask a trained model: greedy answers from a Megatron checkpoint, on one process.

Every new token runs the whole sequence anew, without a cache: right for trying out small models. To serve a Molmo2,
export it to Hugging Face format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from molmo2_nemo import cpu
from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.example import ROOT_BRANCH, Example
from molmo2_nemo.data.tally import KINDS, counted
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.errors import UserError


def answer(
    checkpoint: str | Path,
    images: list[bytes],
    video: bytes | None,
    question: str,
    *,
    style: str = "user_qa",
    max_new_tokens: int = 128,
    remarks: list[str] | None = None,
) -> str:
    """The model's greedy answer to a question about images or a video.

    Args:
        checkpoint: a Megatron checkpoint, written under any layout; tokenizer and image settings are those of its run.
        images, video: encoded files; at most one of the two.
        style: what kind of answer, as in training annotations.
        remarks: gets what was left out, cut off or replaced of the media.

    Raises:
        UserError: not a Molmo2 checkpoint, or media that cannot be read.
    """
    model, builder, tokenizer = load(Path(checkpoint))
    example = builder.prompt(images, video, question, style)
    if remarks is not None:
        remarks += remarks_on(example, builder.config, said=("truncated",))
    return tokenizer.decode(generate(model, example, tokenizer, max_new_tokens)).strip()


def answer_prompts(checkpoint: Path, prompts: list[dict[str, Any]], max_new_tokens: int) -> Iterator[dict[str, Any]]:
    """Answers to prompts, one after another; the model is loaded once.

    Args:
        prompts: each with `question`, `images`, `video` and `style`, as `answer` takes them, and `reference`: an
            answer, a list of them, or None.

    Raises:
        UserError: media of a prompt cannot be read; names its number.
    """
    model, builder, tokenizer = load(checkpoint)
    for number, prompt in enumerate(prompts, start=1):
        try:
            example = builder.prompt(prompt["images"], prompt["video"], prompt["question"], prompt["style"])
        except UserError as error:
            raise UserError(f"prompt {number}: {error}") from error
        text = tokenizer.decode(generate(model, example, tokenizer, max_new_tokens)).strip()
        yield {
            "key": f"prompt {number}",
            "question": prompt["question"],
            "answer": text,
            "reference": prompt["reference"],
            "remarks": remarks_on(example, builder.config, said=("truncated",)),
        }


def answer_records(checkpoint: Path, shards: str, count: int, max_new_tokens: int) -> Iterator[dict[str, Any]]:
    """Answers to the first turn of a data set's records, formatted as in training, but with fixed wording.

    Raises:
        DataError: no shards there. A record that cannot be used is left out and reported.
    """
    from molmo2_nemo.data.config import SourceConfig
    from molmo2_nemo.data.reader import ExampleReader, Skipped

    model, builder, tokenizer = load(checkpoint)
    config = dataclasses.replace(
        builder.config, sources={"records": SourceConfig(path=shards)}, groups={}, missing="error", progression=[]
    )
    reader = ExampleReader(config, builder, tokenizer.special.im_patch)
    for number in range(min(count, len(reader.datasets["records"]))):
        example = reader[number]
        if isinstance(example, Skipped):
            print(f"{example.key}: left out, {example.cause}: {example.detail}")
            continue
        if example.info.get("raw_text"):
            print(f"{example.key}: left out, raw text asks nothing")
            continue
        prompt, reference = first_turn(example)
        words = [i for i, visual in zip(prompt.input_ids.tolist(), prompt.visual.tolist(), strict=True) if not visual]
        yield {
            "key": example.key,
            "question": tokenizer.decode(words, skip_special=True).strip(),
            "answer": tokenizer.decode(generate(model, prompt, tokenizer, max_new_tokens)).strip(),
            "reference": tokenizer.decode(reference, skip_special=True).strip(),
            "remarks": remarks_on(example, builder.config),
        }


def remarks_on(example: Example, config: DataConfig, said: Sequence[str] = ()) -> list[str]:
    """What was left out, cut off or replaced of an example's media, in words; `said`: kinds that were said before, with
    the files' names."""
    return [f"{n:,} {KINDS[kind].said(config)}" for kind, n in counted(example.info).items() if kind not in said]


def first_turn(example: Example) -> tuple[Example, list[int]]:
    """A training example up to its first answer, and the tokens of that answer, the end token included."""
    scored = example.loss_weights > 0
    start = int(scored.argmax())  # labels are shifted: this token is the last before the answer
    end = start + int((~scored[start:]).argmax()) if not scored[start:].all() else len(scored)
    same = [i for i in range(start, end) if example.branch_ids[i] in (example.branch_ids[start], ROOT_BRANCH)]
    cut = {
        name: getattr(example, name)[: start + 1]
        for name in ("input_ids", "labels", "loss_weights", "position_ids", "branch_ids", "visual")
    }
    return dataclasses.replace(example, **cut), example.labels[same].tolist()


def load(checkpoint: Path) -> tuple[Any, ExampleBuilder, Molmo2Tokenizer]:
    """Model in evaluation mode, example builder and tokenizer of a checkpoint."""
    from molmo2_nemo.convert.checkpoints import find_tokenizer, model_of, run_settings
    from molmo2_nemo.convert.megatron_io import MegatronCheckpoint

    tensors = MegatronCheckpoint(checkpoint)
    run = run_settings(checkpoint)
    model_config = model_of(checkpoint, tensors, run)
    tensors.check(model_config)
    tokenizer = find_tokenizer(checkpoint, model_config, run, None)
    if tokenizer is None:
        raise UserError(f"{checkpoint}: no tokenizer found; put tokenizer.json into {checkpoint / 'tokenizer'}")
    data = trained_data(checkpoint, model_config, run)
    return build_model(model_config, tensors), ExampleBuilder(data, tokenizer, training=False), tokenizer


def trained_data(checkpoint: Path, model_config: Any, run: dict[str, Any]) -> DataConfig:
    """How a checkpoint's run read its data, with the wordings that the run's folder has a copy of.

    Args:
        run: from `run_settings`.
    """
    from molmo2_nemo.convert.checkpoints import data_of
    from molmo2_nemo.rundir.config_file import run_of_checkpoint, use_kept_templates

    data = data_settings(run) or data_of(checkpoint, model_config, run)
    stage = run_of_checkpoint(checkpoint)
    if stage is not None:
        use_kept_templates(data.text, stage.resolve().parent)
    return data


def data_settings(run: dict[str, Any]) -> DataConfig | None:
    """The data settings of a run's config.yaml; None where there are none."""
    from molmo2_nemo.settings.schema import structure

    return structure(DataConfig, run["data"]) if run.get("data") else None


def build_model(model_config: Any, tensors: Any) -> Any:
    """A Molmo2Model on this process alone, filled from a checkpoint."""
    start_single_process()
    import torch

    from molmo2_nemo.model.decoder import transformer_config
    from molmo2_nemo.model.init import load_canonical
    from molmo2_nemo.model.molmo2 import Molmo2Model

    dtype = torch.float32 if cpu.is_cpu_only() else torch.bfloat16
    config = transformer_config(model_config, params_dtype=dtype, use_cpu_initialization=cpu.is_cpu_only())
    model = Molmo2Model(model_config, config, seed=None)
    load_canonical(model, tensors.read)
    return model.eval() if cpu.is_cpu_only() else model.cuda().eval()


def start_single_process() -> None:
    """Process groups of size one, unless this process already has groups."""
    cpu.enable()
    import torch.distributed as dist
    from megatron.core import parallel_state

    cpu.enable_megatron()
    if not dist.is_initialized():
        backend = "gloo" if cpu.is_cpu_only() else "nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(0)


def generate(model: Any, example: Example, tokenizer: Molmo2Tokenizer, max_new_tokens: int) -> list[int]:
    """Greedy continuation of a prompt, up to the end-of-sequence token (left out)."""
    import torch

    from molmo2_nemo.data.collate import collate
    from molmo2_nemo.model.inputs import PackInputs

    device = "cpu" if cpu.is_cpu_only() else torch.device("cuda", torch.cuda.current_device())
    new: list[int] = []
    with torch.no_grad():
        while len(new) < max_new_tokens:
            longer = extend(example, new)
            batch = collate([[longer]], sequence_length=longer.num_tokens, im_patch_id=tokenizer.special.im_patch)
            inputs = PackInputs.from_batch(batch, device)
            inputs.labels = inputs.loss_weights = None
            token = int(model(inputs)[0, -1, : model.model_config.text.vocab_size].argmax())
            if token == tokenizer.eos_id:
                break
            new.append(token)
    return new


def extend(example: Example, new: list[int]) -> Example:
    """The prompt with generated tokens behind it."""
    count = len(new)
    following = int(example.position_ids[-1]) + 1

    def grown(values: np.ndarray, tail: Any) -> np.ndarray:
        return np.concatenate([values, np.asarray(tail, dtype=values.dtype)])

    return Example(
        input_ids=grown(example.input_ids, new),
        labels=grown(example.labels, [-1] * count),
        loss_weights=grown(example.loss_weights, [0.0] * count),
        position_ids=grown(example.position_ids, range(following, following + count)),
        branch_ids=grown(example.branch_ids, [example.branch_ids[-1]] * count),
        visual=grown(example.visual, [False] * count),
        crops=example.crops,
        pooling=example.pooling,
        unit_crops=example.unit_crops,
        unit_pooled_tokens=example.unit_pooled_tokens,
        key=example.key,
    )
