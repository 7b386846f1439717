"""A process with a virtual GPU: switches off what needs results, writes down what was counted when it ends.

What is changed belongs to modules that the process may never import, so it waits until it does.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


class Counts:
    """What runtime.c counts."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(None)
        for name in ("most_used", "launches"):
            getattr(self.library, f"virtual_gpu_{name}").restype = ctypes.c_size_t

    def launches(self) -> dict[str, int]:
        room = 1 << 24
        text = ctypes.create_string_buffer(room)
        used = self.library.virtual_gpu_launches(text, ctypes.c_size_t(room))
        assert used < room
        found: dict[str, int] = {}
        for line in text.value.decode().splitlines():
            times, name = line.split(" ", 1)
            found[name] = found.get(name, 0) + int(times)
        return found

    def write(self, waits: dict[str, int]) -> None:
        """Into the folder of the run, a file for each process."""
        numbers = {"most_used": int(self.library.virtual_gpu_most_used())}
        path = Path(os.environ["VIRTUAL_GPU_REPORTS"], f"{os.getpid()}.json")
        path.write_text(json.dumps(numbers | {"launches": self.launches(), "waiting": waits}))


class AfterImport(MetaPathFinder):
    """Calls a function with a module once that has been imported.

    Args:
        functions: by the module's name.
    """

    def __init__(self, functions: dict[str, Callable[[ModuleType], None]]) -> None:
        self.functions = functions

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        function = self.functions.pop(name, None)
        if function is None:
            return None
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            function(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def prepare() -> None:
    """Called when the process starts: in every one that has the virtual GPU."""
    waits = Waits()
    world = int(os.environ["VIRTUAL_GPU_WORLD"])

    def without_results(torch: ModuleType) -> None:
        no_results_of_torch(torch)
        if world > 1:
            imagine(world)

    functions: dict[str, Callable[[ModuleType], None]] = {
        "torch": without_results,
        "molmo2_nemo.training.faults": no_checks_of_numbers,
        "molmo2_nemo.model.molmo2": no_drawing,
    }
    if os.environ["VIRTUAL_GPU_WAITS"]:
        functions["molmo2_nemo.nemo.module"] = waits.install
    sys.meta_path.insert(0, AfterImport(functions))
    atexit.register(lambda: Counts().write(waits.found))


def no_results_of_torch(torch: Any) -> None:
    """No cuDNN attention, whose library looks for a driver of its own. Single zeros, such as an optimizer's counts of
    steps, which Megatron compares, are copied to the device: nothing else fills them."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    make = torch.zeros

    def zeros(*size: Any, **options: Any) -> Any:
        made = make(*size, **options)
        return made.copy_(make((), dtype=made.dtype)) if made.is_cuda and made.dim() == 0 else made

    torch.zeros = zeros


def no_drawing(molmo2: Any) -> None:
    """Fresh parameters are drawn on the host: minutes for nothing."""
    molmo2.initialize = lambda model, seed: None


def no_checks_of_numbers(faults: Any) -> None:
    faults.refuse_infinite = lambda parameters: None


def imagine(world: int) -> None:
    """Let this process be rank 0 of so many, all others of which never come."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    begin, new_group = dist.init_process_group, c10d.new_group

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        for name in ("init_method", "store", "rank", "world_size"):
            kwargs.pop(name, None)
        begin("nccl", store=dist.HashStore(), rank=0, world_size=world, **kwargs)

    def only_nccl(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **kwargs: Any) -> Any:
            return make(*args, **(kwargs | {"backend": "nccl"}))

        return made

    dist.init_process_group = init_process_group
    dist.new_group = c10d.new_group = only_nccl(new_group)
    c10d._store_based_barrier = lambda *args, **kwargs: None


class Waits:
    """Calls that wait for the device between a step's first micro-batch and the reduction of its gradients, from the
    second step on: as PyTorch finds them, by the lines of the project and of Megatron that led there."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        self.watching = False

    def install(self, module: Any) -> None:
        from molmo2_nemo.nemo.optimizer import Molmo2Optimizer

        Molmo2Module = module.Molmo2Module
        begin, reduce, show = (
            Molmo2Module.on_train_batch_start,
            Molmo2Optimizer.finalize_model_grads,
            warnings.showwarning,
        )

        def on_train_batch_start(module: Any, *args: Any) -> None:
            begin(module, *args)
            if module.trainer.global_step:
                self.watch(True)

        def finalize_model_grads(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            self.watch(False)
            reduce(optimizer, *args, **kwargs)

        def showwarning(message: Any, *args: Any, **kwargs: Any) -> None:
            if "synchronizing CUDA operation" in str(message):
                self.add(traceback.extract_stack())
            else:
                show(message, *args, **kwargs)

        Molmo2Module.on_train_batch_start = on_train_batch_start
        Molmo2Optimizer.finalize_model_grads = finalize_model_grads
        warnings.showwarning = showwarning

    def watch(self, on: bool) -> None:
        import torch

        if on:
            warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn" if on else "default")

    def add(self, stack: traceback.StackSummary) -> None:
        lines = [f for f in stack if "molmo2_nemo" in f.filename or "megatron" in f.filename]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.line}" for f in reversed(lines[-3:]))
        self.found[where] = self.found.get(where, 0) + 1
