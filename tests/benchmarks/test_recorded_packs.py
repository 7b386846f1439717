"""Recorded packs: what the loader's micro-batches are made of, kept in a file for the simulation."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import numpy as np
import pytest

from benchmarks import dynamic_cp, record_packs
from molmo2_nemo.cost.layout import Layout
from molmo2_nemo.data.counts import PackCounts
from molmo2_nemo.errors import UserError
from tests.support.packs import demo_packs, text_only

HEAD = {"sequence_length": 768, "max_crops": 24}


def test_what_was_recorded_is_read_again(tmp_path):
    batches = demo_packs(12)
    packs = [PackCounts.of(batch) for batch in [*batches, text_only(batches[0])]]
    path = tmp_path / "packs.jsonl"
    record_packs.write(path, HEAD, packs)
    head, found = record_packs.read(path)
    assert head == HEAD and len(found) == len(packs)
    for one, other in zip(packs, found, strict=True):
        for field in fields(PackCounts):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_dynamic_is_never_predicted_to_be_slower():
    """Than the same group size without padding, whatever a rank has memory for."""
    step = dynamic_cp.Step([PackCounts.of(batch) for batch in demo_packs(12)], 768, 24)
    cost = replace(dynamic_cp.context_cost(dynamic_cp.preset("8b")), layout=Layout())
    work = np.array([dynamic_cp.work_of(pack, cost.step.model_config) for pack in step.packs], np.int64)
    for gpus in (32, 96):
        seconds = {}
        for name in ("static 8", "static 8, cut", "dynamic 8", "dynamic 8, crops"):
            layout = dynamic_cp.LAYOUTS[name]
            seconds[name] = dynamic_cp.step_seconds(dynamic_cp.table_of(step, cost, layout), work, gpus, layout)
        assert 0 < seconds["dynamic 8"] <= seconds["static 8, cut"] <= seconds["static 8"]
        assert seconds["dynamic 8, crops"] <= seconds["static 8, cut"]


@pytest.mark.parametrize("text", ["", "{}", json.dumps(HEAD) + "\n[1]", json.dumps(HEAD) + '\n{"tokens": 1}'])
def test_another_file_is_named(tmp_path, text, capsys):
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="other.jsonl"):
        record_packs.read(path)
    assert dynamic_cp.main(["--recorded", str(path)]) == 2 and "other.jsonl" in capsys.readouterr().err


def test_too_few_packs_are_refused(tmp_path):
    path = tmp_path / "packs.jsonl"
    record_packs.write(path, HEAD, [PackCounts.of(batch) for batch in demo_packs(12)])
    with pytest.raises(UserError, match="12 packs, but a step takes 128"):
        dynamic_cp.recorded_steps(path)
