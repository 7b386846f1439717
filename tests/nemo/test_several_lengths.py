"""Steps with packs of several lengths through the real trainer and the real loader, on texts, pictures and films: every
layout follows one process, dynamic context groups give each length its ranks, and a run resumes anywhere."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from molmo2_nemo.data.config import LengthConfig, SourceConfig
from molmo2_nemo.data.lengths import length_at
from molmo2_nemo.data.shard_writer import write_shards
from tests.data.test_raw_text import record, words
from tests.support.packs import demo_data, shared_packs, tiny_run
from tests.support.thorough import thorough

LENGTHS = [192, 384, 768]
CROPS = [4, 6, 24]
OF_STEP = [192, 768, 192, 384, 384]  # drawn from the default seed
TRACED = ("loss", "grad_norm_vit", "grad_norm_connector", "grad_norm_llm")
EXACT = ("step", *TRACED, "tokens", "crops", "tasks")
CP4 = {"context": 4, "context_ulysses": 2, "dynamic_context": True, "context_tokens": 192, "context_crops": 24}

PAIRS = {"dynamic_context": True, "context_tokens": 400}


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """Raw texts, some of which are cut into pieces of every length."""
    folder = tmp_path_factory.mktemp("books") / "shards"
    sizes = [30, 150, 191, 400, 700, 1000, 1350]
    write_shards(folder, ((f"{n}", record(words(n, n))) for n in sizes))
    return folder


def several(folder, shards, books, steps=4, **layout):
    """Packs of 192, 384 or 768 tokens, as many as make 1,536. `inputs` among the layout is that of `kernels`."""
    inputs = layout.pop("inputs", "plain")
    cfg = tiny_run(folder, steps, **layout)
    cfg.data = demo_data(shards)
    cfg.data.sources["books"] = SourceConfig(path=str(books), rate=0.05, weight=0.05)
    cfg.data.lengths = [LengthConfig(length, 1.0, crops) for length, crops in zip(LENGTHS, CROPS, strict=True)]
    cfg.kernels.inputs, cfg.stage.global_batch_size = inputs, 2
    cfg.stage.optim.final_lr_fraction = 1.0  # else the schedule would depend on the number of steps
    return cfg


def trained(cfg):
    """Job: metrics, and of each step of this rank (ranks that share it, tokens) of each pack."""
    from molmo2_nemo.nemo.train import train
    from molmo2_nemo.rundir.lines import read_metrics
    from molmo2_nemo.rundir.paths import stage_dir

    with shared_packs() as seen:
        train(cfg)
    return read_metrics(stage_dir(cfg)), seen


@pytest.fixture(scope="module")
def single(workers, shards, books, tmp_path_factory):
    cfg = several(tmp_path_factory.mktemp("one"), shards, books, steps=5)
    return workers.run(trained, cfg, ranks=1, fit=True)[0][0]


def follows(got, single):
    for name in TRACED:
        np.testing.assert_allclose([m[name] for m in got], [m[name] for m in single], rtol=1e-5, err_msg=name)
    for name in ("tokens", "crops"):  # dynamic groups leave padding out
        assert [m[name] for m in got] == [m[name] for m in single], name


def test_what_the_steps_hold(single, shards, books, tmp_path):
    """The oracle of this file: all lengths, the same number of tokens in each step, text alone and crops."""
    cfg = several(tmp_path, shards, books)
    assert [LENGTHS[length_at(cfg.data, step)] for step in range(5)] == OF_STEP
    assert [m["padded_tokens"] for m in single] == [2 * 768] * 5
    assert all(m["crops"] for m in single) and {"books", "demo"} == set().union(*(m["tasks"] for m in single[:2]))


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        thorough(4, {"context": 4, "context_ulysses": 2}),
        (2, {"pipeline": 2, "inputs": "ahead"}),
        thorough(4, {"pipeline": 2, "tensor": 2, "sequence": True, "cut_padding": True}),
        (4, CP4),
        thorough(4, {"tensor": 2, "sequence": True, "context": 2, **PAIRS}),
        (4, {"pipeline": 2, "context": 2, "inputs": "ahead", **PAIRS}),
    ],
    ids=lambda x: "+".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else f"{x} processes",
)
def test_layouts_follow_one_process(workers, shards, books, single, tmp_path, ranks, layout):
    results = workers.run(trained, several(tmp_path, shards, books, **layout), ranks=ranks, fit=True)
    follows(results[0][0], single[:4])


def test_each_length_gets_its_ranks(workers, shards, books, tmp_path):
    """One pack of 768 is shared by all four, two of 384 by two each, four of 192 are one rank's each, although a rank
    has memory for any."""
    cfg = several(tmp_path, shards, books, **CP4 | {"context_tokens": 768})
    cfg.stage.global_batch_size = 1
    for _, steps in workers.run(trained, cfg, ranks=4, fit=True):
        assert [[ranks for ranks, _ in step] for step in steps] == [[length // 192] for length in OF_STEP[:4]]


def test_a_run_resumes_anywhere(workers, shards, books, single, tmp_path):
    """Two steps and three more are five to the last bit; after two steps any layout goes on: with one replica by the
    same packs, with two by those that two have in any layout."""

    def run(name, steps, ranks, layout):
        return workers.run(trained, several(tmp_path / name, shards, books, steps, **layout), ranks=ranks, fit=True)

    def resumed(name, *parts):
        shutil.copytree(tmp_path / "begun", tmp_path / name)
        return [run(name, *part) for part in parts][-1]

    whole = run("whole", 5, 4, CP4)[0][0]
    run("begun", 2, 4, CP4)
    again = resumed("again", (5, 4, CP4))[0][0]
    assert [{k: m[k] for k in EXACT} for m in again] == [{k: m[k] for k in EXACT} for m in whole]
    pairs = CP4 | {"context": 2, "context_tokens": 384}
    follows(resumed("fewer", (4, 2, pairs), (5, 1, {}))[0][0], single)
    replicas = resumed("replicas", (5, 4, pairs | {"data": 2}))
    follows(replicas[0][0], resumed("plain", (5, 2, {"data": 2}))[0][0])
    assert [m["tokens"] for m in replicas[0][0]][:2] == [m["tokens"] for m in single][:2]
    for step, length in enumerate(OF_STEP[2:]):
        packs = [pack for _, steps in replicas for pack in steps[step]]
        assert sum(1 / ranks for ranks, _ in packs) == 1536 / length and max(n for _, n in packs) <= length
