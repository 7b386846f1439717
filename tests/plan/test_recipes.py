"""Every size and scale of the published recipes: the settings agree with each other, and by the planner they fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from molmo2_nemo.cost.hardware import parse_cluster
from molmo2_nemo.cost.workload import workload
from molmo2_nemo.launch.pipeline import compose_stages
from molmo2_nemo.model.config import preset
from molmo2_nemo.plan.search import configured
from molmo2_nemo.settings.checks import find_problems
from molmo2_nemo.settings.compose import compose, group_options
from molmo2_nemo.settings.run import PUBLISHED_STAGES

ROOT = Path(__file__).parents[2]
CLUSTERS = {
    "published": ("h100x8", 16),
    "node": ("h100x8", 1),
    "gpu": ("h200x1", 1),
    "gpu_frozen_vit": ("h200x1", 1),
    "gpu_lora": ("h100x1", 1),
}
TOO_BIG = {("gpu", "8b"), ("gpu", "o7b"), ("gpu_frozen_vit", "8b"), ("gpu_frozen_vit", "o7b")}


def test_scales_are_all_here():
    assert set(group_options("scale")) == {*CLUSTERS, "tiny"}


@pytest.mark.parametrize("size", ["4b", "8b", "o7b"])
@pytest.mark.parametrize("scale", CLUSTERS)
def test_recipe_at_every_scale(size, scale):
    name, nodes = CLUSTERS[scale]
    cluster = parse_cluster(name, nodes)
    for stage in PUBLISHED_STAGES:
        cfg = compose([f"recipe={size}", f"stage={stage}", f"scale={scale}"])
        lacking = ("data.", "6 of 6 data sets", "118 of 118 data sets")  # shards and tokenizer
        assert [p for p in find_problems(cfg, cluster.gpus) if not p.startswith(lacking)] == []
        candidate = configured(cfg, preset(size), workload(cfg), cluster)
        assert candidate is not None and candidate.layout.data == cfg.parallel.data
        if (scale, size) not in TOO_BIG:
            assert candidate.fits(cluster), f"{stage}: {candidate.memory.total / 2**30:.0f} GiB"


def test_published_numbers():
    """Steps, packs, lengths and rates of the paper, at both scales that train on all of the data."""
    for scale in ("published", "node"):
        for stage, steps, length, crops, rates in (
            ("pretrain", 32000, 2536, 16, (2e-4, 6e-6, 2e-5)),
            ("sft", 30000, 16384, 128, (5e-6, 5e-6, 1e-5)),
            ("long", 2000, 36864, 384, (5e-6, 5e-6, 1e-5)),
        ):
            cfg = compose(["recipe=8b", f"stage={stage}", f"scale={scale}"])
            assert (cfg.stage.max_steps, cfg.stage.global_batch_size) == (steps, 128)
            assert (cfg.data.packing.sequence_length, cfg.data.packing.max_crops) == (length, crops)
            assert (cfg.stage.optim.connector.lr, cfg.stage.optim.vit.lr, cfg.stage.optim.llm.lr) == rates


UNITS = {"min": 1 / 60, "h": 1.0, "days": 24.0}


def rows(recipe):
    """(scale, nodes, cluster, stage, cells from the layout on) of each line of the table in a recipe's README."""
    text = (ROOT / "recipes" / recipe / "README.md").read_text().split("## What it costs")[1].split("\n## ")[0]
    nodes = 1 if "for one node of" in text else 16
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| ") or "layout" in cells:
            continue
        if len(cells) == 7:
            cluster, nodes = CLUSTERS[cells[0]]
            yield cells[0], nodes, cluster, cells[2], cells[3:]
        else:
            yield "published", 2 if cells[0] == "long128k" else nodes, "h100x8", cells[0], cells[1:]


@pytest.mark.parametrize("recipe", ["4b", "8b", "o7b", "longvila", "omnilong", "longvita", "nano"])
def test_costs_in_the_readme_are_what_the_planner_says(recipe):
    """Layout, memory, time and GPU-hours of every line, for the recipe's own settings; each fits in its GPU."""
    found = list(rows(recipe))
    stages = {stage for _, _, _, stage, _ in found}
    assert stages == {cfg.stage.name for cfg in compose_stages([f"recipe={recipe}"])}
    for scale, nodes, name, stage, (layout, gib, time, hours) in found:
        cfg = compose([f"recipe={recipe}", f"stage={stage}", f"scale={scale}"])
        cluster = parse_cluster(name, nodes)
        model = cfg.model.model_config(cfg.stage.lora if cfg.stage.lora.rank else None)
        work = workload(cfg)
        candidate = configured(cfg, model, work, cluster)
        assert candidate is not None and candidate.fits(cluster), (scale, stage)
        assert layout.partition(",")[0] == candidate.layout.name, (scale, stage)
        assert layout.endswith(", recompute") == (candidate.layout.recompute == "full"), (scale, stage)
        gpu_hours = candidate.step.gpu_hours(cluster, work.steps)
        number, unit = time.split()
        seen = (f"{candidate.memory.total / 2**30:.0f} GiB", f"{gpu_hours:,.0f}")
        assert seen == (gib, hours), (scale, stage)
        assert float(number) * UNITS[unit] == pytest.approx(gpu_hours / cluster.gpus, rel=0.2, abs=0.5 / 60)
