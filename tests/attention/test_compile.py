"""A decoder layer under torch.compile equals the plain one, and a new pack compiles nothing anew."""

from __future__ import annotations

import torch

from tests.support.pool import start_megatron


def compiled_job() -> tuple[list[list[tuple[torch.Tensor, torch.Tensor]]], list[int]]:
    """Per pack, (plain, compiled) of the output and of every gradient; graphs compiled so far after each pack.

    The backend runs the captured graphs, forward and backward, as they are: code generation is PyTorch's business and
    takes a minute here.
    """
    from molmo2_nemo.model.config import preset
    from molmo2_nemo.model.decoder import transformer_config
    from molmo2_nemo.model.inputs import PackInputs
    from molmo2_nemo.model.molmo2 import Molmo2Model
    from tests.support.packs import demo_packs

    start_megatron()
    torch.set_num_threads(1)
    config = preset("tiny")
    model = Molmo2Model(config, transformer_config(config, use_cpu_initialization=True))
    layer = model.decoder.layers[0]
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    pairs, graphs = [], []
    for batch in demo_packs(4)[1:]:
        pack = model.describe(PackInputs.from_batch(batch))
        both = []
        for run in (layer, compiled):
            hidden = torch.randn(768, 1, 192, generator=torch.Generator().manual_seed(1)).requires_grad_()
            layer.zero_grad()
            out, _ = run(hidden, attention_mask=None, packed_seq_params=pack)
            out.square().sum().backward()
            assert all(p.grad is not None for p in layer.parameters())
            both.append([out.detach(), hidden.grad, *(p.grad.clone() for p in layer.parameters())])
        pairs.append(list(zip(*both, strict=True)))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    return pairs, graphs


def test_compiled_layer_equals_plain_layer(workers):
    pairs, graphs = workers.run(compiled_job)[0]
    for pack in pairs:
        for plain, compiled in pack:
            torch.testing.assert_close(compiled, plain, atol=2e-6 * float(plain.abs().max()), rtol=0)
    assert graphs[0] > 0
    assert graphs[-1] == graphs[-2], graphs
