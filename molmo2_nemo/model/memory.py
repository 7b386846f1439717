"""Memory traded for time in the decoder, without changing a number: tiled MLPs, and saved activations on the host.

`MemoryConfig` (model/config.py) has the options. Recomputation is Megatron's in the decoder (`recompute_settings`) and
torch's in the vision encoder (model/vision.py); two more ways are here, which go with it or without it:

- `TiledMLP`: the MLP of one slice of the tokens at a time, so that its wide intermediates exist for one slice only
  (Arctic Long Sequence Training, arXiv 2506.13996).
- `HostOffload`: what autograd saves for backward waits in pinned host memory, copied out and back on a stream of its
  own while the device computes. With full recomputation that is one [T, B, D] tensor per layer, and attention's results
  where they are kept (attention/kept.py).

Shape legend: T tokens of this rank, B packs, D width.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from molmo2_nemo import compat
from molmo2_nemo.model.config import MemoryConfig

MIN_BYTES = 1 << 20  # smaller tensors are not worth a copy
# Saved tensors on their way back to the device before backward asks for them; with full recomputation the inputs of so
# many layers, or one layer's input, output of attention and log-sum-exp.
AHEAD = 2
AHEAD_WITH_RESULTS = 3


class FusedMLP(MLP):
    """Megatron's MLP with an activation of ours (fused/swiglu.py). [T, B, D] -> [T, B, D]; None: Megatron's own."""

    def __init__(self, *args: Any, swiglu: Callable[[Tensor], Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **compat.mlp_arguments(kwargs))
        self.swiglu = swiglu

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if self.swiglu is None:
            return super().forward(hidden_states, *args, **kwargs)
        return self.linear_fc2(self.swiglu(self.linear_fc1(hidden_states)[0]))


class TiledMLP(FusedMLP):
    """An MLP, `tiles` slices of the tokens one after another; each is recomputed in backward.

    [T, B, D] -> [T, B, D]. Under sequence parallelism T is the local shard, which all ranks slice alike.
    """

    def __init__(self, *args: Any, tiles: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tiles = tiles

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        # No random numbers in an MLP, so the generators' states need not be saved
        whole = super().forward
        slices = hidden_states.tensor_split(min(self.tiles, len(hidden_states)))
        if torch.is_grad_enabled():
            done = [checkpoint(whole, x, use_reentrant=False, preserve_rng_state=False) for x in slices]
        else:
            done = [whole(x) for x in slices]
        return torch.cat([out for out, _ in done]), done[0][1]


class HostOffload:
    """Saved tensors of what runs inside `with self.active(keep):` wait for backward in host memory.

    Args:
        min_bytes: smaller tensors stay where they are.
        ahead: how many saved tensors return before backward asks for them.

    `moved_bytes` counts what went to the host since the object was made.
    """

    def __init__(self, min_bytes: int = MIN_BYTES, ahead: int = AHEAD) -> None:
        self.min_bytes, self.ahead = min_bytes, ahead
        self.moved_bytes = 0
        self._stream: Any = None

    @contextlib.contextmanager
    def active(self, keep: Iterable[Tensor]) -> Iterator[Line]:
        """Offloads what autograd saves inside the block, and what is given to the line that it yields.

        Args:
            keep: tensors that stay alive anyway (parameters, tables); they and views of them are not moved.
        """
        line = Line(self, {t.untyped_storage().data_ptr() for t in keep})
        with torch.autograd.graph.saved_tensors_hooks(line.pack, line.unpack):
            yield line

    def side_stream(self, device: torch.device) -> Any:
        if device.type != "cuda":
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream


class Line:
    """The tensors of one forward pass that wait on the host, in the order in which they came.

    Args:
        fixed: addresses of storages that are not moved.
    """

    def __init__(self, offload: HostOffload, fixed: set[int]) -> None:
        self._offload, self._fixed = offload, fixed
        self._order: list[weakref.ref[_Waiting]] = []

    def pack(self, tensor: Tensor) -> Tensor | _Waiting:
        small = tensor.numel() * tensor.element_size() < self._offload.min_bytes
        if small or tensor.untyped_storage().data_ptr() in self._fixed:
            return tensor
        waiting = _Waiting(tensor, self._offload.side_stream(tensor.device), len(self._order))
        self._order.append(weakref.ref(waiting))
        self._offload.moved_bytes += waiting.host.numel() * waiting.host.element_size()
        return waiting

    def unpack(self, saved: Tensor | _Waiting) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        for number in range(max(0, saved.number - self._offload.ahead), saved.number):
            earlier = self._order[number]()  # backward wants them in reverse order
            if earlier is not None:
                earlier.start_return()
        return saved.returned()


def host_buffer(like: Tensor, *, pinned: bool) -> Tensor:
    """Where a tensor waits. On CPU this is the same memory as the device's; tests/support/memory.py
    tells the two apart."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)


class _Waiting:
    """One tensor on the host, and on request its copy on the device again."""

    def __init__(self, tensor: Tensor, stream: Any, number: int) -> None:
        self.number, self.device, self.stream = number, tensor.device, stream
        self.copy: Tensor | None = None
        self.host = host_buffer(tensor, pinned=stream is not None)
        if stream is None:
            self.host.copy_(tensor)
            return
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not reused before the copy is done

    def start_return(self) -> None:
        """Begin to copy back, unless that has begun."""
        if self.copy is not None:
            return
        if self.stream is None:
            self.copy = self.host.to(self.device, copy=True)
            return
        with torch.cuda.stream(self.stream):
            self.copy = self.host.to(self.device, non_blocking=True)

    def returned(self) -> Tensor:
        """The tensor on its device; the next call copies again."""
        self.start_return()
        taken, self.copy = self.copy, None
        assert taken is not None
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            taken.record_stream(current)
        return taken


def recompute_settings(memory: MemoryConfig) -> dict[str, Any]:
    """Megatron's settings for recomputation in the decoder.

    Of the modules that Megatron can recompute selectively only core_attn and mlp are offered: others are for experts,
    or, like layernorm, need Transformer Engine.

    Raises:
        UserError: see `MemoryConfig.check`.
    """
    memory.check()
    if memory.recompute == "none":
        return {}
    if memory.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(memory.recompute_modules)}
    if memory.recompute_layers is None:
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": memory.recompute_layers,
    }
