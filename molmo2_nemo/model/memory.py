"""Memory traded for time in the decoder, without changing a number: tiled MLPs, and saved activations on the host.

`MemoryConfig` (model/config.py) has the options. Recomputation is Megatron's in the decoder (`recompute_settings`) and
torch's in the vision encoder (model/vision.py); two more ways are here, which go with it or without it:

- `TiledMLP`: the MLP of one slice of the tokens at a time, so that its wide intermediates exist for one slice only
  (Arctic Long Sequence Training, arXiv 2506.13996).
- `HostOffload`: what autograd saves for backward waits in pinned host memory, copied out and back on a stream of its
  own while the device computes. With full recomputation that is one [T, B, D] tensor per layer.

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
AHEAD = 2  # saved tensors on their way back to the device before backward asks for them


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

    `moved_bytes` counts what went to the host since the object was made.
    """

    def __init__(self, min_bytes: int = MIN_BYTES) -> None:
        self.min_bytes = min_bytes
        self.moved_bytes = 0
        self._stream: Any = None

    @contextlib.contextmanager
    def active(self, keep: Iterable[Tensor]) -> Iterator[None]:
        """Offloads what autograd saves inside the block.

        Args:
            keep: tensors that stay alive anyway (parameters, tables); they and views of them are not moved.
        """
        fixed = {t.untyped_storage().data_ptr() for t in keep}
        order: list[weakref.ref[_Waiting]] = []

        def pack(tensor: Tensor) -> Tensor | _Waiting:
            small = tensor.numel() * tensor.element_size() < self.min_bytes
            if small or tensor.untyped_storage().data_ptr() in fixed:
                return tensor
            waiting = _Waiting(tensor, self._side_stream(tensor.device), len(order))
            order.append(weakref.ref(waiting))
            self.moved_bytes += waiting.host.numel() * waiting.host.element_size()
            return waiting

        def unpack(saved: Tensor | _Waiting) -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            for number in range(max(0, saved.number - AHEAD), saved.number):  # backward wants them in reverse order
                earlier = order[number]()
                if earlier is not None:
                    earlier.start_return()
            return saved.returned()

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def _side_stream(self, device: torch.device) -> Any:
        if device.type != "cuda":
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream


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
