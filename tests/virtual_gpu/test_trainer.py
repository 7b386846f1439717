"""The trainer on CUDA, on a virtual GPU: what it calls, what it allocates, where it waits. Numbers are not computed."""

from __future__ import annotations

import functools
import json
import pickle

import pytest

from benchmarks import planned_memory
from tests.support import virtual_gpu
from tests.support.shards import demo_shards

pytestmark = pytest.mark.skipif(virtual_gpu.problem() is not None, reason=str(virtual_gpu.problem()))


@functools.cache
def steps() -> tuple[virtual_gpu.Report, dict[str, dict[str, float]]]:
    """Two steps of two micro-batches of stages 2 and 3: the 4B at full depth, packs shared by eight processes."""
    return planned_memory.measured("4b", "node", [], find_waits=True)


# How Megatron's schedule begins a step, in front of its first micro-batch: torch.zeros([]) on a device waits
ONCE_A_STEP = "total_num_tokens = torch.zeros("


def test_no_wait_while_gradients_are_computed():
    assert [line for line in steps()[0].waiting if ONCE_A_STEP not in line] == []


def test_attention_runs_flash_kernels():
    report, _ = steps()
    assert report.output.count("attention: flash") == 2
    assert report.launched("flash_fwd_kernel") > 0
    assert report.launched("flash_bwd_dq_dk_dv_loop") > 0


def test_ranks_trade_heads_and_reduce_gradients():
    report, _ = steps()
    assert report.launched("ncclSend", "ncclAlltoAll") > 0
    assert report.launched("ncclReduceScatter") > 0


@pytest.mark.parametrize("stage", ["sft", "long"])
def test_planned_memory_is_what_is_allocated(stage):
    """Without the planner's allowances, within 10 %."""
    planned = planned_memory.planned("4b", "node", stage, [])
    assert planned["total"] == pytest.approx(steps()[1][stage]["memory_gib"], rel=0.1), json.dumps(planned)


def tiny(output_dir, *overrides: str) -> list[str]:
    shards = demo_shards()
    return [
        *("train", "recipe=tiny", "stage=pretrain", "parallel=single", "cluster=gpu", "save_every=2"),
        *(f"output_dir={output_dir}", f"data.sources.demo.path={shards / 'pretrain'}", *overrides),
    ]


def test_a_run_saves_and_resumes(tmp_path):
    """The whole command: shards, steps, checkpoints from device memory, a second run that goes on."""
    for last in (2, 3):
        report = virtual_gpu.run("molmo2_nemo.cli.main", *tiny(tmp_path, f"stage.max_steps={last}"))
        assert report.returncode == 0, report.output[-3000:]
        assert f"step {last}/{last}" in report.output
    assert "step 1/3" not in report.output
    assert (tmp_path / "pretrain" / "summary.json").exists()


def held(folder, name: str) -> dict:
    """The figures of a snapshot of memory; PyTorch's own viewer reads the other file."""
    from torch.cuda._memory_viz import segsum

    path = folder / "pretrain" / "memory" / f"{name}.rank-0.json"
    found = json.loads(path.read_text())
    snapshot = pickle.loads(path.with_suffix(".pickle").read_bytes())
    assert "total_reserved" in segsum(snapshot)
    assert found["reserved"] == sum(segment["total_size"] for segment in snapshot["segments"])
    return found


def test_out_of_memory_says_what_is_left_to_try(tmp_path):
    report = virtual_gpu.run("molmo2_nemo.cli.main", *tiny(tmp_path), gib=0.12)
    assert report.returncode == 2
    assert "process 0 ran out of GPU memory (CUDA out of memory. Tried to allocate" in report.output
    assert "cheapest first: stage.micro_batch_size=1" in report.output
    assert f"What the memory held: {tmp_path}/pretrain/memory/out-of-memory.rank-0.json" in report.output
    found = held(tmp_path, "out-of-memory")
    assert found["events"] == 0 and found["allocated"] > 30 * 2**20
    assert found["failed"]["wanted"] > found["failed"]["free"] > 0
    assert found["failed"]["place"].startswith("molmo2_nemo/")


def test_who_held_memory_that_ran_out_is_recorded(tmp_path):
    report = virtual_gpu.run("molmo2_nemo.cli.main", *tiny(tmp_path, "log.record_memory_history=true"), gib=0.12)
    assert report.returncode == 2 and "also by whom" not in report.output
    found = held(tmp_path, "out-of-memory")
    assert found["events"] > 100 and found["whole"] and found["peak"] >= found["allocated"]
    shares = {row["name"]: row["at_peak"] for row in found["places"]}
    assert sum(shares.values()) == found["peak"]
    assert any(name.startswith("molmo2_nemo/model/vision.py") for name in shares)
    assert any(name.startswith("megatron/core/distributed/param_and_grad_buffer.py") for name in shares)


def test_memory_of_profiled_steps_is_recorded(tmp_path):
    """The peak is the log's, which PyTorch counts; a block is up to 511 bytes larger than what was asked for."""
    words = tiny(tmp_path, "log.record_memory_history=true", "log.profile=[2,3]", "stage.max_steps=3")
    report = virtual_gpu.run("molmo2_nemo.cli.main", *words)
    assert report.returncode == 0, report.output[-3000:]
    assert f"memory: {tmp_path}/pretrain/memory/steps-2-3.rank-0.pickle" in report.output
    found = held(tmp_path, "steps-2-3")
    lines = (tmp_path / "pretrain" / "metrics.jsonl").read_text().splitlines()
    counted = max(json.loads(line)["memory_gib"] for line in lines) * 2**30
    assert found["failed"] is None and found["at"] == sorted(found["at"])
    assert found["peak"] == pytest.approx(counted, rel=0.02)


def test_another_allocator_keeps_no_history(tmp_path):
    """PyTorch refuses to tell of it, which must not end the run: that is the virtual GPU, which has no such memory."""
    words = tiny(tmp_path, "log.record_memory_history=true")
    output = virtual_gpu.run("molmo2_nemo.cli.main", *words, allocator="backend:cudaMallocAsync").output
    said = "log.record_memory_history: the allocator cudaMallocAsync keeps none, only PyTorch's own does; none is"
    assert output.count(said) == 1 and "does not yet support" not in output
    assert "trainer.fit(model, data)" in output and "error of the virtual GPU" in output
