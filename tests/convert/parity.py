"""Jobs for the worker pool: the real model on transformers' fixtures. Called by test_parity.py and test_layouts.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

from molmo2_nemo.convert.checkpoints import read_model_file
from molmo2_nemo.convert.names import rules, to_canonical
from molmo2_nemo.inference.prompt import Prompt
from molmo2_nemo.model.config import Molmo2Config
from tests.support.pool import start_megatron

CASES = ("text", "image", "multi_image", "video")
# Indivisible vision units of each case, as make_fixtures.py lays them out: crops and pooled tokens.
UNITS = {"text": ([], []), "image": ([3], [18]), "multi_image": ([2, 3], [15, 18]), "video": ([1, 1, 1], [4, 4, 4])}


def load_model(checkpoint: Path, dtype: torch.dtype = torch.float32, **parallel: int) -> Any:
    """An imported checkpoint as a Megatron model without z-loss. Needs initialised process groups."""
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as ps

    from molmo2_nemo.model.decoder import transformer_config
    from molmo2_nemo.model.molmo2 import Molmo2Model

    molmo2 = read_model_file(checkpoint)
    assert molmo2 is not None
    config = transformer_config(molmo2, params_dtype=dtype, pipeline_dtype=dtype, **parallel)
    first, last = ps.is_pipeline_first_stage(), ps.is_pipeline_last_stage()
    model = Molmo2Model(molmo2, config, pre_process=first, post_process=last, seed=None)
    state = dist_checkpointing.load(model.sharded_state_dict(prefix="module."), str(checkpoint / "weights"))
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    return model.eval()


def relayout(source: Path, target: Path, dtype: torch.dtype, tensor: int, pipeline: int) -> None:
    """Job: load a checkpoint into the model under one layout and save it again."""
    from megatron.core import dist_checkpointing

    start_megatron(tensor, pipeline=pipeline)
    model = load_model(source, dtype, tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    if torch.distributed.get_rank() == 0:
        target.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(model.sharded_state_dict(prefix="module."), str(target))
    torch.distributed.barrier()


def sharded_logits(checkpoint: Path, fixture: Path, tensor: int, context: int) -> dict[str, torch.Tensor]:
    """Job: this rank's logits [T, V_padded / TP] of every case; packs are padded to a multiple of 8 tokens."""
    start_megatron(tensor, context)
    model = load_model(checkpoint, tensor_model_parallel_size=tensor, context_parallel_size=context)
    vocab = model.model_config.text.vocab_size
    parts = {}
    for kind, case in read_cases(fixture).items():
        with torch.no_grad():
            parts[kind] = model(case_inputs(case, kind, vocab, scored=False, multiple=8))[0].clone()
    return parts


def greedy(checkpoint: Path) -> list[int]:
    """Job: the first greedy tokens of an imported model's answer about picture(200, 120)."""
    import io

    from PIL import Image

    from molmo2_nemo.inference.engine import Generator
    from molmo2_nemo.inference.load import load
    from molmo2_nemo.inference.sampling import Sampling
    from tests.fixtures.pictures import picture

    start_megatron()
    stream = io.BytesIO()
    Image.fromarray(picture(200, 120)).save(stream, "PNG")
    model, builder, tokenizer = load(checkpoint)
    prompt = builder.prompt([stream.getvalue()], None, "What is it?", "user_qa")
    (completion,) = Generator(model, tokenizer).complete([prompt], Sampling(8))
    return completion.tokens


def answered(checkpoint: Path, prompts: Sequence[Prompt], tokens: int) -> list[dict[str, list[int]]]:
    """Job: `prompt` and greedy `answer` of an imported model as token ids, the end token included."""
    from molmo2_nemo.inference.engine import END, Generator
    from molmo2_nemo.inference.generate import load
    from molmo2_nemo.inference.sampling import Sampling

    start_megatron()
    model, builder, tokenizer = load(checkpoint)
    found = []
    for prompt in prompts:
        example = builder.prompt(prompt.images, prompt.video, prompt.question, prompt.style)
        (done,) = Generator(model, tokenizer).complete([example], Sampling(tokens))
        end = [tokenizer.eos_id] if done.ended == END else []
        found.append({"prompt": example.input_ids.tolist(), "answer": done.tokens + end})
    return found


def read_cases(fixture: Path) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of every case (see make_fixtures.py)."""
    arrays = safetensors.numpy.load_file(fixture / "cases.safetensors")
    return {k: {n.split(".", 1)[1]: v for n, v in arrays.items() if n.startswith(f"{k}.")} for k in CASES}


def case_inputs(case: dict[str, np.ndarray], kind: str, vocab_size: int, scored: bool, multiple: int = 1) -> Any:
    """One case as a micro-batch of one pack, padded to a multiple of tokens."""
    from molmo2_nemo.model.inputs import PackInputs

    pad = -len(case["input_ids"]) % multiple

    def tokens(values: np.ndarray, fill: int) -> torch.Tensor:
        return torch.from_numpy(np.pad(values, (0, pad), constant_values=fill))[None]

    ids = tokens(case["input_ids"], -1)
    crops, rows = UNITS[kind]
    return PackInputs(
        input_ids=ids,
        position_ids=tokens(case["position_ids"], 0),
        example_ids=torch.where(ids < 0, -1, 0),
        branch_ids=torch.full_like(ids, -1),
        visual=tokens(case["visual"], 0).bool(),
        crops=torch.from_numpy(case["crops"]),
        pooling=torch.from_numpy(case["pooling"]),
        pooled_positions=(ids[0] == vocab_size + 2).nonzero()[:, 0],
        unit_crops=torch.tensor(crops, dtype=torch.int64),
        unit_pooled_tokens=torch.tensor(rows, dtype=torch.int64),
        labels=tokens(case["labels"], -1) if scored else None,
        loss_weights=tokens(case["loss_weights"], 0) if scored else None,
    )


def compare(checkpoint: Path, fixture: Path) -> dict[str, float]:
    """Job: largest differences between the model in one process and a fixture.

    Returns:
        logits: largest absolute difference; loss: largest difference of a case's part of the loss; gradient: largest
        relative (L2) difference of a parameter's gradient; noise: largest gradient norm of a key bias, which has none
        but for rounding, relative to the largest of all parameters.
    """
    start_megatron()
    model = load_model(checkpoint)
    vocab, cases = model.model_config.text.vocab_size, read_cases(fixture)
    total = sum(float(case["loss_weights"].sum()) for case in cases.values())
    worst = {"logits": 0.0, "loss": 0.0}
    for kind, case in cases.items():
        with torch.no_grad():
            logits = model(case_inputs(case, kind, vocab, scored=False))[0, case["logit_positions"], :vocab]
        worst["logits"] = max(worst["logits"], float((logits - torch.from_numpy(case["logits"])).abs().max()))
        part = model(case_inputs(case, kind, vocab, scored=True)).loss / total
        part.backward()
        expected = float((case["loss_weights"] * case["token_loss"]).sum()) / total
        worst["loss"] = max(worst["loss"], abs(float(part.detach()) - expected))
    return worst | gradient_difference(model, fixture)


def gradient_difference(model: Any, fixture: Path) -> dict[str, float]:
    """`gradient` and `noise` of `compare`; every parameter must have a gradient."""
    stored = safetensors.torch.load_file(fixture / "grads.safetensors")
    expected = canonical_gradients(model.model_config, stored)
    largest = max(float(grad.norm()) for grad in expected.values())
    worst, noise = 0.0, 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grad = expected.pop(name)
        if name.endswith("k_proj.bias"):
            noise = max(noise, float(parameter.grad.norm()) / largest)
        else:
            worst = max(worst, float((parameter.grad[: len(grad)] - grad).norm() / grad.norm()))
    assert not expected, sorted(expected)
    return {"gradient": worst, "noise": noise}


def canonical_gradients(config: Molmo2Config, native: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A fixture's gradients under canonical names; a tied table has two natively, which add up."""
    gradients: dict[str, torch.Tensor] = {}
    for rule in rules(config, "native"):
        ours = to_canonical(replace(rule, head=None), {name: native[name] for name in rule.external}, config)
        if rule.head:
            ours["embedding.base.weight"] = ours["embedding.base.weight"] + native[rule.head]
        gradients |= ours
    return gradients
