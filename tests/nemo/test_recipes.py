"""Every recipe of the long-context papers: its numbers, its Slurm scripts, and all its stages at the tiny scale."""

from __future__ import annotations

from pathlib import Path

import pytest

from molmo2_nemo.cli.main import main
from molmo2_nemo.launch.pipeline import compose_stages, run_stages
from molmo2_nemo.rundir.config_file import write_config
from molmo2_nemo.rundir.lines import read_metrics
from molmo2_nemo.rundir.paths import stage_dir
from molmo2_nemo.rundir.progress import read_run
from molmo2_nemo.settings.checks import find_problems
from molmo2_nemo.settings.schema import read_yaml

ROOT = Path(__file__).parents[2]

# Typed in from the sources that each recipe's README names: tokens of a pack, packs of a step, steps, the language
# model's rate and warm-up, frames (None: no videos), what learns (vision encoder, connector, language model).
SOURCES = {
    "longvila": {
        "align": (2536, 256, 2200, 2e-5, 2000, None, "c"),
        "pretrain": (2536, 128, 32000, 5e-5, 960, None, "cl"),
        "sft": (16384, 128, 30000, 2e-5, 900, 128, "cl"),
        "extend": (262144, 256, 120, 2e-5, 2, None, "l"),
        "long": (131072, 128, 720, 2e-5, 22, 1024, "vcl"),
    },
    "omnilong": {
        "extend": (131072, 32, 286, 2e-5, 2, None, "l"),
        "text_sft": (131072, 32, 100, 1e-5, 10, None, "l"),
        "video_sft": (131072, 32, 40, 1e-5, 4, 1024, "vcl"),
    },
    "longvita": {
        "pretrain": (2536, 128, 32000, 2e-5, 2000, None, "vcl"),
        "sft": (16384, 128, 30000, 1e-5, 200, 128, "vcl"),
        "long128k": (131072, 2, 1000, 5e-6, 30, 512, "cl"),
        "long1m": (1048576, 8, 500, 5e-6, 15, 4096, "cl"),
    },
    "nano": {
        "pretrain": (4096, 512, 32000, 1e-4, 2000, None, "cl"),
        "sft": (4096, 512, 30000, 5e-5, 1000, 40, "cl"),
        "long": (36864, 512, 2000, 3e-5, 100, 384, "cl"),
    },
}
LACKING = ("data.sources", "data.tokenizer", "6 of 6 data sets", "118 of 118 data sets", "4 of 4 data sets")


@pytest.mark.parametrize("recipe", SOURCES)
def test_numbers_of_the_sources(recipe, capsys):
    configs = compose_stages([f"recipe={recipe}"])
    assert [c.stage.name for c in configs] == list(SOURCES[recipe])
    for cfg in configs:
        length, packs, steps, rate, warmup, frames, learns = SOURCES[recipe][cfg.stage.name]
        stage = cfg.stage
        assert (cfg.data.packing.sequence_length, stage.global_batch_size, stage.max_steps) == (length, packs, steps)
        assert (stage.optim.llm.lr, stage.optim.llm.warmup_steps) == (rate, warmup)
        assert frames is None or cfg.data.video.max_frames == frames
        trained = {"v": stage.train_vit, "c": stage.train_connector, "l": stage.train_llm}
        assert "".join(part for part, is_trained in trained.items() if is_trained) == learns
        assert [p for p in find_problems(cfg) if not p.startswith(LACKING)] == []
    if recipe == "omnilong":
        assert 1.15e9 < 131072 * 32 * configs[0].stage.max_steps < 1.25e9  # tokens
    if recipe == "nano":
        weights = {source.weight for source in configs[1].data.sources.values()}
        assert weights == {None, 1.0, 1.5, 2.0} and not configs[1].data.text.root_length_weight  # None: 1 then
        assert configs[1].data.sources["mevis_track"].weight == configs[1].data.sources["cosyn_point"].weight == 2.0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("recipe", ["4b", "8b", "o7b", "needle", "tiny", *SOURCES])
def test_what_cfg_job_prints_is_what_would_run(recipe, capsys):
    """Of every stage, read back: the same settings."""
    for cfg in compose_stages([f"recipe={recipe}"]):
        assert main(["train", f"recipe={recipe}", f"stage={cfg.stage.name}", "--cfg", "job"]) == 0
        assert read_yaml(capsys.readouterr().out, "what was printed") == cfg


@pytest.mark.parametrize("recipe", SOURCES)
def test_the_jobs_wait_for_each_other(recipe, capsys, tmp_path):
    assert main(["pipeline", f"recipe={recipe}", "cluster=slurm", f"output_dir={tmp_path}", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    names = list(SOURCES[recipe])
    assert [line for line in shown.splitlines() if line.startswith("# stage ")] == [
        f"# stage {i} of {len(names)}, {name}" for i, name in enumerate(names, 1)
    ]
    for before in names[:-1]:
        assert f"afterok:<job of {before}>" in shown


@pytest.fixture(scope="module")
def text_shards(tmp_path_factory):
    """This project's pages, as raw text."""
    import json

    folder = tmp_path_factory.mktemp("text")
    pages = sorted((ROOT / "docs").glob("*.md"))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": page.read_text()}) + "\n" for page in pages))
    assert main(["prepare", str(folder / "text.jsonl"), "--out", str(folder)]) == 0
    return folder / "text"


def train_job(text: str) -> None:
    from molmo2_nemo.nemo.train import train

    train(read_yaml(text, "the recipe"))


@pytest.mark.parametrize("recipe", SOURCES)
def test_all_stages_at_the_tiny_scale(recipe, workers, shards, text_shards, tmp_path, monkeypatch):
    """The recipe's own stages on the tiny model, each from the one before; four steps each."""
    from molmo2_nemo.launch.start import resolve_start
    from molmo2_nemo.settings.schema import to_yaml

    monkeypatch.setenv("MOLMO2_DEMO_DATA", str(shards))
    monkeypatch.setenv("MOLMO2_TEXT_DATA", str(text_shards))
    configs = compose_stages([f"recipe={recipe}", "scale=tiny", f"output_dir='{tmp_path}'"])
    starts = []

    def train(cfg) -> int:
        resolve_start(cfg)
        write_config(cfg)
        starts.append(cfg.init_from)
        workers.run(train_job, to_yaml(cfg), fit=True)
        return 0

    assert run_stages(configs, train) == 0
    names = list(SOURCES[recipe])
    assert [(s.name, s.state, s.step) for s in read_run(tmp_path)] == [(name, "finished", 4) for name in names]
    assert starts[0] is None and all(f"/{before}/" in start for before, start in zip(names, starts[1:], strict=False))
    for cfg in configs:
        for step in read_metrics(stage_dir(cfg)):
            learning = {part for part in ("vit", "connector", "llm") if step[f"grad_norm_{part}"] > 0}
            asked = {"v": "vit", "c": "connector", "l": "llm"}
            assert learning == {asked[part] for part in SOURCES[recipe][cfg.stage.name][-1]}, cfg.stage.name
    if recipe == "longvila":  # adapters of rank 8 learn in extend, and are merged for the stage behind it
        assert configs[3].stage.lora.rank == 8 and "/extend/merged/" in starts[4]
