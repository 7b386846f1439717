"""Recorded packs: kept in a file, read again, planned with, and shared out over static and dynamic context groups."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from molmo2_nemo.cli.main import main
from molmo2_nemo.cost.context import ContextCost
from molmo2_nemo.cost.efficiency import EFFICIENCIES
from molmo2_nemo.cost.hardware import parse_cluster
from molmo2_nemo.cost.step import StepCost
from molmo2_nemo.cost.workload import workload
from molmo2_nemo.data.counts import PackCounts
from molmo2_nemo.data.length_stream import LengthStream
from molmo2_nemo.errors import UserError
from molmo2_nemo.model.config import preset
from molmo2_nemo.plan import recording
from molmo2_nemo.plan.groups import Groups, Step, simulate, step_seconds, table_of, work_of
from molmo2_nemo.settings.compose import compose
from molmo2_nemo.settings.run import data_config
from tests.support.packs import demo_packs, text_only
from tests.support.shards import demo_shards

HEAD = {"sequence_length": 768, "max_crops": 24}
RUN = ["recipe=tiny", "stage=sft", "data.packing.sequence_length=768", "data.packing.max_crops=24"]
GPUS = ["cluster=h100x4", "stage.global_batch_size=4"]


def test_what_was_recorded_is_read_again(tmp_path):
    batches = demo_packs(12)
    packs = [PackCounts.of(batch) for batch in [*batches, text_only(batches[0])]]
    path = tmp_path / "packs.jsonl"
    recording.write(path, HEAD, packs)
    found = recording.read(path)
    assert found.head == HEAD and len(found.packs) == len(packs)
    for one, other in zip(packs, found.packs, strict=True):
        for field in fields(PackCounts):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))
    cfg = compose(RUN)
    work = found.workload(cfg, workload(cfg))
    real = [(b.example_ids >= 0).sum() for b in batches] + [(batches[0].example_ids >= 0).sum()]
    assert work.tokens == pytest.approx(np.mean(real))
    crops = np.mean([len(b.crops) for b in batches] + [0])
    assert (work.crops, work.length, work.packs) == (pytest.approx(crops), 768, cfg.stage.global_batch_size)
    assert work.scored == pytest.approx(np.mean([(b.loss_weights > 0).sum() for b in [*batches, batches[0]]]))


def test_dynamic_is_never_predicted_to_be_slower():
    """Than the same group size without padding, whatever a rank has memory for."""
    model, step = preset("8b"), Step([PackCounts.of(batch) for batch in demo_packs(12)], 768, 24)
    cost = ContextCost(StepCost(model, efficiency=EFFICIENCIES["flash2"]), ulysses=8)
    work = np.array([work_of(pack, model) for pack in step.packs], np.int64)
    for gpus in (32, 96):
        padded, static, dynamic, few_crops = (
            step_seconds(table_of(step, cost, groups), work, gpus, groups)
            for groups in (Groups(8, False, cut=False), Groups(8, False), Groups(8, True), Groups(8, True, crops=1 / 8))
        )
        assert 0 < dynamic <= static <= padded and few_crops <= static


def test_groups_of_a_cluster(tmp_path):
    """One pack per step and group: a static step is its slowest pack, by the cost model alone."""
    path, packs = tmp_path / "packs.jsonl", [PackCounts.of(batch) for batch in demo_packs(8)]
    recording.write(path, HEAD, packs)
    cfg, model = compose([*RUN, "stage.global_batch_size=4"]), preset("8b")
    found = simulate(cfg, model, recording.read(path), parse_cluster("h100x8", 4), EFFICIENCIES["flash2"])
    assert (found.packs, found.steps, found.left_out) == (4, 2, [])
    cost = ContextCost(StepCost(model, cfg.stage.trainable(model), memory=cfg.memory), ulysses=8)
    cost = replace(cost, layout=replace(cost.layout, recompute="full"))
    slowest = [max(cost.microseconds(pack, 8) for pack in packs[i : i + 4]) for i in (0, 4)]
    assert found.seconds["static 8, padding cut"] == pytest.approx(np.mean(slowest) * 1e-6)
    three = simulate(cfg, model, recording.read(path), parse_cluster("h100x8", 3), EFFICIENCIES["flash2"])
    assert three.seconds == {} and three.left_out == [
        "8 ranks: 3 replicas do not divide 4 packs",
        "32 ranks: do not divide 24 GPUs",
    ]


def test_record_and_plan_as_a_user(tmp_path, monkeypatch, capsys):
    file = tmp_path / "packs.jsonl"
    settings = [*RUN, f"data.sources.demo.path={demo_shards()}/sft", "data.num_workers=0", "stage.global_batch_size=4"]
    assert main(["plan", *settings, "--record", str(file), "--count", "5"]) == 0
    assert "5 packs" in capsys.readouterr().out
    head = json.loads(file.read_text().splitlines()[0])
    assert head["sources"] == ["demo"] and not any("/" in word for word in head["overrides"])
    assert main(["plan", *RUN, *GPUS, "--packs", str(file)]) == 0
    out = capsys.readouterr().out
    assert "context groups; steps of 4 packs" in out and "dynamic 4 " in out and "1 recorded step;" in out
    assert f"of {file}".split("/")[-1] in out.replace("\n", "") and max(map(len, out.splitlines())) <= 80
    assert main(["plan", *RUN, *GPUS, "--packs", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    counts = recording.read(file).packs
    assert found["workload"]["area"] == pytest.approx(np.mean([p.pairs for p in counts]) / 768**2)
    assert set(found["groups"]["seconds"]) > {"static 4", "dynamic 4"}


def test_of_several_lengths_the_longest_is_recorded_and_planned(tmp_path, capsys):
    """Each record is in packs of the length that it has in training."""
    file, lengths = tmp_path / "packs.jsonl", "data.lengths=[{sequence_length: 256}, {sequence_length: 768}]"
    settings = [*RUN, f"data.sources.demo.path={demo_shards()}/sft", "stage.global_batch_size=4", lengths]
    assert main(["plan", *settings, "--record", str(file)]) == 0
    stream = LengthStream(data_config(compose(settings)), micro_batch_size=1, dp_rank=0, dp_size=1, batches_per_step=4)
    longest = islice((PackCounts.of(batch) for batch in stream if batch.input_ids.shape[1] == 768), 4)
    found = recording.read(file).packs
    assert [(p.tokens, p.crops) for p in found] == [(p.tokens, p.crops) for p in longest]
    capsys.readouterr()
    for words, crops in (
        (lengths, "may have 3 times the crops, which takes longer than planned"),
        (lengths.replace("256", "256, max_crops: 8"), "no more crops"),
    ):
        assert main(["plan", *RUN, *GPUS, words, "--packs", str(file), "--json"]) == 0
        (remark,) = (text for text in json.loads(capsys.readouterr().out)["remarks"] if "data.lengths" in text)
        assert "steps of the longest packs (768 tokens)" in remark and crops in remark


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--packs", "FILE", "data.packing.max_crops=48"], "made with data.packing.max_crops=24, this run has 48"),
        (["--packs", "FILE", "stage.global_batch_size=128"], "12 packs, but a step takes 128; record as many"),
        (["--packs", "FILE", "--area", "0.5"], "--area and --packs: a recording has the mask's share"),
        (["--packs", "absent.jsonl"], "absent.jsonl: not a file of molmo2 plan --record"),
        (["--count", "3"], "--count belongs to --record"),
        (["--record", "FILE", "--count", "0"], "--count 0: must be at least 1"),
        (["--record", "OTHER", "data.lengths=[{sequence_length: 512}]"], "data.lengths ends at 512 tokens"),
        (["--rates", "FILE"], "--rates FILE: expected a JSON object of names and numbers"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    recording.write(Path("FILE"), HEAD, [PackCounts.of(batch) for batch in demo_packs(12)])
    assert main(["plan", *RUN, *GPUS, *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "{}", json.dumps(HEAD), json.dumps(HEAD) + "\n[1]", json.dumps(HEAD) + '\n{"a": 1}']
)
def test_another_file_is_named(tmp_path, text):
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="other.jsonl"):
        recording.read(path)
