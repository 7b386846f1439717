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


@pytest.mark.parametrize("recipe", ["longvila", "omnilong", "longvita", "nano"])
def test_long_context_recipes_fit_their_nodes(recipe):
    """Every stage, in 80 GB, as the tables of their READMEs say."""
    table = (ROOT / "recipes" / recipe / "README.md").read_text().split("| stage | layout | per GPU |")[1]
    for cfg in compose_stages([f"recipe={recipe}"]):
        cluster = parse_cluster("h100x8", cfg.cluster.nodes)
        model = cfg.model.model_config(cfg.stage.lora if cfg.stage.lora.rank else None)
        candidate = configured(cfg, model, workload(cfg), cluster)
        assert candidate is not None and candidate.fits(cluster), cfg.stage.name
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {cfg.stage.name} ")]
        stated = int(row.split("|")[3].split()[0])
        assert abs(candidate.memory.total / 2**30 - stated) <= 0.1 * stated, row
