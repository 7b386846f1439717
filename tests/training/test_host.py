"""A host is an adapter: the plainest loop there is, from training/ and Megatron-core alone, trains as NeMo does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.packs import FixedPacks, demo_packs, tiny_run, train_on_packs

TRACED = ("loss", "grad_norm_vit", "grad_norm_connector", "grad_norm_llm", "lr_vit", "lr_llm")


def plain_loop(cfg: Any, packs: list[Any], overlap: bool = False) -> list[dict[str, float]]:
    """Train on fixed packs, one step after another; the loss, gradient norms and rates of each."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from molmo2_nemo.training.faults import FaultGuard
    from molmo2_nemo.training.gradients import finalize_gradients
    from molmo2_nemo.training.lr_schedule import group_factor
    from molmo2_nemo.training.model import build_model, chosen_model, megatron_config
    from molmo2_nemo.training.optimizer import adam_config, clipping_optimizer
    from molmo2_nemo.training.overlap import finish_gathers
    from molmo2_nemo.training.seeds import seed_step
    from molmo2_nemo.training.step import MicroBatches, micro_batch_loss, step_loss
    from molmo2_nemo.training.step_result import StepResult
    from molmo2_nemo.training.step_statistics import Tasks
    from tests.support.pool import start_megatron

    start_megatron()
    stage, optim = cfg.stage, cfg.stage.optim
    model_config = chosen_model(cfg.model, stage)
    config = megatron_config(model_config, cfg.memory, cfg.parallel, precision="fp32", variable_length=False)
    parts = {"stage": stage, "memory": cfg.memory, "parallel": cfg.parallel, "seed": cfg.seed}
    model = build_model(model_config, config, **parts)
    beside = {"overlap_grad_reduce": overlap, "overlap_param_gather": overlap, "bucket_size": 20_000}
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True, **beside)
    chunk = DistributedDataParallel(config, settings, model)
    config.no_sync_func = chunk.no_sync if overlap else None
    guard, result = FaultGuard(cfg.faults), StepResult()
    optimizer = clipping_optimizer(
        adam_config(optim, bf16=False, distributed=True),
        [chunk],
        optim,
        lambda norms, rates: guard.judge(result, norms, rates),
        use_gloo_process_groups=True,
    )
    config.finalize_model_grads_func = lambda model, num_tokens=None, **options: finalize_gradients(
        model, result.weight, **options
    )
    trainable = stage.trainable(model_config)
    takes = MicroBatches(
        model_config, trainable, model.groups, Tasks({}), cut_padding=False, sequence_parallel=False, plan=model.plan
    )

    def forward(loader: Any, part: Any) -> Any:
        return part(takes.take(loader, result, None)), lambda sums: micro_batch_loss(result, sums, 0)

    size = parallel_state.get_data_parallel_world_size()
    loader = iter(FixedPacks(packs, parallel_state.get_data_parallel_rank(), size))
    steps = []
    for step in range(stage.max_steps):
        seed_step(cfg.seed, step)
        result = StepResult()
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = group["max_lr"] * group_factor(optim, group["name"], stage.max_steps)(step)
        losses = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=loader,
            model=[chunk],
            num_microbatches=stage.global_batch_size // size,
            seq_length=cfg.data.packing.sequence_length,
            micro_batch_size=1,
            forward_only=False,
        )
        loss = step_loss(result, losses)
        optimizer.step()
        figures = {f"grad_norm_{name}": norm for name, norm in result.gradient_norms.items()}
        rates = {f"lr_{name}": rate for name, rate in result.learning_rates.items()}
        steps.append({"loss": float(loss), **figures, **rates})
    finish_gathers([chunk])  # into memory that goes with this job
    assert torch.is_tensor(result.weight) and result.statistics.packs > 0
    return steps


def test_a_plain_loop_trains_as_nemo_does(workers, tmp_path):
    """Two replicas, three steps, to the last digit; with communication beside computation, norms to the 9th."""
    cfg, packs = tiny_run(tmp_path, 3, data=2), demo_packs(12)
    nemo = workers.run(train_on_packs, cfg, packs, ranks=2, fit=True)[0]
    plain = workers.run(plain_loop, cfg, packs, ranks=2)
    for steps in plain:
        assert [[m[name] for name in TRACED] for m in steps] == [[m[name] for name in TRACED] for m in nemo]
    expected = [m[name] for m in nemo for name in TRACED]
    for steps in workers.run(plain_loop, cfg, packs, True, ranks=2):
        assert [m[name] for m in steps for name in TRACED] == pytest.approx(expected, rel=1e-9)
