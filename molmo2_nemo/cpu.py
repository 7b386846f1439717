"""CPU shims: they let NeMo and Megatron-core run on a machine without CUDA, over gloo.

Both libraries ask for `torch.cuda` in places where any device would do: the current device, a side stream, a random
generator, a buffer with `device="cuda"`. `enable()` answers those questions with the CPU. With CUDA present it does
nothing at all, so a GPU run never sees this module's work.

What is changed, once per process:
  * functions of `torch.cuda` that would raise get CPU answers (device 0, streams that do nothing, zero memory use, the
    CPU's random generator);
  * Megatron's CUDA random-state tracker reads and writes the CPU generator;
  * checkpoints are written by the training process itself instead of by forks of it; asynchronous ones by a thread;
  * `.cuda()` of tensors and modules returns them as they are;
  * a `TorchFunctionMode` maps `device="cuda"`/device 0 to the CPU and drops `pin_memory`. The mode is re-entered round
    backward passes, because the autograd engine runs below the call that switched it off.
Megatron's optimizer compares `tensor.type()` with `torch.cuda.FloatTensor`; there, and only there, the answer is that.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from molmo2_nemo import differences

_MODE: _CpuForCuda | None = None


def is_cpu_only() -> bool:
    """True where torch sees no CUDA device and the CPU shims are needed."""
    return not torch.cuda.is_available()


def enable(threads: int | None = None) -> bool:
    """Let this process run NeMo on CPU; call it before importing NeMo or Megatron-core.

    Args:
        threads: torch threads of this process; None leaves torch's own choice.

    Returns:
        True if the CPU shims are active, False (and nothing changed) where CUDA is available.
    """
    global _MODE
    if not is_cpu_only():
        return False
    if threads is not None:
        torch.set_num_threads(threads)
    if _MODE is None:
        os.environ.setdefault("NEMO_LOG_MEMORY_USAGE", "0")
        _patch_torch_cuda()
        _MODE = _CpuForCuda()
        _MODE.__enter__()
    return True


def enable_megatron() -> None:
    """Second half of the CPU shims, once Megatron-core is imported: its random-state tracker."""
    if not is_cpu_only():
        return
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    _write_checkpoints_in_process()


def _write_checkpoints_in_process() -> None:
    """Megatron forks processes (or starts threads) to write a checkpoint. On CPU the training process has gloo's and
    OpenMP's threads; a fork can then hang for ever on a lock that some thread held. Here the files are written one
    after another."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async as writer

    def write_all(transforms: Any, use_msc: bool, rank: int, buckets: list[Any], results: queue.Queue) -> None:
        written: dict[int, Any] = {}
        for index, bucket in enumerate(buckets):
            answer: queue.Queue = queue.Queue()
            count: queue.Queue = queue.Queue()
            count.put(index)
            writer.FileSystemWriterAsync.write_preloaded_data(
                transforms, index, bucket, answer, count, True, use_msc=use_msc
            )
            _, written[index] = answer.get()
            if isinstance(written[index], Exception):
                results.put(written[index])
                return
        results.put(written)

    setattr(writer.FileSystemWriterAsync, differences.checkpoint_writer(), staticmethod(write_all))
    writer._results_queue = queue.Queue()
    _save_asynchronously_in_a_thread()


def _save_asynchronously_in_a_thread() -> None:
    """Let a thread write asynchronous checkpoints, where Megatron forks a process. The thread writes a copy of the
    tensors, because training continues to change them; on GPU the copy to the host is that copy."""
    from megatron.core.dist_checkpointing.strategies import async_utils

    class ThreadCaller(async_utils.TemporalAsyncCaller):
        def schedule_async_call(self, async_req: Any) -> None:
            if async_req.async_fn is None:
                return
            rank, _, results = async_req.async_fn_args
            buckets = [
                (file, key, (texts, [(item, tensor.clone()) for item, tensor in tensors]))
                for file, key, (texts, tensors) in async_req.preload_fn()
            ]
            self.start_time = time.time()
            self.process = threading.Thread(
                target=async_req.async_fn,
                args=(rank, buckets, results),
                kwargs=async_req.async_fn_kwargs,
                name="checkpoint",
            )
            self.process.start()

    async_utils.TemporalAsyncCaller = ThreadCaller


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """Run a block without the mode, for code that traces or compiles (torch.compile, torch.jit)."""
    if _MODE is None:
        yield
        return
    with torch._C.DisableTorchFunction():
        yield


def _is_cuda_device(device: Any) -> bool:
    if isinstance(device, bool) or device is None:
        return False
    if isinstance(device, int):
        return True
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


_CUDA_TYPES_ASKED_BY = "megatron.core.optimizer"


class _CpuForCuda(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs:
            if _is_cuda_device(kwargs.get("device")):
                kwargs = {**kwargs, "device": "cpu"}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda_device(args[1]):
            args = (args[0], "cpu", *args[2:])
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            answer = func(*args)
            return answer.replace("torch.", "torch.cuda.", 1) if _asked_by_optimizer() else answer
        return func(*args, **kwargs)


def _asked_by_optimizer() -> bool:
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("torch"):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").startswith(_CUDA_TYPES_ASKED_BY)


class _Stream:
    """A stream on a machine where everything is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> None: ...


class _Event:
    """An event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _patch_torch_cuda() -> None:
    def answering(value: Any) -> Any:
        return lambda *args, **kwargs: value  # a new function each time: dynamo's table wants distinct ones

    cuda = torch.cuda
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "ipc_collect"):
        setattr(cuda, name, answering(None))
    for name in ("current_device", "memory_allocated", "max_memory_allocated"):
        setattr(cuda, name, answering(0))
    for name in ("memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, answering(0))
    cuda.is_initialized = answering(True)  # NeMo asserts it before it moves loaded tensors to the current device
    cuda.memory_stats = lambda *a, **k: {}
    cuda.mem_get_info = lambda *a, **k: (0, 0)
    cuda.Stream = _Stream
    cuda.Event = _Event
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.current_stream = lambda *a, **k: _Stream()
    cuda.default_stream = lambda *a, **k: _Stream()
    cuda.get_rng_state = lambda *a, **k: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    cuda.get_rng_state_all = lambda: [torch.get_rng_state()]
    cuda.set_rng_state_all = lambda states: torch.set_rng_state(states[0]) if states else None
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.manual_seed_all = lambda seed: None  # torch.manual_seed calls it and has seeded the CPU itself
    _reenter_mode_in_backward()
    torch.Tensor.cuda = lambda self, *a, **k: self
    torch.nn.Module.cuda = lambda self, *a, **k: self


def _reenter_mode_in_backward() -> None:
    """`Tensor.backward` is itself a torch function: the mode is off while it runs, unless it is entered again."""
    run_backward = torch.autograd._engine_run_backward

    def run_backward_in_mode(*args: Any, **kwargs: Any) -> Any:
        if _MODE is None:
            return run_backward(*args, **kwargs)
        with _MODE:
            return run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = run_backward_in_mode
