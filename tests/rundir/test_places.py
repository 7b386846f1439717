"""What a user may name where a checkpoint is wanted: understood, or named at once with what to do, by every verb,
before a library that takes seconds to import."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from molmo2_nemo.errors import UserError
from molmo2_nemo.launch.start import resolve_start, start_problems
from molmo2_nemo.rundir import checkpoint_manifest
from molmo2_nemo.rundir.config_file import write_config
from molmo2_nemo.rundir.summary import resolve_checkpoint, write_summary
from molmo2_nemo.settings.compose import compose

STAGES = ("pretrain", "sft", "long")


def saved(stage: Path, step: int) -> Path:
    """A whole checkpoint, of two files."""
    path = stage / "checkpoints" / f"step={step}"
    (path / "weights").mkdir(parents=True)
    (path / "weights" / "metadata.json").write_text("{}")
    (path / "weights" / "0.distcp").write_bytes(bytes(step))
    checkpoint_manifest.write(path, checkpoint_manifest.describe(path, checkpoint_manifest.share(path, 0, 1)))
    return path


def begun(run: Path, name: str, *steps: int, finished: bool = False) -> Path:
    """A stage of a run with checkpoints at these steps."""
    write_config(compose(["recipe=tiny", f"stage={name}", f"output_dir={run}", "stage.max_steps=60"]))
    paths = [saved(run / name, step) for step in steps]
    if finished:
        write_summary(run / name, {"steps": 60, "checkpoint": str(paths[-1])})
    return run / name


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """One of each."""
    root = tmp_path_factory.mktemp("places")
    (root / "hf").mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        (root / "hf" / name).write_text("{}")
    begun(root / "done", "pretrain", 60, finished=True)
    begun(root / "done", "sft", 40, 60, finished=True)
    begun(root / "half", "pretrain", 60, finished=True)
    begun(root / "half", "sft", 20)
    begun(root / "cut", "sft", 9, 20, 30)
    (root / "cut/sft/checkpoints/step=30/weights/0.distcp").write_bytes(b"")
    begun(root / "new", "sft")
    begun(root / "torn", "sft", 20)
    (root / "torn/sft/checkpoints/step=20-unfinished").touch()
    begun(root / "lost", "sft", 60, finished=True)
    shutil.rmtree(root / "lost/sft/checkpoints/step=60")
    begun(root / "quantised", "sft", 20, finished=True)
    (root / "quantised/sft/checkpoints/step=20/weights/modelopt_state").mkdir()
    (root / "empty").mkdir()
    (root / "other").mkdir()
    for name in ("a.tar", "b.tar", "c.tar", "d.tar", "manifest.parquet"):
        (root / "other" / name).touch()
    (root / "file").write_text("no folder\n")
    return root


UNDERSTOOD = {  # what is named -> the checkpoint, and what is said
    "done": ("done/sft/checkpoints/step=60", ""),
    "done/pretrain": ("done/pretrain/checkpoints/step=60", ""),
    "done/sft/checkpoints/step=40": ("done/sft/checkpoints/step=40", ""),
    "done/sft/checkpoints/step=40/weights": ("done/sft/checkpoints/step=40/weights", ""),
    "half": (
        "half/pretrain/checkpoints/step=60",
        "{root}/half/sft is not finished, so the last stage that is: {checkpoint}",
    ),
    "half/sft": (
        "half/sft/checkpoints/step=20",
        "{root}/half/sft is not finished; its last whole checkpoint is used: {checkpoint}",
    ),
    "cut": (
        "cut/sft/checkpoints/step=20",
        "{root}/cut/sft is not finished; its last whole checkpoint is used: {checkpoint} (step=30: not whole)",
    ),
    "cut/sft/checkpoints": (
        "cut/sft/checkpoints/step=20",
        "{root}/cut/sft/checkpoints holds 3 checkpoints; its last whole checkpoint is used: {checkpoint} (step=30: not "
        "whole)",
    ),
}
NAMED = {  # what is named -> what the error says
    "hf": (
        "{place} is a model in Hugging Face format; make a checkpoint of it: molmo2 convert import {place} CHECKPOINT"
    ),
    "new": "{place}/sft: the stage has not saved a checkpoint yet; molmo2 status shows how far it is",
    "new/sft": "{place}: the stage has not saved a checkpoint yet; molmo2 status shows how far it is",
    "torn": "{place}/sft/checkpoints: no checkpoint in it is whole; step=20: it was not written to its end",
    "torn/sft/checkpoints/step=20": "{place} is damaged: it was not written to its end",
    "cut/sft/checkpoints/step=30": (
        "{place} is damaged: weights/0.distcp has 0 bytes, not 30; {root}/cut/sft/checkpoints/step=20 is whole"
    ),
    "lost": "{place}/sft/summary.json names the checkpoint {place}/sft/checkpoints/step=60, which is gone",
    "empty": "{place} is not a checkpoint: it is empty; a checkpoint has weights/, a stage checkpoints/, a run its",
    "other": "{place} is not a checkpoint: it holds a.tar, b.tar, c.tar, d.tar, ...; a checkpoint has weights/",
    "file": "{place} is a file; name the folder of a checkpoint, a stage or a run",
    "absent": "{place}: no such checkpoint or run folder",
    "dome": "{place}: no such checkpoint or run folder; did you mean {root}/done?",
    "done/sft/checkpoints/step=41": (
        "{place}: no such checkpoint or run folder; did you mean {root}/done/sft/checkpoints/step=40?"
    ),
    "quantised": "{root}/quantised/sft/checkpoints/step=20 was converted by modelopt",
    "quantised/sft/checkpoints/step=20": "{place} was converted by modelopt",
    "quantised/sft/checkpoints/step=20/weights": "{place} was converted by modelopt",
}
VERBS = {  # with X for the place
    "train": "train recipe=tiny stage=long parallel=single data.sources.demo.path=absent output_dir=out init_from=X",
    "ask": "ask X What?",
    "generate": "generate X --data absent",
    "evaluate": "evaluate X --data absent",
    "export": "convert export X out",
}


@pytest.mark.parametrize("place", UNDERSTOOD)
def test_what_is_understood(place, places):
    remarks: list[str] = []
    name, said = UNDERSTOOD[place]
    assert resolve_checkpoint(places / place, remarks) == places / name
    assert remarks == ([said.format(root=places, checkpoint=places / name)] if said else [])


@pytest.mark.parametrize("place", NAMED)
def test_what_is_named(place, places):
    with pytest.raises(UserError) as error:
        resolve_checkpoint(places / place)
    assert str(error.value).startswith(NAMED[place].format(root=places, place=places / place))


def test_a_model_of_the_hub_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="download a model of the Hub first, then molmo2 convert import FOLDER"):
        resolve_checkpoint("allenai/Molmo2-4B")


CALLS = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from molmo2_nemo.cli.main import main
import molmo2_nemo.launch.local, molmo2_nemo.processes

HEAVY = ("torch", "nemo", "megatron", "lightning", "transformers", "nemo_run")
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(words)
    loaded = [name for name in HEAVY if name in sys.modules]
    print(json.dumps([code, out.getvalue(), err.getvalue(), loaded]))
"""


# recipes whose data are not here, on this machine and as jobs
LACKING = ("train recipe=8b", "pipeline recipe=8b", "train recipe=8b scale=node cluster.check_memory=false")


def test_every_verb_names_them_before_a_library_is_loaded(places, tmp_path, monkeypatch):
    """One process for all calls: what an earlier one had imported, a later one would be found with."""
    monkeypatch.delenv("MOLMO2_DATA", raising=False)
    table = [(verb, place) for place in NAMED for verb in VERBS]
    words = [[word.replace("X", str(places / place)) for word in VERBS[verb].split()] for verb, place in table]
    words += [call.split() for call in LACKING]
    done = subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps(words)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(words)
    for call in reversed(LACKING):
        code, out, err, loaded = results.pop()
        assert (code, out, loaded) == (2, "", []) and "data sets have no shards" in err, (call, err)
    for (verb, place), (code, out, err, loaded) in zip(table, results, strict=True):
        expected = NAMED[place].format(root=places, place=places / place)
        assert (code, out) == (2, "") and expected in err and err.startswith("molmo2: error: "), (verb, place, err)
        assert err.count("\n") == 1 and not loaded, (verb, place, loaded)
    assert list(tmp_path.iterdir()) == []


def test_training_says_from_where_it_starts(places, capsys):
    cfg = compose(["recipe=tiny", "stage=long", f"init_from='{places}/cut'", f"output_dir={places}/out"])
    resolve_start(cfg)
    assert cfg.init_from == f"{places}/cut/sft/checkpoints/step=20"
    said = capsys.readouterr().out
    assert said.startswith(f"init_from: {places}/cut/sft is not finished; its last whole checkpoint is used: ")


def test_a_stage_of_the_same_run_has_to_be_finished(places):
    """A pipeline's later stages name the one before by its folder."""
    cfg = compose(["recipe=tiny", "stage=long", f"init_from='{places}/cut/sft'", f"output_dir={places}/cut"])
    with pytest.raises(UserError, match="the stage is not finished; name one of its checkpoints, such as .*step=20$"):
        resolve_start(cfg)


@pytest.mark.parametrize("place", ["hf", "other"])
def test_jobs_that_could_never_start_are_not_submitted(place, places):
    """Where a job is submitted, a stage that has nothing yet may be finished when the job begins."""
    cfg = compose(["recipe=tiny", "stage=long", f"init_from='{places}/{place}'"])
    assert list(start_problems(cfg)) == [f"init_from: {NAMED[place].format(place=places / place)}"] or place == "other"
    assert len(list(start_problems(cfg))) == 1
    cfg.init_from = f"{places}/new/sft"
    assert list(start_problems(cfg)) == []
