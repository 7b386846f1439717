"""Memory traded for time in the decoder, without changing a number: tiled MLPs, and saved activations on the host.

`MemoryConfig` (model/config.py) has the options. Recomputation is Megatron's in the decoder (`recompute_settings`; of
layers in chunks our own, model/chunks.py) and torch's in the vision encoder (model/vision.py); two more ways are here,
which go with it or without it:

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
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from molmo2_nemo import differences
from molmo2_nemo.model.config import MemoryConfig
from molmo2_nemo.model.host_memory import PART, Pages

MIN_BYTES = PART  # smaller tensors are not worth a copy
# Saved tensors on their way back to the device before backward asks for them; with full recomputation the inputs of so
# many layers, or one layer's input, output of attention and log-sum-exp.
AHEAD = 2
AHEAD_WITH_RESULTS = 3
_Node = tuple[int, int] | None  # a run of autograd's, a node's number


class FusedMLP(MLP):
    """Megatron's MLP with an activation of ours (fused/swiglu.py). [T, B, D] -> [T, B, D]; None: Megatron's own."""

    def __init__(self, *args: Any, swiglu: Callable[[Tensor], Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **differences.mlp_arguments(kwargs))
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
        self.pages: Pages | None = None  # of pinned memory, on CUDA
        self._stream: Any = None

    @contextlib.contextmanager
    def active(self, keep: Iterable[Tensor]) -> Iterator[Line]:
        """Offloads what autograd saves inside the block, and what is given to the line that it yields.

        Args:
            keep: tensors that stay alive anyway (parameters, tables); they and views of them are not moved.
        """
        line = Line(self, {t.untyped_storage().data_ptr() for t in keep})
        try:
            with torch.autograd.graph.saved_tensors_hooks(line.pack, line.unpack):
                yield line
        finally:
            line.known.clear()

    def move(self, tensor: Tensor) -> _Moved:
        """The tensor's bytes, on their way to the host."""
        if tensor.device.type == "cuda" and self._stream is None:
            self._stream, self.pages = torch.cuda.Stream(tensor.device), Pages(pinned=True)
        self.moved_bytes += _bytes(tensor)
        return _Moved(tensor, self._stream, self.pages)


class Line:
    """The tensors of one forward pass that wait on the host, in the order in which they came.

    What autograd saves several times, unchanged, is moved once: tensors that span the same bytes of the same storage
    without gaps, whatever their shapes. Slices that overlap are moved each by itself. As with autograd alone, what
    waits must not be written to without autograd knowing it.

    Args:
        fixed: addresses of storages that are not moved.

    `known` has what is on the host already, until the forward pass ends. It keeps no device memory alive: a storage is
    held weakly, which also keeps its identity from being given to another one.
    """

    def __init__(self, offload: HostOffload, fixed: set[int]) -> None:
        self._offload, self._fixed = offload, fixed
        self._order: list[weakref.ref[_Waiting]] = []
        self.known: dict[Hashable, tuple[StorageWeakRef, weakref.ref[_Moved]]] = {}

    def pack(self, tensor: Tensor) -> Tensor | _Waiting:
        if _bytes(tensor) < self._offload.min_bytes or not _has_plain_bytes(tensor):
            return tensor
        if tensor.untyped_storage().data_ptr() in self._fixed:
            return tensor
        waiting = _Waiting(self._moved(tensor.detach()), tensor, len(self._order))
        self._order.append(weakref.ref(waiting))
        return waiting

    def _moved(self, tensor: Tensor) -> _Moved:
        storage = StorageWeakRef(tensor.untyped_storage())
        span = _bytes(tensor) if _is_dense(tensor) else (tensor.shape, tensor.stride(), tensor.dtype)
        key = (storage.cdata, tensor.data_ptr(), span, tensor._version)
        seen, found = self.known.get(key, (storage, None))
        moved = None if found is None or seen.expired() else found()
        if moved is None:
            moved = self._offload.move(tensor)
            self.known[key] = storage, weakref.ref(moved)
        return moved

    def unpack(self, saved: Tensor | _Waiting) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        tensor = saved.returned()
        for number in range(saved.number - 1, max(0, saved.number - self._offload.ahead) - 1, -1):
            earlier = self._order[number]()  # backward wants them in reverse order
            if earlier is not None and not earlier.asked and earlier.moved is not saved.moved:
                earlier.moved.start_return()
        return tensor


def host_buffer(size: int, pages: Pages | None) -> list[Tensor]:
    """Where so many bytes wait: pieces, uint8, that together have room for them. Without pages this is ordinary
    memory, on CPU the same as the device's; tests/support/memory.py tells the two apart."""
    return [torch.empty(size, dtype=torch.uint8)] if pages is None else pages.take(size)


class _Moved:
    """The bytes of one tensor on the host, and on request their copy on the device again."""

    def __init__(self, tensor: Tensor, stream: Any, pages: Pages | None) -> None:
        self.device, self.stream = tensor.device, stream
        self.dtype, self.shape, self.stride = tensor.dtype, tensor.shape, _dense_stride(tensor)
        self.copy: Tensor | None = None  # on its way to backward
        self._taken: tuple[StorageWeakRef, _Node] | None = None  # what backward was given last, and where
        self.ready: Any = None  # event of the side stream after the copy
        self.host = host_buffer(_bytes(tensor), pages)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with self._on_stream():
            dense = tensor if _is_dense(tensor) else tensor.contiguous()
            for piece, part in self._pieces(dense):
                piece.copy_(part, non_blocking=stream is not None)
        if stream is not None:
            tensor.record_stream(stream)  # its memory is not reused before the copy is done
        if pages is not None:
            weakref.finalize(self, pages.give, self.host)

    def _on_stream(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _pieces(self, dense: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of the host's memory, each with the part of the tensor's bytes that belongs there."""
        data, start = _as_bytes(dense), 0
        for piece in self.host:
            part = data[start : start + len(piece)]
            yield piece[: len(part)], part
            start += len(piece)

    def start_return(self) -> None:
        """Begin to copy back, unless that has begun."""
        if self.copy is not None:
            return
        with self._on_stream(), torch.no_grad():
            self.copy = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
            for piece, part in self._pieces(self.copy):
                part.copy_(piece, non_blocking=self.stream is not None)
            if self.stream is not None:
                self.ready = torch.cuda.Event()
                self.ready.record(self.stream)

    def returned(self) -> Tensor:
        """The bytes on their device, as the tensor that was moved; kept for no longer than the caller does."""
        taken = self._still_there()
        if taken is None:
            self.start_return()
            taken, self.copy = self.copy, None
        assert taken is not None
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self.ready)  # not for those that return after it
            taken.record_stream(current)
        self._taken = StorageWeakRef(taken.untyped_storage()), _node_at_work()
        return taken

    def _still_there(self) -> Tensor | None:
        """What the same node of the graph was given before, if it still lives. In another node it may live as a
        gradient that is written to, which autograd does not let us see."""
        if self._taken is None or self._taken[1] is None or self._taken[1] != _node_at_work():
            return None
        storage = torch.UntypedStorage._new_with_weak_ptr(self._taken[0].cdata)
        if storage is None:
            return None
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        return empty.set_(storage, 0, self.shape, self.stride)


class _Waiting:
    """One saved tensor: bytes on the host, and how they are read."""

    def __init__(self, moved: _Moved, tensor: Tensor, number: int) -> None:
        self.moved, self.number = moved, number
        self.form = tensor.dtype, tensor.shape, _dense_stride(tensor)
        self.asked = False  # by backward

    def returned(self) -> Tensor:
        """The tensor on its device."""
        self.asked = True
        tensor, (dtype, shape, stride) = self.moved.returned(), self.form
        if (tensor.dtype, tensor.shape, tensor.stride()) == self.form:
            return tensor
        return _as_bytes(tensor).view(dtype).as_strided(shape, stride)


def _node_at_work() -> _Node:
    """Identity of the node of autograd's graph that runs in this thread."""
    node = torch._C._current_autograd_node()
    return None if node is None else (torch._C._current_graph_task_id(), node._sequence_nr())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _has_plain_bytes(tensor: Tensor) -> bool:
    """Whether the numbers are what lies in memory: not so of tensors that wrap others, or are read conjugated."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    return plain and not tensor.is_conj() and not tensor.is_neg()


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one span of memory, each once, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """Strides of the tensor's copy: its own, without gaps."""
    if _is_dense(tensor):
        return tensor.stride()
    return torch.empty(tensor.shape, device="meta").stride()


def _as_bytes(dense: Tensor) -> Tensor:
    """The memory of a dense tensor, uint8 [bytes]."""
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


def recompute_settings(memory: MemoryConfig) -> dict[str, Any]:
    """Megatron's settings for recomputation in the decoder.

    Of the modules that Megatron can recompute selectively only core_attn and mlp are offered: others are for experts,
    or, like layernorm, need Transformer Engine.

    Raises:
        UserError: see `MemoryConfig.check`.
    """
    memory.check()
    if memory.recompute == "none" or memory.sequence_chunk is not None:  # layers in chunks recompute themselves
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
