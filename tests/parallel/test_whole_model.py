"""A whole model whose packs eight ranks share, against one process: the loss and every gradient.

The layouts that train (tests/nemo/test_layouts.py) are limited to four processes with NeMo; these have Megatron-core
only, imported once and forked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from molmo2_nemo.model.config import TrainingOptions
from molmo2_nemo.settings.run import RunConfig
from tests.support.light import run_light

torch.set_num_threads(1)
LAYOUTS: dict[str, dict[str, Any]] = {
    "8 x 1": {"ulysses": 8},
    "4 x 2, ring": {"ulysses": 4, "cp_comm_type": "ring"},
    "2 x 4, balanced": {"ulysses": 2, "cp_comm_type": "ring"},
}
KEY_HEADS = (8, 2)
Z_LOSS = TrainingOptions(z_loss=1e-4, residual_dropout=0.0, response_residual_dropout=0.0)


def model_job(packs: list[Any], layouts: dict[str, dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Per layout and number of key heads, for every pack: the loss and the gradients of all ranks together."""
    import torch.distributed as dist

    from molmo2_nemo import cpu
    from tests.support.pool import start_megatron

    cpu.enable(threads=1)
    cpu.enable_megatron()
    from molmo2_nemo.model.config import Trainable, preset
    from molmo2_nemo.model.decoder import transformer_config
    from molmo2_nemo.model.molmo2 import Molmo2Model
    from molmo2_nemo.parallel.context import ContextSettings
    from molmo2_nemo.training.step import MicroBatches
    from molmo2_nemo.training.step_statistics import Tasks

    ranks, tiny = dist.get_world_size(), preset("tiny")
    start_megatron(context=ranks)
    vision = replace(tiny.vision, hidden_size=32, num_heads=2, ffn_size=64, num_layers=3, feature_layers=(-1, -2))
    found = {}
    for name, context in layouts.items():
        for key_heads in KEY_HEADS:
            text = replace(tiny.text, num_layers=2, hidden_size=64, num_heads=8, num_kv_heads=key_heads, head_dim=16)
            config = replace(tiny, vision=vision, text=text)
            settings = transformer_config(config, use_cpu_initialization=True, context_parallel_size=ranks)
            model = Molmo2Model(
                config, settings, training=Z_LOSS, context=ContextSettings(**context), seed=RunConfig.seed
            )
            takes = MicroBatches(
                config,
                Trainable(*(True for _ in Trainable.__dataclass_fields__)),
                model.groups,
                Tasks({}),
                cut_padding=False,
                sequence_parallel=False,
                plan=model.plan,
                balance_ring="balanced" in name,
            )
            each = []
            for batch in packs:
                model.zero_grad()
                inputs = takes.made(batch).inputs
                other_order = inputs.in_pack_order is not None and inputs.in_pack_order.order is not None
                assert other_order == ("balanced" in name)
                loss = model(inputs).loss
                loss.backward()
                parts = {"loss": loss.detach()}
                for key, parameter in model.named_parameters():
                    parts[key] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                flat = torch.cat([part.flatten() for part in parts.values()])
                dist.all_reduce(flat)
                pieces = flat.split([part.numel() for part in parts.values()])
                each.append({key: piece.view_as(parts[key]) for key, piece in zip(parts, pieces, strict=True)})
            found[name, key_heads] = each if dist.get_rank() == 0 else []
    return found


@pytest.fixture(scope="module")
def runs() -> tuple[dict, dict]:
    import molmo2_nemo.model.molmo2  # noqa: F401  (forked processes then have it)
    from tests.support.packs import demo_packs

    packs = demo_packs(20)
    trees = [batch for batch in packs if (batch.branch_ids >= 0).any()]
    packs = [f(trees, key=lambda batch: len(batch.unit_crops)) for f in (max, min)]  # the latter for fewer than 8 ranks
    assert len(packs[0].unit_crops) > 8 > len(packs[1].unit_crops)
    return run_light(model_job, packs, LAYOUTS, ranks=8)[0], run_light(model_job, packs, {"one": {}}, ranks=1)[0]


@pytest.mark.parametrize("key_heads", KEY_HEADS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_eight_ranks_equal_one_process(runs, layout, key_heads):
    eight, one = runs
    for got, expected in zip(eight[layout, key_heads], one["one", key_heads], strict=True):
        torch.testing.assert_close(got["loss"], expected["loss"], rtol=1e-6, atol=0)
        largest = max(float(g.abs().max()) for name, g in expected.items() if name != "loss")
        for name, grad in expected.items():
            bound = 1e-5 * max(float(grad.abs().max()), 0.01 * largest)  # of key biases, 0 but for rounding
            torch.testing.assert_close(got[name], grad, rtol=0, atol=bound, msg=name)
