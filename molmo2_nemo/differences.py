"""What differs between the versions of Megatron-core that were tried: what NeMo 2.7.3 and this package need to run on
each of them.

A difference is tied to one module and dealt with when that module is imported, by whomever; `import molmo2_nemo`
installs the finder that watches for it, and costs nothing else.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from molmo2_nemo.compat import core_at_least, installed


def checkpoint_writer() -> str:
    """The method of Megatron's FileSystemWriterAsync that writes all files of a rank. Until 0.16 it forks processes,
    since 0.17 it starts threads and has another name; cpu.py replaces it."""
    return f"write_preloaded_data_{'multithread' if core_at_least('0.17') else 'multiproc'}"


def mlp_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """What a class derived from Megatron's MLP hands on to it. From 0.18 on a layer gives all groups and more to an MLP
    that is not Megatron's own; before, nothing, and the MLP finds its group."""
    kept = {name: value for name, value in arguments.items() if name not in ("pg_collection", "is_mtp_layer")}
    return kept | ({"tp_group": arguments["pg_collection"].tp} if "pg_collection" in arguments else {})


@dataclass(frozen=True)
class Difference:
    """Something that a version of Megatron-core lacks or does differently.

    Args:
        module: where it shows.
        since: the first line of Megatron-core that has it.
        why: what is missing or different, and who trips over it.
        mend: is given the module once it is imported (empty, where Megatron-core no longer has it).
        before: the first line that does not have it any more.
    """

    module: str
    since: str
    why: str
    mend: Callable[[Any], None]
    before: str | None = None

    def is_here(self) -> bool:
        """Whether the Megatron-core that is installed has it."""
        return core_at_least(self.since) and not (self.before and core_at_least(self.before))


class _Gone:
    """Stands for a class that Megatron-core no longer has and NeMo still imports by name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"{type(self).__name__} is not in Megatron-core {installed('megatron-core')} any more")


def _gone(name: str) -> Callable[[Any], None]:
    def mend(module: Any) -> None:
        if not hasattr(module, name):
            setattr(module, name, type(name, (_Gone,), {"__module__": module.__name__}))

    return mend


def _old_resiliency_ext_is_none(nvrx: Any) -> None:
    supported = nvrx.has_nvrx_async_support

    def supported_or_not() -> bool:
        try:
            return supported()
        except (AssertionError, AttributeError):  # older than asked for; before it had a __version__
            return False

    nvrx.has_nvrx_async_support = supported_or_not


def _old_name_of_expert_group(parallel_state: Any) -> None:
    if not hasattr(parallel_state, "get_data_modulo_expert_parallel_group"):
        parallel_state.get_data_modulo_expert_parallel_group = lambda: parallel_state.get_expert_data_parallel_group()


def _asynchronous_saves_of_its_own(serialization: Any) -> None:
    save = serialization.save

    @functools.wraps(save)
    def save_asynchronously_by_megatron(*args: Any, async_strategy: str = "mcore", **kwargs: Any) -> Any:
        return save(*args, async_strategy=async_strategy, **kwargs)

    serialization.save = save_asynchronously_by_megatron


def _save_strategy_without_version(module: Any) -> None:
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    def strategy(backend: str, version: int = 1) -> Any:
        assert (backend, version) == ("torch_dist", 1), f"{backend} {version}: recipes.py asks for torch_dist"
        return TorchDistSaveShardedStrategy()

    if len(inspect.signature(module.get_default_save_sharded_strategy).parameters) < 2:
        module.get_default_save_sharded_strategy = strategy


def _common_state_inside(common: Any) -> None:
    holder = getattr(common, "TorchCommonLoadStrategy", common)  # a method in 0.16, a function of the module since
    load = holder.load_common

    def load_either(*args: Any) -> Any:
        folder = Path(args[-1])  # of (self, folder) or (folder)
        return load(*args) if (folder / common.COMMON_STATE_FNAME).exists() else load_common_state(folder)

    holder.load_common = load_either


def load_common_state(folder: Path) -> Any:
    """What ranks have in common, from the entry "common_state" of a checkpoint; nothing is unpickled but plain data."""
    import torch
    from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load

    class Raw(DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: Any) -> None:
            found[read_item.dest_index.fqn] = value

    key = "common_state/shard_0_1"
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each rank reads it for itself
        load({key: None}, storage_reader=FileSystemReader(folder), planner=Raw(), no_dist=True)
    return torch.load(found[key], weights_only=True)[0]


def _queue_of_asynchronous_saves(dist_ckpt_io: Any) -> None:
    if not dist_ckpt_io.HAVE_MEGATRON_CORE:
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        dist_ckpt_io.AsyncCallsQueue, dist_ckpt_io.HAVE_MEGATRON_CORE = AsyncCallsQueue, True
    if core_at_least("0.19"):
        _save_strategy_without_version(dist_ckpt_io)


def _optimizer_of_several_buckets(distrib_optimizer: Any) -> None:
    cut = distrib_optimizer.DistributedOptimizer.sharded_param_state_fully_reshardable
    if "[param_world_start:param_world_end]" not in inspect.getsource(cut):
        return  # places are counted without padding there

    @functools.wraps(cut)
    def cut_with_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        gathered = self.get_parameter_state_dp_zero
        self.get_parameter_state_dp_zero = lambda *a, **k: _with_padding(self.buffers, gathered(*a, **k))
        try:
            return cut(self, *args, **kwargs)
        finally:
            del self.get_parameter_state_dp_zero

    distrib_optimizer.DistributedOptimizer.sharded_param_state_fully_reshardable = cut_with_padding


def _with_padding(buffers: Any, state: Any) -> Any:
    """State of whole buffers, with the padding between buckets put back in; buffers without any stay as they are."""
    from torch import cat, is_tensor
    from torch.nn.functional import pad

    for number, buffer in enumerate(buffers if state is not None else ()):
        kept = [bucket.numel_unpadded for bucket in buffer.buckets]
        gaps = [bucket.grad_data.numel() - size for bucket, size in zip(buffer.buckets, kept, strict=True)]
        if not any(gaps[:-1]):
            continue
        for tensors in state[number].values():
            for key, whole in tensors.items():
                if is_tensor(whole):
                    parts = zip(whole.split(kept), gaps, strict=True)
                    tensors[key] = cat([pad(part, (0, gap)) for part, gap in parts])
    return state


def _no_hooks_on_frozen_parameters(megatron_fsdp: Any) -> None:
    register = megatron_fsdp.MegatronFSDP._register_fsdp_hooks
    name = "register_post_accumulate_grad_hook"

    @functools.wraps(register)
    def register_for_trained(self: Any, root: Any) -> None:
        frozen = [parameter for parameter in root.parameters() if not parameter.requires_grad]
        for parameter in frozen:
            setattr(parameter, name, lambda hook: None)
        register(self, root)
        for parameter in frozen:
            delattr(parameter, name)

    megatron_fsdp.MegatronFSDP._register_fsdp_hooks = register_for_trained


DIFFERENCES = (
    Difference(
        "megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp",
        "0.16",
        "Megatron-FSDP waits for gradients of parameters that have none, which PyTorch refuses where any is frozen",
        _no_hooks_on_frozen_parameters,
        before="0.17",
    ),
    Difference(
        "megatron.core.optimizer.distrib_optimizer",
        "0.16",
        "saves the optimizer's state shifted, where gradients are reduced in several buckets and one is padded: it "
        "gathers without padding, and cuts parameters out at places counted with it (Megatron-LM's pull request 5077)",
        _optimizer_of_several_buckets,
    ),
    Difference(
        "nemo.utils.callbacks.dist_ckpt_io",
        "0.16",
        "NeMo imports the queue of asynchronous saves together with the Zarr format, which is gone, and then takes all "
        "of Megatron for missing",
        _queue_of_asynchronous_saves,
    ),
    Difference(
        "megatron.core.dist_checkpointing.strategies.common",
        "0.16",
        "reads the state that ranks have in common from common.pt; checkpoints of 0.19 have it as an entry among the "
        "tensors, and could not be read",
        _common_state_inside,
        before="0.19",
    ),
    Difference(
        "megatron.core.dist_checkpointing.strategies.nvrx",
        "0.17",
        "stops the import of Megatron-core where nvidia-resiliency-ext is older than 0.6, or has no __version__ (0.4, "
        "which NeMo 2.7 was built against), instead of doing without it",
        _old_resiliency_ext_is_none,
    ),
    Difference(
        "megatron.core.dist_checkpointing.serialization",
        "0.17",
        "saves asynchronously with nvidia-resiliency-ext unless told otherwise; NeMo waits for Megatron's own queue",
        _asynchronous_saves_of_its_own,
    ),
    Difference(
        "megatron.core.datasets.megatron_tokenizer",
        "0.17",
        "NeMo's NullTokenizer derives from its class",
        _gone("MegatronLegacyTokenizer"),
    ),
    Difference(
        "megatron.core.inference.model_inference_wrappers.inference_wrapper_config",
        "0.17",
        "NeMo's models import its class for their own inference",
        _gone("InferenceWrapperConfig"),
    ),
    Difference(
        "megatron.core.parallel_state",
        "0.17",
        "NeMo's DDP asks for the experts' data-parallel group by its old name",
        _old_name_of_expert_group,
    ),
    Difference(
        "megatron.core.dist_checkpointing.strategies.base",
        "0.19",
        "NeMo imports its class for an annotation, and takes all of Megatron for missing without it",
        _gone("SaveShardedStrategy"),
    ),
    Difference(
        "nemo.lightning.io.pl",
        "0.19",
        "NeMo gives the function that chooses a format two arguments; it takes one",
        _save_strategy_without_version,
    ),
)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of DIFFERENCES as everybody else does, and has them mended once they are loaded."""

    mends_megatron = True  # by which a copy of this class, of a package that was imported anew, is known

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        found = _BY_MODULE.get(name)
        if found is None or not found.is_here():
            return None
        others = [f for f in sys.meta_path if hasattr(f, "find_spec") and not hasattr(f, "mends_megatron")]
        spec = next((spec for f in others if (spec := f.find_spec(name, path, target)) is not None), None)
        if spec is None:
            return importlib.machinery.ModuleSpec(name, _Mending(None, found.mend))
        if spec.loader is not None:
            spec.loader = _Mending(spec.loader, found.mend)
        return spec


class _Mending(importlib.abc.Loader):
    """A module's own loader, and the mend after it. loader: None for a module that is not there any more."""

    def __init__(self, loader: Any, mend: Callable[[Any], None]) -> None:
        self.loader, self.mend = loader, mend

    def create_module(self, spec: Any) -> ModuleType | None:
        return self.loader.create_module(spec) if self.loader else None

    def exec_module(self, module: ModuleType) -> None:
        if self.loader:
            self.loader.exec_module(module)
        self.mend(module)

    def __getattr__(self, name: str) -> Any:
        if name == "loader" or name.startswith("__"):  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.loader, name)  # get_source and others, for tracebacks


_BY_MODULE = {difference.module: difference for difference in DIFFERENCES}


def install() -> None:
    """Watch for the modules of DIFFERENCES from now on; those that are imported already are mended at once, with what
    others have imported from them."""
    if installed("megatron-core") is None:
        return
    sys.meta_path[:] = [_Finder(), *(f for f in sys.meta_path if not hasattr(f, "mends_megatron"))]
    for difference in DIFFERENCES:
        module = sys.modules.get(difference.module)
        if (
            module is not None
            and difference.is_here()
            and not isinstance(getattr(module.__spec__, "loader", 0), _Mending)
        ):
            _mend_everywhere(module, difference.mend)


def _mend_everywhere(module: Any, mend: Callable[[Any], None]) -> None:
    """Mend a module that others have imported names from: they get what the mend puts in their place."""
    before = dict(vars(module))
    mend(module)
    new = {id(old): vars(module)[name] for name, old in before.items() if vars(module)[name] is not old}
    for name, other in list(sys.modules.items()):
        if name.startswith(("megatron.", "nemo.")):
            for attribute, value in list(vars(other).items()):
                if id(value) in new:
                    setattr(other, attribute, new[id(value)])
