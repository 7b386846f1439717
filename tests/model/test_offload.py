"""What waits on the host: moved once however often it is saved, given back as it was, in pages that are used again."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from molmo2_nemo.model import memory
from molmo2_nemo.model.host_memory import PAGE, PART, Pages
from molmo2_nemo.model.memory import HostOffload, Line
from molmo2_nemo.plan.memory import HOST_PART

torch.set_num_threads(1)
SHAPE = (300, 40)
BYTES = 4 * 300 * 40


@pytest.fixture(params=["ordinary", "pages"])
def offload(request) -> HostOffload:
    made = HostOffload(min_bytes=1000)
    made.pages = Pages(pinned=False) if request.param == "pages" else None
    return made


@pytest.fixture
def line(offload) -> Iterator[Line]:
    with offload.active(keep=[]) as made:
        yield made


class Calls(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.of[func.name()] += 1
        return func(*args, **(kwargs or {}))


def values(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def several_uses(h: Tensor, w: Tensor) -> Tensor:
    """h is saved by sin, cos, twice by a product, flat by exp's factor, transposed, and by a matrix product."""
    flat = h.view(-1)
    parts = [h.sin(), h.cos(), h * h, flat * flat.detach().exp(), h.t().sinh(), (h @ w).pow(2)]
    return sum(part.sum() for part in parts)


def gradients(h: Tensor, w: Tensor, offload: HostOffload | None) -> tuple[Tensor, ...]:
    if offload is None:
        loss = several_uses(h * 1, w)
    else:
        with offload.active(keep=[h, w]):
            loss = several_uses(h * 1, w)
    return torch.autograd.grad(loss, [h, w])


def test_saved_often_moved_once(offload):
    h, w = values().requires_grad_(), torch.randn(40, 40, requires_grad=True)
    expected = gradients(h, w, None)
    for got, wanted in zip(gradients(h, w, offload), expected, strict=True):
        assert torch.equal(got, wanted)
    # the tensor itself, the exp that flat is multiplied with, and h @ w
    assert offload.moved_bytes == 3 * BYTES


def test_both_factors_of_a_product_return_in_one_copy(offload):
    h = values().requires_grad_()
    with offload.active(keep=[h]):
        mine = h * 1
        loss = (mine * mine).sum()
    del mine
    with Calls() as calls:
        loss.backward()
    assert offload.moved_bytes == BYTES and calls.of["aten::empty_strided"] == 1
    assert torch.equal(h.grad, 2 * h.detach())


def test_a_change_in_between_is_moved_again(line, offload):
    tensor = values()
    first = line.pack(tensor)
    tensor.add_(1)
    second = line.pack(tensor)
    assert offload.moved_bytes == 2 * BYTES
    assert torch.equal(line.unpack(first), values()) and torch.equal(line.unpack(second), values() + 1)


def test_memory_that_is_used_again_is_another_tensor(line):
    """An allocator may give a dead tensor's address to the next one; here all are at one address, one after another."""
    memory_of_all, packed = bytearray(BYTES), []
    for seed in range(50):
        tensor = torch.frombuffer(memory_of_all, dtype=torch.float32).view(SHAPE).copy_(values(seed))
        packed.append(line.pack(tensor))
        del tensor
    for seed, waiting in enumerate(packed):
        assert torch.equal(line.unpack(waiting), values(seed))


def test_storages_identity_is_not_given_away(line):
    """Not even when nothing else lives: what is known holds it, but not its memory."""
    tensor = values()
    storage, identity = StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage()._cdata
    waiting = line.pack(tensor)
    del tensor
    assert storage.expired() and len(line.known) == 1
    del storage
    assert all(values().untyped_storage()._cdata != identity for _ in range(50))
    assert torch.equal(line.unpack(waiting), values())


def test_what_is_known_ends_with_the_forward_pass(offload):
    h = values().requires_grad_()
    with offload.active(keep=[h]) as line:
        end = (h * 2).sin()
        assert line.known
    assert not line.known
    del end
    gc.collect()
    assert offload.pages is None or offload.pages.used == 0


class Pair(torch.autograd.Function):
    """Saves its inputs in this order, reads them twice, writes into the last one and gives it back as a gradient."""

    seen: list[list[int]] = []

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a + b

    @staticmethod
    def backward(ctx, grad):
        first, second = ctx.saved_tensors, ctx.saved_tensors
        Pair.seen.append([t.data_ptr() for t in (*first, *second)])
        return grad, second[1].mul_(grad)


def test_a_node_reads_a_copy_as_often_as_it_likes(offload):
    h, other = values().requires_grad_(), values(1).requires_grad_()
    with offload.active(keep=[h, other]):
        end = Pair.apply(h * 1, other * 1).sum()
    with Calls() as calls:
        end.backward()
    ptrs = Pair.seen.pop()
    assert ptrs[:2] == ptrs[2:] and calls.of["aten::empty_strided"] == 2  # nor were they brought ahead again
    assert torch.equal(other.grad, other.detach())


def test_what_a_node_wrote_is_not_given_to_the_next(offload):
    """The written copy lives on as a gradient when the second of the graph's runs asks for it."""
    h = values().requires_grad_()
    with offload.active(keep=[h]):
        mine = h * 1
        end = Pair.apply(torch.zeros(SHAPE), mine).sum()
    for _ in range(2):
        (found,) = torch.autograd.grad(end * 3, [mine], retain_graph=True)
        assert torch.equal(found, 3 * values())
    Pair.seen.clear()


def test_nothing_is_held_for_longer_than_backward_needs(line):
    waiting = line.pack(values())
    first = line.unpack(waiting)
    storage = StorageWeakRef(first.untyped_storage())
    first.zero_()
    assert torch.equal(line.unpack(waiting), values())
    del first
    assert storage.expired()


def forms(tensor: Tensor) -> dict[str, Tensor]:
    return {
        "flat": tensor.view(-1),
        "three axes": tensor.view(30, 10, 40),
        "transposed": tensor.t(),
        "as integers": tensor.view(torch.int32),
        "as halves": tensor.view(torch.bfloat16),
    }


@pytest.mark.parametrize("form", forms(torch.zeros(SHAPE)))
def test_views_of_the_same_bytes_are_moved_once(line, offload, form):
    tensor = values()
    whole, view = line.pack(tensor), line.pack(forms(tensor)[form])
    assert offload.moved_bytes == BYTES
    got = line.unpack(view)
    expected = forms(values())[form]
    assert got.dtype == expected.dtype and got.shape == expected.shape and got.stride() == expected.stride()
    assert torch.equal(got.contiguous().view(torch.int16), expected.contiguous().view(torch.int16))
    assert torch.equal(line.unpack(whole), values())


def test_slices_are_moved_by_themselves(line, offload):
    tensor = values()
    parts = {
        "left": tensor[:, :10],
        "right": tensor[:, 10:20],
        "every other": tensor[::2],
        "one": tensor[:1].expand(300, 40),
    }
    packed = {name: line.pack(part) for name, part in parts.items()}
    again = line.pack(tensor[:, :10])
    assert offload.moved_bytes == sum(4 * part.numel() for part in parts.values())
    for name, waiting in packed.items():
        assert torch.equal(line.unpack(waiting), parts[name])
    assert torch.equal(line.unpack(again), parts["left"])


def test_what_cannot_be_read_from_memory_stays(line, offload):
    z = torch.randn(SHAPE, dtype=torch.complex64).conj()
    for tensor in (z, z.imag, torch.eye(300).to_sparse(), values()[:1]):
        assert line.pack(tensor) is tensor
    assert offload.moved_bytes == 0


def test_what_comes_next_is_on_its_way(offload):
    offload.ahead = 2
    with offload.active(keep=[]) as line:
        packed = [line.pack(values(seed)) for seed in range(5)]
    line.unpack(packed[4])
    assert [waiting.moved.copy is not None for waiting in packed] == [False, False, True, True, False]


@pytest.mark.parametrize("size", [1, PART, PART + 1, 5 * PAGE, 302 * 1000 * 1000])
def test_pages_have_the_size_that_is_asked_for(size):
    pages = Pages(pinned=False)
    pieces = pages.take(size)
    assert size <= sum(map(len, pieces)) < size + PART
    assert pages.used == sum(map(len, pieces)) <= pages.held < pages.used + PAGE


def test_pages_are_used_again_for_any_size():
    pages = Pages(pinned=False)
    rows = [pages.take(size) for size in (3 * PAGE + PART, 2 * PAGE, PAGE - PART)]
    at = {piece.data_ptr() for pieces in rows for piece in pieces}
    held = pages.held
    for pieces in rows:  # first in, first out, as under pipeline parallelism
        pages.give(pieces)
    assert pages.used == 0
    again = [*pages.take(PAGE), *pages.take(4 * PAGE), *pages.take(PAGE // 2), *pages.take(PAGE // 2)]
    assert {piece.data_ptr() for piece in again} <= at and len({p.data_ptr() for p in again}) == len(again)
    assert pages.held == held


def test_pages_are_released_but_those_in_use():
    pages = Pages(pinned=False)
    kept, part, gone = pages.take(PAGE), pages.take(PART), pages.take(3 * PAGE)
    watch = StorageWeakRef(gone[0].untyped_storage())
    pages.give(gone)
    del gone
    pages.release()
    assert watch.expired() and pages.held == 2 * PAGE
    pages.give(part)
    pages.give(kept)
    del part, kept
    pages.release()
    assert pages.held == pages.used == 0
    assert len(pages.take(PAGE)) == 1 and pages.held == PAGE


def test_steps_hold_what_one_step_uses():
    """Pages taken in one forward pass serve the next."""
    offload = HostOffload(min_bytes=1)
    offload.pages = Pages(pinned=False)
    h = torch.randn(PART, requires_grad=True)  # 4 MiB
    held = []
    for _ in range(3):
        with offload.active(keep=[h]):
            end = h
            for _ in range(10):
                end = end.sin()
        assert offload.pages.used == 9 * 4 * PART  # the first input is kept anyway
        held.append(offload.pages.held)
        end.sum().backward()
        del end
        assert offload.pages.used == 0
    assert held == [3 * PAGE] * 3


def test_planner_knows_the_sizes():
    assert HOST_PART == PART == memory.MIN_BYTES
