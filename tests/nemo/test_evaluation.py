"""Tasks evaluated during training: without a trace in it, and with the scores that `molmo2 evaluate` finds."""

from __future__ import annotations

import contextlib
import html
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from molmo2_nemo.cli.main import main
from tests.support.packs import demo_data, demo_packs, tiny_run, train_on_packs
from tests.support.thorough import mostly

ITEMS = 5
LAYOUTS = {  # name -> settings of the layout, ranks
    "one": ({}, 1),
    "dp2, parameters gathered beside computation": ({"overlap_param_gather": True, "overlap_grad_reduce": True}, 2),
    "tp2 sp": ({"tensor": 2, "sequence": True}, 2),
    "cp2": ({"context": 2}, 2),
}


def learning_run(folder: Path, shards: Path, tasks: bool = True, **layout: Any) -> Any:
    cfg = tiny_run(folder, 3)
    cfg.data, cfg.stage.residual_dropout = demo_data(shards), 0.1
    for name, value in layout.items():
        setattr(cfg.parallel, name, value)
    if tasks:
        cfg.evaluation.tasks, cfg.evaluation.data = ["auto"], str(shards / "sft")
        cfg.evaluation.every, cfg.evaluation.limit, cfg.evaluation.max_new_tokens = 1, ITEMS, 4
    return cfg


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "sft" / "evaluation.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trace(metrics: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    return [(m["loss"], m["grad_norm_vit"], m["grad_norm_llm"]) for m in metrics]


def verb(call: list[str]) -> tuple[int, str]:
    """Job: a verb on this process alone."""
    from tests.support.pool import start_megatron

    start_megatron()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        return main(call), said.getvalue()


@pytest.mark.parametrize("layout", mostly(LAYOUTS, "dp2, parameters gathered beside computation", "cp2"))
def test_it_leaves_no_trace_and_finds_what_the_verb_finds(workers, shards, tmp_path, layout):
    from molmo2_nemo.rundir.config_file import write_config

    settings, ranks = LAYOUTS[layout]
    found = []
    for tasks in (True, False):
        cfg = learning_run(tmp_path / str(tasks), shards, tasks, **settings)
        write_config(cfg)
        found.append(trace(workers.run(train_on_packs, cfg, demo_packs(20), ranks=ranks, fit=True)[0]))
    assert found[0] == found[1]
    done = lines(tmp_path / "True")
    assert [line["step"] for line in done] == [1, 2, 3] and not lines(tmp_path / "False")
    assert done[0]["counts"]["sft"]["questions"] > ITEMS and set(done[0]["groups"]) == {"own data"}
    stage, out = tmp_path / "True" / "sft", tmp_path / "verb"
    call = ["evaluate", str(stage), "--data", str(shards / "sft"), "--limit", str(ITEMS), "--max-new-tokens", "4"]
    code, _ = workers.run(verb, [*call, "--out", str(out)])[0]
    assert code == 0
    inside, outside = ((folder / "sft.jsonl").read_text() for folder in (stage / "evaluation" / "step=3", out))
    assert inside == outside
    assert (
        sorted(p.name for p in (stage / "evaluation" / "step=3").glob("*.jpg"))
        == sorted(p.name for p in out.glob("*.jpg"))
        != []
    )


@pytest.fixture(scope="module")
def evaluated(workers, shards, tmp_path_factory) -> Path:
    """The folder of a run with scores, its settings and its summary beside them."""
    from molmo2_nemo.rundir.config_file import write_config

    folder = tmp_path_factory.mktemp("evaluated")
    cfg = learning_run(folder, shards)
    cfg.evaluation.limit = 3
    write_config(cfg)
    workers.run(train_on_packs, cfg, demo_packs(20), fit=True)
    return folder


def test_status_and_report_show_scores_and_answers(evaluated, tmp_path, capsys):
    assert main(["status", str(evaluated)]) == 0
    assert "sft: scores at step 3: sft " in capsys.readouterr().out
    assert main(["report", str(evaluated), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Scores of evaluation.tasks in percent" in page and "sft, sft, step=3" in page
    (first, *_) = [json.loads(line) for line in (evaluated / "sft" / "evaluation" / "step=3" / "sft.jsonl").open()]
    assert html.escape(" ".join(first["question"].split())) in page and "src='data:image/jpeg;base64," in page


def test_stages_are_compared_at_the_end_of_a_pipeline(evaluated, shards):
    from molmo2_nemo.launch.pipeline import scores_of_stages
    from molmo2_nemo.rundir.paths import SUMMARY

    cfg = learning_run(evaluated, shards)
    title, group, *rows = scores_of_stages([cfg]).splitlines()
    assert title.split() == ["sft"] and group.startswith("own data") and rows[0].split()[0] == "sft"
    (evaluated / "sft" / SUMMARY).rename(evaluated / "away")
    try:
        assert scores_of_stages([cfg]) == ""  # a stage that is not finished
    finally:
        (evaluated / "away").rename(evaluated / "sft" / SUMMARY)


def told_to_leave(cfg: Any, packs: list[Any], item: int) -> str:
    """Train; rank 1 gets SIGUSR1 when it asks about an item after the first step."""
    from molmo2_nemo.errors import Preempted
    from molmo2_nemo.evaluation import run

    original = run._answered

    def answered(task: Any, items: Any, numbers: Any, *rest: Any) -> Any:
        if os.environ["RANK"] == "1" and item in numbers:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(task, items, numbers, *rest)

    run._answered, rounds, run.ROUND = answered, run.ROUND, 1
    try:
        train_on_packs(cfg, packs)
    except Preempted as stop:
        return str(stop)
    finally:
        run._answered, run.ROUND = original, rounds
    return ""


def test_a_signal_ends_it_and_it_is_done_when_the_run_goes_on(workers, shards, tmp_path):
    whole, broken = (learning_run(tmp_path / name, shards) for name in ("whole", "broken"))
    workers.run(train_on_packs, whole, demo_packs(20), ranks=2, fit=True)
    ended = workers.run(told_to_leave, broken, demo_packs(20), 1, ranks=2, fit=True)
    assert all(text.startswith("SIGUSR1: step 1 is saved") for text in ended) and not lines(tmp_path / "broken")
    workers.run(train_on_packs, broken, demo_packs(20), ranks=2, fit=True)
    kept = [[(v["step"], v["tasks"], v["counts"]) for v in lines(tmp_path / name)] for name in ("broken", "whole")]
    assert kept[0] == kept[1] and [step for step, *_ in kept[0]] == [1, 2, 3]


def test_a_signal_at_the_last_step_costs_scores_that_the_same_command_makes_up_for(workers, shards, tmp_path, capsys):
    """The stage is finished, says what is missing, and has nothing to train when it goes on."""
    from molmo2_nemo.launch.reports import show_finished
    from molmo2_nemo.launch.start import finished_before
    from molmo2_nemo.rundir.config_file import write_config
    from molmo2_nemo.rundir.summary import read_summary

    whole, broken = (learning_run(tmp_path / name, shards) for name in ("whole", "broken"))
    for cfg in (whole, broken):
        cfg.stage.max_steps = 1
        write_config(cfg)
    workers.run(train_on_packs, whole, demo_packs(20), ranks=2, fit=True)
    assert workers.run(told_to_leave, broken, demo_packs(20), 1, ranks=2, fit=True) == ["", ""]
    before = read_summary(tmp_path / "broken" / "sft")
    assert before is not None and before["steps"] == 1 and not lines(tmp_path / "broken")
    show_finished(broken)
    assert "missing: scores of step 1; the same command makes up for it" in capsys.readouterr().out
    assert finished_before(broken) is None  # processes start
    workers.run(train_on_packs, broken, demo_packs(20), ranks=2, fit=True)
    show_finished(broken)
    assert "missing" not in capsys.readouterr().out and finished_before(broken) == before
    kept = [[(v["step"], v["tasks"], v["counts"]) for v in lines(tmp_path / name)] for name in ("broken", "whole")]
    assert kept[0] == kept[1] and [step for step, *_ in kept[0]] == [1]


def fails(cfg: Any, packs: list[Any], step: int) -> str:
    """Train; the evaluation after a step ends in an error."""
    from molmo2_nemo.training import evaluating

    original = evaluating.said_of_media

    def said(generator: Any) -> list[str]:
        if len(lines(Path(cfg.output_dir))) == step - 1:
            raise RuntimeError("no memory left")
        return original(generator)

    evaluating.said_of_media = said
    try:
        train_on_packs(cfg, packs)
    except RuntimeError as error:
        return str(error)
    finally:
        evaluating.said_of_media = original
    return ""


@pytest.mark.parametrize("step", [2, 3])
def test_an_evaluation_that_fails_costs_no_step(workers, shards, tmp_path, step):
    """A checkpoint that is due is written before; the last step's always is."""
    from molmo2_nemo.rundir.checkpoint_manifest import newest_whole

    whole, broken = (learning_run(tmp_path / name, shards) for name in ("whole", "broken"))
    whole.save_every = broken.save_every = 2
    expected = workers.run(train_on_packs, whole, demo_packs(20), fit=True)[0]
    assert workers.run(fails, broken, demo_packs(20), step, fit=True) == ["no memory left"]
    newest = newest_whole(tmp_path / "broken" / "sft" / "checkpoints")
    assert newest is not None and newest.name == f"step={step}"
    assert trace(workers.run(train_on_packs, broken, demo_packs(20), fit=True)[0]) == trace(expected)
    kept = [[(v["step"], v["tasks"], v["counts"]) for v in lines(tmp_path / name)] for name in ("broken", "whole")]
    assert kept[0] == kept[1] and [step for step, *_ in kept[0]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["evaluation.tasks=[aoto]"], "evaluation: unknown task 'aoto'; did you mean 'auto'?"),
        (["evaluation.tasks=[auto]"], "the task auto and the data belong together"),
        (["evaluation.tasks=[auto]", "evaluation.data=nowhere"], "no folder at nowhere"),
        (["evaluation.data=nowhere"], "without evaluation.tasks=[auto]"),
        (["evaluation.every=0"], "evaluation.every=0"),
        (["evaluation.tasks=[auto]", "parallel.pipeline=2"], "pipeline stages cannot generate answers"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_training(tmp_path, shards, capsys, settings, expected):
    call = ["train", "recipe=tiny", "stage=sft", f"output_dir={tmp_path / 'run'}", *settings]
    assert main(call) == 2
    assert expected in capsys.readouterr().err
