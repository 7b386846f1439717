"""Loss on held-out data: against every example scored by itself, and without a trace in training."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

import data_prep
from molmo2_nemo.data.config import SourceConfig
from molmo2_nemo.data.shard_writer import write_shards
from tests.support.packs import demo_data, demo_packs, tiny_run, train_on_packs

EXAMPLES = 9


def scored_alone(cfg, path: str, count: int) -> float:
    """The weighted mean loss of a fresh model over examples, each in a pack of its own."""
    import dataclasses

    from megatron.core import parallel_state

    from molmo2_nemo.data.collate import collate
    from molmo2_nemo.data.reader import ExampleReader, default_builder
    from molmo2_nemo.model.config import preset
    from molmo2_nemo.model.decoder import transformer_config
    from molmo2_nemo.model.inputs import PackInputs
    from molmo2_nemo.model.molmo2 import Molmo2Model
    from tests.support.pool import start_megatron

    start_megatron()
    molmo2 = preset("tiny")
    config = transformer_config(molmo2, use_cpu_initialization=True)
    model = Molmo2Model(molmo2, config, training=cfg.stage.training_options(), seed=cfg.seed).eval()
    data = dataclasses.replace(cfg.data, sources={"held": SourceConfig(path=path)})
    builder, im_patch = default_builder(data)
    reader = ExampleReader(data, builder, im_patch)
    assert parallel_state.get_tensor_model_parallel_world_size() == 1
    total = weight = 0.0
    for n in range(count):
        example = reader[n]
        length = -(-example.num_tokens // 64) * 64
        inputs = PackInputs.from_batch(collate([[example]], sequence_length=length, im_patch_id=im_patch))
        total += float(model(inputs).loss.detach())
        weight += float(example.loss_weights.clip(0).sum())
    return total / weight


def test_validation_scores_examples_and_leaves_training_alone(workers, shards, tmp_path):
    """A run whose rates are 0 keeps its first weights. Then one that learns, with and without, dropout on."""
    packs = demo_packs(20)
    still = tiny_run(tmp_path / "still", 1)
    still.data = demo_data(shards)
    still.validation.sources, still.validation.examples = {"held": SourceConfig(path=str(shards / "sft"))}, EXAMPLES
    for group in (still.stage.optim.vit, still.stage.optim.connector, still.stage.optim.llm):
        group.lr = 0.0
    workers.run(train_on_packs, still, packs, fit=True)
    (line,) = lines(tmp_path / "still")
    alone = workers.run(scored_alone, still, str(shards / "sft"), EXAMPLES)[0]
    assert line["losses"]["held"] == pytest.approx(alone, rel=1e-5)


@pytest.fixture(scope="module")
def learned(workers, shards, tmp_path_factory):
    """Three steps with validation after each, and their metrics."""
    from molmo2_nemo.rundir.config_file import write_config

    folder = tmp_path_factory.mktemp("learned")
    cfg = learning_run(folder, shards)
    cfg.validation.sources, cfg.validation.examples = {"held": SourceConfig(path=str(shards / "sft"))}, EXAMPLES
    cfg.validation.every = 1
    write_config(cfg)
    return folder, workers.run(train_on_packs, cfg, demo_packs(20), fit=True)[0]


def learning_run(folder, shards):
    cfg = tiny_run(folder, 3)
    cfg.data, cfg.stage.residual_dropout = demo_data(shards), 0.1
    return cfg


def test_validation_leaves_no_trace_in_training(workers, shards, learned, tmp_path):
    folder, metrics = learned
    without = workers.run(train_on_packs, learning_run(tmp_path, shards), demo_packs(20), fit=True)[0]
    traced = [[(m["loss"], m["grad_norm_vit"], m["grad_norm_llm"]) for m in run] for run in (metrics, without)]
    assert traced[0] == traced[1]
    assert [line["step"] for line in lines(folder)] == [1, 2, 3]
    assert lines(folder)[2]["losses"]["held"] < lines(folder)[0]["losses"]["held"]
    assert not (tmp_path / "sft" / "validation.jsonl").exists()


def test_what_held_out_data_lose_is_counted(workers, shards, tmp_path):
    """Two replicas share three records: one has an image too many, one a picture that is none."""
    question = {"style": "user_qa", "question": "Which animal?", "answer": "a cat"}
    picture = (Path(data_prep.__file__).parent / "demo_media" / "cat.jpg").read_bytes()

    def record(key: str, *pictures: bytes) -> tuple[str, dict[str, bytes]]:
        media = {f"{i}.jpg": content for i, content in enumerate(pictures)}
        return key, {"json": json.dumps({"images": sorted(media), "annotations": [question]}).encode(), **media}

    records = [record("a", picture, picture), record("b", picture), record("c", b"no picture")]
    write_shards(tmp_path / "held", records)
    cfg = learning_run(tmp_path / "run", shards)
    cfg.data.image.max_images, cfg.stage.max_steps = 1, 1
    cfg.validation.sources = {"held": SourceConfig(path=str(tmp_path / "held"))}
    workers.run(train_on_packs, cfg, demo_packs(8), ranks=2, fit=True)
    (line,) = lines(tmp_path / "run")
    counts = line["counts"]["held"]
    assert line["skipped"] == 1 and counts["examples"] == {"count": 2}
    assert counts["ignored"] == {"count": 1, "first": "held-000000.tar:a"}
    assert [(k, v["first"]) for k, v in counts.items() if k.startswith("skipped")] == [
        ("skipped: bad media", "held-000000.tar:c")
    ]


def told_to_leave(cfg, packs: list, step: int, record: int) -> tuple[str, list[dict]]:
    """Train; rank 1 gets SIGUSR1 while it reads its so many-th record for the validation after `step`."""
    from molmo2_nemo.data.reader import ExampleReader
    from molmo2_nemo.errors import Preempted

    original, read = ExampleReader.whole, []

    def whole(self, n: int):
        if (Path(cfg.output_dir) / "sft" / "metrics.jsonl").read_text().count("\n") == step:
            read.append(n)
        if len(read) == record and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, n)

    ExampleReader.whole = whole
    try:
        train_on_packs(cfg, packs)
    except Preempted as stop:
        return str(stop), lines(Path(cfg.output_dir))
    finally:
        ExampleReader.whole = original
    return "", lines(Path(cfg.output_dir))


def test_a_signal_ends_validation_and_it_is_done_later(workers, shards, tmp_path):
    """Two replicas with unlike numbers of packs; the run ends at the step, not the one after. What is found out when it
    goes on is what an unbroken run finds out."""
    whole, broken = learning_run(tmp_path / "whole", shards), learning_run(tmp_path / "broken", shards)
    for cfg in (whole, broken):
        cfg.validation.sources = {name: SourceConfig(path=str(shards / "sft")) for name in ("first", "second")}
        cfg.validation.examples, cfg.validation.every, cfg.stage.max_steps = 5, 1, 2
    workers.run(train_on_packs, whole, demo_packs(20), ranks=2, fit=True)
    ended = workers.run(told_to_leave, broken, demo_packs(20), 1, 2, ranks=2, fit=True)
    assert all(text.startswith("SIGUSR1: step 1 is saved") for text, _ in ended)
    assert ended[0][1] == []
    workers.run(train_on_packs, broken, demo_packs(20), ranks=2, fit=True)
    found, expected = [
        [(v["step"], v["losses"]) for v in lines(folder)] for folder in (tmp_path / "broken", tmp_path / "whole")
    ]
    assert found == expected and [step for step, _ in found] == [1, 2]


def answers(checkpoint: Path, shards: str, picture: bytes) -> tuple[list[dict], list[dict], str, list[str]]:
    from molmo2_nemo.inference.generate import answer, answer_prompts, answer_records
    from molmo2_nemo.inference.prompt import Prompt
    from molmo2_nemo.inference.sampling import Sampling

    prompt = Prompt("What is this?", [picture], reference="R")
    six = Prompt("What is this?", [picture] * 5 + [picture[: len(picture) // 2]], reference="R")
    three = Sampling(max_new_tokens=3)
    records, remarks = list(answer_records(checkpoint, shards, 4, three)), []
    return (
        records,
        list(answer_prompts(checkpoint, [prompt, six], three)),
        answer(checkpoint, Prompt("What is this?", [picture]), three, remarks=remarks),
        remarks,
    )


def test_answers_beside_their_references(workers, shards, learned):
    """References are what the shards' annotations say, never shown in the prompt; a prompt gets what `ask` answers."""
    from data_prep.demo_records import CAPTIONS

    picture = (Path(data_prep.__file__).parent / "demo_media" / "cat.jpg").read_bytes()
    checkpoint = learned[0] / "sft" / "checkpoints" / "step=3"
    records, prompts, asked, remarks = workers.run(answers, checkpoint, str(shards / "pretrain"), picture)[0]
    assert len(records) == 4 and len({r["key"] for r in records}) == 4
    assert any(r["reference"] in CAPTIONS.values() for r in records)
    assert all(r["reference"] and r["reference"] not in r["question"] for r in records)
    only, six = prompts
    assert (only["answer"], only["reference"], only["key"]) == (asked, "R", "prompt 1")
    cut = ["the answer is cut off after 3 tokens"]
    assert remarks == only["remarks"] == cut and all(r["remarks"] in (cut, []) for r in records)
    assert six["remarks"] == ["1 images after the first 5, left out (data.image.max_images=5)", *cut]


def lines(folder: Path) -> list[dict]:
    path = folder / "sft" / "validation.jsonl"
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
