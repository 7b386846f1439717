"""Settings that no plan can be made of, refused before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

from molmo2_nemo.attention.automatic import flash_problem
from molmo2_nemo.cost.hardware import DEVICES, Cluster, Device
from molmo2_nemo.errors import UserError
from molmo2_nemo.fused.cards import GENERATIONS, LIBRARIES, written_for
from molmo2_nemo.model.config import Molmo2Config
from molmo2_nemo.settings.checks import check
from molmo2_nemo.settings.fsdp import fsdp_problems
from molmo2_nemo.settings.renamed import new_name
from molmo2_nemo.settings.run import ParallelConfig, RunConfig

SEVERAL = 2  # GPUs of a plan with FSDP, at the least: the search refuses a cluster of one


def check_settings(cfg: RunConfig, overrides: Sequence[str]) -> None:
    """Refuses settings that no run could have. Of the layout only what the user has set is checked: the recipe's own
    need not fit this cluster, nor go with FSDP.

    Raises:
        UserError: lists them.
    """
    for item in overrides:
        if item.lstrip("+~").startswith(("cluster.nodes", "cluster.devices")):
            raise UserError(f"{item}: a plan's hardware is set with cluster=h100x8 nodes=N")
        if item.lstrip("+~").startswith("cluster.precision") and cfg.cluster.precision == "fp32":
            raise UserError(f"{item}: plans are of runs in bf16 or fp8")
    mine = any(item.lstrip("+~").startswith("parallel") for item in overrides)
    parallel = cfg.parallel if mine else ParallelConfig()
    stage = replace(cfg.stage, micro_batch_size=min(1, cfg.stage.micro_batch_size))  # the plan chooses it
    memory = cfg.memory
    if parallel.fsdp != "none":  # with which a plan looks at such layouts only
        named = {new_name(item.lstrip("+~").split("=")[0]) for item in overrides}
        if not _named(named, "parallel", "tensor"):
            parallel = replace(parallel, tensor=1, sequence=False)
        if not _named(named, "parallel", "pipeline"):
            parallel = replace(parallel, pipeline=1)
        if not _named(named, "memory", "offload"):
            memory = replace(memory, offload=False)
    planned = replace(cfg, parallel=parallel, stage=stage, memory=memory)
    sharded = fsdp_problems(planned, processes=SEVERAL)
    whole = replace(planned, parallel=replace(parallel, fsdp="none"))
    check(whole, processes=max(1, parallel.model_size), files=False, more=sharded)


def _named(named: Collection[str], group: str, key: str) -> bool:
    """Whether a setting is among those that the user named, by itself or with its group."""
    return group in named or f"{group}.{key}" in named


def check_cluster(cfg: RunConfig, model_config: Molmo2Config, cluster: Cluster) -> None:
    """Refuses what the run asks of GPUs that the cluster's cannot do, as training on them would.

    Raises:
        UserError: lists it.
    """
    if problems := list(_cannot_do(cfg, model_config, cluster.device)):
        raise UserError("\n  - ".join(["settings cannot work:", *problems]) if problems[1:] else problems[0])


def _cannot_do(cfg: RunConfig, model_config: Molmo2Config, device: Device) -> Iterator[str]:
    if cfg.cluster.precision == "fp8" and device.fp8_tflops is None:
        yield (
            f"cluster.precision=fp8: {device.name.upper()} is older than Hopper; use cluster.precision=bf16, or "
            f"{_others(lambda other: other.fp8_tflops is not None)}"
        )
    library = cfg.kernels.flash
    if library in LIBRARIES and device.capability not in LIBRARIES[library][1]:
        yield (
            f"kernels.flash={library}: {LIBRARIES[library][0]} is for {written_for(library)} GPUs, "
            f"{_generation(device)}; use kernels.flash=auto, or "
            f"{_others(lambda other: other.capability in LIBRARIES[library][1])}"
        )
    problem = flash_problem("cuda", "bfloat16", model_config.text.head_dim)
    if cfg.model.attention == "flash" and problem is not None:
        yield f"model.attention=flash: {problem}; use model.attention=auto"


def check_kernel(name: str, cluster: Cluster) -> None:
    """Refuses the speed of a kernel (a name of EFFICIENCIES, or "auto") that the cluster's GPUs do not run.

    Raises:
        UserError: says on which it runs.
    """
    device = cluster.device
    if name != "flash3" or device.capability in LIBRARIES["fa3"][1]:
        return
    newer = " (kernels.flash=fa4 is counted as fast)" if device.capability in LIBRARIES["fa4"][1] else ""
    raise UserError(
        f"--kernel {name}: {LIBRARIES['fa3'][0]} is for {written_for('fa3')} GPUs, {_generation(device)}; leave it "
        f"at auto{newer}, or take {_others(lambda other: other.capability in LIBRARIES['fa3'][1])}"
    )


def _generation(device: Device) -> str:
    return f"{device.name.upper()} is {GENERATIONS[device.capability]}"


def _others(may: Callable[[Device], bool]) -> str:
    return f"cluster= one of {', '.join(name for name, device in DEVICES.items() if may(device))}"
