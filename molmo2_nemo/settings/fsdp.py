"""What parameters sharded by Megatron-FSDP (`parallel.fsdp=megatron`) do not go with. No torch here."""

from __future__ import annotations

from collections.abc import Iterator

from molmo2_nemo.settings.run import RunConfig

OWN_ORDER = "ranks would gather parameters a different number of times, and wait for each other for ever"


def fsdp_problems(cfg: RunConfig, processes: int) -> Iterator[str]:
    """What cannot work with it, one line for each setting.

    Args:
        processes: of the run.
    """
    if cfg.parallel.fsdp == "none":
        return
    asked = "parallel.fsdp=megatron"
    for key, value, needed, why in _settings(cfg):
        if value != needed:
            also = " parallel.sequence=false" if key == "parallel.tensor" and cfg.parallel.sequence else ""
            yield f"{asked} with {key}={value}: {why}; set {key}={needed}{also}, or parallel.fsdp=none"
    for key, used in (("validation.sources", cfg.validation.sources), ("evaluation.tasks", cfg.evaluation.tasks)):
        if used:
            yield (
                f"{asked} with {key}: ranks have unequally many packs and questions between steps, so {OWN_ORDER}; "
                f"leave {key} out and use molmo2 evaluate on the checkpoints, or set parallel.fsdp=none"
            )
    if processes == 1:
        yield f"{asked} has no effect with 1 process: there is nobody to share parameters with; set parallel.fsdp=none"


def _settings(cfg: RunConfig) -> Iterator[tuple[str, str, str, str]]:
    """Key, its value, what it must be, and why."""
    parallel, memory, cache = cfg.parallel, cfg.memory, cfg.data.feature_cache
    untried = "the two together were not tried"
    once = "a layer's gradients are reduced once in a backward pass, and this makes them in several parts"
    always = "Megatron-FSDP always sends beside computation"
    yield "parallel.distributed_optimizer", _text(parallel.distributed_optimizer), "true", "it is a part of FSDP"
    yield "parallel.tensor", _text(parallel.tensor), "1", untried
    yield "parallel.pipeline", _text(parallel.pipeline), "1", untried
    yield "parallel.dynamic_context", _text(parallel.dynamic_context), "false", OWN_ORDER
    for key in ("overlap_grad_reduce", "overlap_param_gather"):
        if getattr(parallel, key) is False:
            yield f"parallel.{key}", "false", "null", always
    yield "memory.sequence_chunk", _text(memory.sequence_chunk), "null", once
    yield "memory.offload", _text(memory.offload), "false", untried
    yield "memory.optimizer_offload", _text(memory.optimizer_offload), "false", untried
    yield "data.feature_cache.path", _text(cache.path), "null", OWN_ORDER
    yield "data.feature_cache.together", _text(cache.together), "null", OWN_ORDER
    if cfg.cluster.precision == "fp8":
        yield "cluster.precision", "fp8", "bf16", untried


def _text(value: object) -> str:
    """A value as one writes it in an override."""
    return "null" if value is None else str(value).lower()
