"""Who held a GPU's memory: against bookkeeping that keeps every tensor, and against PyTorch's profiler on a CPU."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from molmo2_nemo.training.memory_history import MemoryHistory
from molmo2_nemo.training.memory_timeline import BEFORE, NO_STACK, OTHERS, PLACES, POINTS, _known, place, timeline

ROOT = "/opt/venv/lib/python3.12/site-packages/"
NAMES = [f"molmo2_nemo/model/part{i}.py forward" for i in range(14)]


def frames(name: str) -> list[dict[str, Any]]:
    file, function = name.split()
    outer = {"filename": ROOT + "molmo2_nemo/nemo/train.py", "line": 1, "name": "train"}
    inner = {"filename": ROOT + "torch/nn/functional.py", "line": 1, "name": "linear"}
    return [inner, {"filename": ROOT + file, "line": 1, "name": function}, outer]


def history(seed: int, count: int, kept: int) -> tuple[dict[str, Any], list[dict[str, int]]]:
    """A snapshot after `count` allocations and frees of which the ring has the last `kept`, and who held what before
    the first of these and after each: BEFORE has what was taken by then."""
    rng = random.Random(seed)
    live: dict[int, tuple[str, int]] = {}
    events: list[dict[str, Any]] = []
    states: list[dict[int, tuple[str, int]]] = [{}]
    for index in range(count):
        if live and rng.random() < 0.48:
            address = rng.choice(list(live))
            size = live.pop(address)[1]
            events.append({"action": "free_completed", "addr": address, "size": size, "frames": []})
        else:
            address = rng.choice([a for a in range(10, 60) if a not in live] or [1000 + index])
            live[address] = (rng.choice(NAMES), rng.randrange(1, 10_000))
            events.append(
                {"action": "alloc", "addr": address, "size": live[address][1], "frames": frames(live[address][0])}
            )
        states.append(dict(live))
    first = count - kept
    old = set(states[first].items())
    held = []
    for state in states[first:]:
        old &= set(state.items())  # an address that was freed and taken again has another name or size
        sums: dict[str, int] = {}
        for item in state.items():
            name = BEFORE if item in old else item[1][0]
            sums[name] = sums.get(name, 0) + item[1][1]
        held.append(sums)
    blocks = [
        {"size": -(-size // 512) * 512, "requested_size": size, "state": "active_allocated", "address": a, "frames": []}
        for a, (_, size) in live.items()
    ]
    blocks += [{"size": 512, "requested_size": 0, "state": "inactive", "address": 0, "frames": []}]
    total = sum(block["size"] for block in blocks)
    segments = [{"device": 0, "total_size": total, "blocks": blocks}, {"device": 1, "total_size": 7, "blocks": []}]
    noise = [{"action": "segment_alloc", "addr": 1, "size": 5, "frames": []}]
    return {"segments": segments, "device_traces": [noise + events[first:], []]}, held


@pytest.mark.parametrize(("count", "kept"), [(40, 40), (2000, 2000), (2000, 700), (60, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_against_the_bookkeeping_of_every_tensor(seed, count, kept):
    snapshot, held = history(seed, count, kept)
    found = timeline(snapshot)
    totals = [sum(state.values()) for state in held]
    assert found["peak"] == max(totals) and found["allocated"] == totals[-1] and found["events"] == kept
    assert found["reserved"] == snapshot["segments"][0]["total_size"]
    names = [row["name"] for row in found["places"]]
    assert len(names) <= PLACES + 1 and len(found["places"][0]["points"]) == min(POINTS, kept + 1)
    at_peak = {row["name"]: row["at_peak"] for row in found["places"]}
    assert sum(at_peak.values()) == found["peak"]
    fullest = [state for state in held if sum(state.values()) == found["peak"]]
    assert any(all(state.get(n, 0) == at_peak[n] for n in names if n != OTHERS) for state in fullest)
    sizes = [at_peak[name] for name in names if name != OTHERS]
    assert sizes == sorted(sizes, reverse=True)
    drawn = [sum(points) for points in zip(*(row["points"] for row in found["places"]), strict=True)]
    parts = len(drawn)
    bounds = [len(totals) * part // parts for part in range(parts + 1)]
    assert drawn == [max(totals[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def test_a_device_without_a_history():
    snapshot, held = history(0, 50, 50)
    snapshot["device_traces"] = []
    found = timeline(snapshot)
    assert found["events"] == 0 and found["at"] == []
    assert found["peak"] == found["allocated"] == sum(held[-1].values())
    assert [row["name"] for row in found["places"]] == [BEFORE]
    assert timeline(snapshot, device=1)["allocated"] == 0


@pytest.mark.parametrize(
    ("stack", "expected"),
    [
        ([], NO_STACK),
        ([("torch/nn/functional.py", "linear"), ("lightning/fabric/x.py", "go")], NO_STACK),
        (
            [("torch/optim/adamw.py", "step"), ("megatron/core/optimizer/optimizer.py", "step")],
            "torch/optim/adamw.py step",
        ),
        ([("torch/x.py", "f"), ("megatron/core/a.py", "g"), ("molmo2_nemo/b.py", "h")], "megatron/core/a.py g"),
        ([("nemo/c.py", "k")], "nemo/c.py k"),
    ],
)
def test_the_innermost_function_that_is_known(stack, expected):
    assert place([{"filename": ROOT + file, "name": name, "line": 1} for file, name in stack]) == expected


def test_a_file_is_looked_at_once():
    """A history has 100,000 stacks of up to hundreds of frames, and is read while all ranks wait."""
    _known.cache_clear()
    timeline(history(0, 2000, 2000)[0])
    assert _known.cache_info().misses <= len(NAMES) + 1 < 100 < _known.cache_info().hits


def test_a_checkout_and_an_environment_in_it():
    ours, others = (
        "/home/me/molmo2_nemo/molmo2_nemo/model/x.py",
        "/home/me/molmo2_nemo/.venv/lib/site-packages/torch/y.py",
    )
    stack = [{"filename": file, "name": "f", "line": 1} for file in (others, ours)]
    assert place(stack) == "molmo2_nemo/model/x.py f" and place(stack[:1]) == NO_STACK


def test_a_history_that_somebody_else_keeps_without_stacks():
    """PyTorch then leaves out the key."""
    snapshot, _ = history(2, 60, 60)
    peak = timeline(snapshot)["peak"]
    for event in snapshot["device_traces"][0]:
        del event["frames"]
    found = timeline(snapshot)
    assert [(row["name"], row["at_peak"]) for row in found["places"]] == [(NO_STACK, peak)]


def test_moments_have_their_seconds():
    snapshot, _ = history(1, 100, 100)
    events = snapshot["device_traces"][0]
    for number, event in enumerate(events):
        event["time_us"] = 5_000_000 + 1000 * number
    found = timeline(snapshot)
    assert found["at"][0] == 0 and found["at"] == sorted(found["at"]) and found["at"][-1] <= 0.1
    del events[-1]["time_us"]
    assert timeline(snapshot)["at"] is None


def test_a_real_step_as_pytorchs_profiler_saw_it():
    """PyTorch makes a snapshot of a profile, on a CPU too: the peak is that of its own timeline."""
    from torch.cuda._memory_viz import _profile_to_snapshot
    from torch.profiler import ProfilerActivity, profile
    from torch.profiler._memory_profiler import Action, TensorKey

    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True, with_stack=True) as seen:
        model(torch.randn(32, 64)).square().mean().backward()
    snapshot = _profile_to_snapshot(seen)
    device = len(snapshot["device_traces"]) - 1
    total, before, totals = 0, 0, []
    for _, action, (key, _version), size in seen._memory_profile().timeline:
        if isinstance(key, TensorKey) and action is not Action.INCREMENT_VERSION:
            total += -size if action is Action.DESTROY else size
            before += size if action is Action.PREEXISTING else 0
            totals.append(total)
    found = timeline(snapshot, device)
    assert found["peak"] == max(totals) > before and found["allocated"] == totals[-1]
    assert found["events"] > 10


def test_without_a_gpu_it_is_said(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for rank, record, said in ((0, True, 1), (1, True, 0), (0, False, 0)):
        with MemoryHistory().watching(tmp_path, rank, record=record):
            pass
        assert capsys.readouterr().out.count("only a GPU's allocator keeps one") == said
    assert list(tmp_path.iterdir()) == []
