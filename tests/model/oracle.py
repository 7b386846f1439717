"""Fixtures of transformers' native Molmo2 as our inputs, and our model run on them by Megatron's own schedules."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

from molmo2_nemo.convert.hf_config import read_model_config
from molmo2_nemo.convert.names import external_shapes, rules, to_canonical
from molmo2_nemo.data.collate import collate
from molmo2_nemo.data.example import Example
from molmo2_nemo.model.config import PLAIN, KernelConfig, MemoryConfig, Molmo2Config
from molmo2_nemo.settings.run import RunConfig
from tests.fixtures.weights import fixture_weight

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
SMALL = ("qwen3_tied", "qwen3_tied_odd", "qwen3_untied", "olmo3", "olmo3_gqa")
CASES = ("text", "image", "multi_image", "video")
# Two micro-batches of two rows of packs: alone, packed behind another example, and a row of nothing but padding.
LAYOUT: tuple[list[list[str]], ...] = ([["text", "image"], ["multi_image"]], [["video"], []])
# Molmo2Model's, not Megatron's
OWN = ("z_loss", "residual_dropout", "response_residual_dropout", "seed")
LENGTH = 72  # of a row; the longest has 68 tokens


def fixture_config(name: str) -> Molmo2Config:
    config, _ = read_model_config(FIXTURES / name)
    tied = json.loads((FIXTURES / name / "fixture.json").read_text())["tied"]
    return replace(config, text=replace(config.text, tie_embeddings=tied))


def fixture_weights(name: str, config: Molmo2Config) -> dict[str, torch.Tensor]:
    """Canonical fp32 weights."""
    file = FIXTURES / name / "model.safetensors"
    if file.exists():
        external = {n: t.float() for n, t in safetensors.torch.load_file(file).items()}
    else:
        seed = json.loads((file.parent / "fixture.json").read_text())["seed"]
        shapes = external_shapes(config, "native")
        external = {n: torch.from_numpy(fixture_weight(n, s, seed)) for n, s in shapes.items()}
        if "lm_head.weight" in external:
            table = external["model.language_model.embed_tokens.weight"]
            external["lm_head.weight"] = table[: config.text.vocab_size].clone()
    return to_ours(external, config)


def fixture_grads(name: str, config: Molmo2Config) -> dict[str, torch.Tensor]:
    """Canonical gradients of the loss over all cases; a tied table's is the sum of its two uses."""
    external = safetensors.torch.load_file(FIXTURES / name / "grads.safetensors")
    head = external.pop("lm_head.weight") if config.text.tie_embeddings else None
    grads = to_ours(external, config)
    if head is not None:
        grads["embedding.base.weight"] = grads["embedding.base.weight"] + head
    return grads


def to_ours(external: dict[str, torch.Tensor], config: Molmo2Config) -> dict[str, torch.Tensor]:
    ours: dict[str, torch.Tensor] = {}
    for rule in rules(config, "native"):
        ours |= to_canonical(rule, external, config)
    return ours


def fixture_case(name: str, kind: str) -> dict[str, np.ndarray]:
    arrays = safetensors.numpy.load_file(FIXTURES / name / "cases.safetensors")
    return {n.removeprefix(f"{kind}."): a for n, a in arrays.items() if n.startswith(f"{kind}.")}


def example(name: str, kind: str) -> Example:
    """One case as the data part would have built it; units (a picture with its tiles, a frame) as in make_fixtures."""
    case = fixture_case(name, kind)
    units = {"text": [], "image": [(3, 6 + 12)], "multi_image": [(2, 6 + 9), (3, 6 + 12)], "video": [(1, 4)] * 3}[kind]
    return Example(
        **{n: case[n] for n in ("input_ids", "labels", "loss_weights", "position_ids", "crops", "pooling")},
        branch_ids=np.full(len(case["input_ids"]), -1),
        visual=case["visual"].astype(bool),
        unit_crops=np.asarray([u[0] for u in units], np.int64),
        unit_pooled_tokens=np.asarray([u[1] for u in units], np.int64),
        key=kind,
    )


def micro_batches(name: str, config: Molmo2Config) -> list[Any]:
    from molmo2_nemo.model.inputs import PackInputs

    patch = config.text.vocab_size + 2
    rows = [[[example(name, kind) for kind in row] for row in batch] for batch in LAYOUT]
    return [PackInputs.from_batch(collate(r, sequence_length=LENGTH, im_patch_id=patch)) for r in rows]


def build(
    config: Molmo2Config,
    weights: dict[str, torch.Tensor] | None = None,
    memory: MemoryConfig | None = None,
    kernels: KernelConfig | None = None,
    context: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """This rank's part of the model over the groups that `start_megatron` made; no z-loss or dropout unless asked for.

    Args:
        context: fields of ContextSettings.
        settings: those of OWN go to the model, all others to Megatron's TransformerConfig.
    """
    from megatron.core import parallel_state

    from molmo2_nemo.model.decoder import transformer_config
    from molmo2_nemo.model.init import load_canonical
    from molmo2_nemo.model.molmo2 import Molmo2Model
    from molmo2_nemo.parallel.context import ContextSettings

    own = {k: settings.pop(k) for k in OWN if k in settings}
    seed = own.pop("seed", RunConfig.seed)
    transformer = transformer_config(
        config,
        memory,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        **settings,
    )
    stages = {
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
    }
    model = Molmo2Model(
        config,
        transformer,
        **stages,
        training=replace(PLAIN, **own),
        memory=memory,
        kernels=kernels,
        context=ContextSettings(**(context or {})),
        seed=seed,
    )
    if weights is not None:
        load_canonical(model, weights.__getitem__)
    return model


def run_schedule(model: Any, batches: list[Any], *, backward: bool) -> list[torch.Tensor]:
    """What the last stage returns for every micro-batch, of a loss its sum. With `backward`, `main_grad` holds sums
    over all of them.

    Gradients are reduced by Megatron's own DDP and finalize_model_grads, as in the trainer.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from molmo2_nemo.model.loss import LossSums
    from molmo2_nemo.training.gradients import sum_partial_gradients

    outputs = []

    def loss_func(output: LossSums | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        scored = isinstance(output, LossSums)
        outputs.append(output.loss.detach() if scored else output.detach())
        loss = output.loss if scored else output.sum() * 0
        return loss, torch.zeros((), dtype=torch.int), {"loss": loss.detach()}

    module = model
    if backward:
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
        module = DistributedDataParallel(model.config, settings, model)
        module.zero_grad_buffer()

        def finalize(models: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
            finalize_model_grads(models, **kwargs)
            sum_partial_gradients(models)

        model.config.finalize_model_grads_func = finalize
    get_forward_backward_func()(
        forward_step_func=lambda data, m: (m(next(data)), loss_func),
        data_iterator=iter(batches),
        model=[module],
        num_microbatches=len(batches),
        seq_length=batches[0].input_ids.shape[1],
        micro_batch_size=batches[0].input_ids.shape[0],
        forward_only=not backward,
    )
    return outputs
