"""A decoder layer under torch.compile equals the plain one, also with context ranks; a new pack compiles nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from molmo2_nemo.settings.run import RunConfig
from tests.support.pool import start_megatron


def compiled_job(packs: list[Any], context: dict[str, Any]) -> tuple[list[list[tuple[Any, Any]]], list[int]]:
    """Per pack, (plain, compiled) of the output and of every gradient; graphs compiled so far after each pack.

    The backend runs the captured graphs, forward and backward, as they are: code generation is PyTorch's business and
    takes a minute here.
    """
    from molmo2_nemo.model.config import preset
    from molmo2_nemo.model.decoder import transformer_config
    from molmo2_nemo.model.inputs import PackInputs
    from molmo2_nemo.model.molmo2 import Molmo2Model
    from molmo2_nemo.parallel.context import ContextSettings

    ranks = torch.distributed.get_world_size()
    start_megatron(context=ranks)
    torch.set_num_threads(1)
    config = preset("tiny")
    settings = transformer_config(config, use_cpu_initialization=True, context_parallel_size=ranks)
    model = Molmo2Model(config, settings, context=ContextSettings(**context), seed=RunConfig.seed)
    layer = model.decoder.layers[0]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, backend="aot_eager")
    pairs, graphs = [], []
    for batch in packs:
        pack = model.describe(PackInputs.from_batch(batch))
        both = []
        for run in (layer, compiled):
            hidden = torch.randn(768, 1, 192, generator=torch.Generator().manual_seed(1))
            hidden = hidden.chunk(ranks)[torch.distributed.get_rank()].clone().requires_grad_()
            layer.zero_grad()
            out, _ = run(hidden, attention_mask=None, packed_seq_params=pack)
            out.square().sum().backward()
            assert all(p.grad is not None for p in layer.parameters())
            both.append([out.detach(), hidden.grad, *(p.grad.clone() for p in layer.parameters())])
        pairs.append(list(zip(*both, strict=True)))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    return pairs, graphs


@pytest.mark.parametrize(
    ("ranks", "context"),
    [(1, {}), (2, {}), (2, {"ulysses": 1, "cp_comm_type": "ring"})],
    ids=["alone", "ulysses", "ring"],
)
def test_compiled_layer_equals_plain_layer(workers, ranks, context):
    from tests.support.packs import demo_packs

    for pairs, graphs in workers.run(compiled_job, demo_packs(4)[1:], context, ranks=ranks):
        for pack in pairs:
            for plain, compiled in pack:
                torch.testing.assert_close(compiled, plain, atol=2e-6 * float(plain.abs().max()), rtol=0)
        assert graphs[0] > 0
        assert graphs[-1] == graphs[0], graphs
