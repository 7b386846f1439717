"""A short training on needles, under the layout of the recipe's last stage: what loader, packs, context parallelism,
rotary positions and generation do together is enough to find them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from molmo2_nemo.evaluation.needles.needle import chance
from tests.nemo.test_evaluation import verb

KIND = "picture"  # the question that is learned first
STEPS = 40
FRAMES = 4


def trained(cfg: Any) -> None:
    """Job: the stage, on every rank."""
    from molmo2_nemo.nemo.train import train

    train(cfg)


def test_a_short_training_under_cp2_finds_needles(workers, tmp_path, monkeypatch):
    from data_prep.needles import build_needles
    from molmo2_nemo.rundir.config_file import write_config
    from molmo2_nemo.settings.compose import compose

    monkeypatch.setenv("MOLMO2_NEEDLE_DATA", str(tmp_path))
    build_needles(tmp_path / "long", 600, (3, FRAMES), seed=1, subtitles=0.0, kinds=[KIND])
    rates = [f"stage.optim.{group}.lr=2e-3" for group in ("vit", "connector", "llm")]
    packing = ["data.packing.sequence_length=1024", "data.packing.max_crops=64", f"data.video.max_frames={FRAMES}"]
    steps = [f"stage.max_steps={STEPS}", f"save_every={STEPS}"]
    cfg = compose(["recipe=needle", "stage=long", *rates, *packing, *steps, f"output_dir={tmp_path / 'run'}"])
    assert cfg.parallel.context == 2
    write_config(cfg)
    workers.run(trained, cfg, ranks=2, fit=True, seconds=1200)
    call = ["evaluate", str(tmp_path / "run" / "long"), "--tasks", "needle", "--frames", str(FRAMES), "--depths", "8"]
    workers.run(verb, [*call, "--out", str(tmp_path / "scores")], seconds=600)
    found = json.loads(Path(tmp_path / "scores" / f"needle@{FRAMES}.json").read_text())["scores"]["exact_match"]
    assert found["by"]["kind"][KIND]["score"] > chance(KIND) + 0.25
