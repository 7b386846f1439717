"""What NeMo knows once the package is installed: its own import and export calls, and recipe factories."""

from __future__ import annotations

import filecmp
import importlib.util
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from tests.support.packs import demo_packs, tiny_run, train_on_packs


def test_entry_point():
    found = [e for e in entry_points(group="nemo_run.cli") if e.name == "molmo2"]
    assert [e.value for e in found] == ["molmo2_nemo.nemo.registration"]


def round_trip_job(checkpoint: str, folder: str) -> list[str]:
    from nemo.collections import llm

    import molmo2_nemo.nemo.registration  # noqa: F401  (what the entry point imports)
    from molmo2_nemo.nemo.module import Molmo2Module

    torch.distributed.destroy_process_group()
    first = llm.export_ckpt(Path(checkpoint), "hf", output_path=Path(folder) / "hf")
    nemo = llm.import_ckpt(Molmo2Module("tiny"), source=f"hf://{first}", output_path=Path(folder) / "nemo")
    second = llm.export_ckpt(Path(nemo), "hf", output_path=Path(folder) / "again")
    return [str(first), str(second)]


def test_nemo_exports_imports_and_exports_the_same(workers, tmp_path):
    cfg = tiny_run(tmp_path / "run", 1)
    workers.run(train_on_packs, cfg, demo_packs(4), fit=True)
    (checkpoint,) = (tmp_path / "run" / "sft" / "checkpoints").iterdir()
    first, second = map(Path, workers.run(round_trip_job, str(checkpoint), str(tmp_path))[0])
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())
    for file in first.iterdir():
        if file.name == "README.md":  # the model card: what came back from NeMo's import is no run's any more
            continue
        assert filecmp.cmp(file, second / file.name, shallow=False), file.name


def recipe_job(name: str) -> dict:
    from molmo2_nemo.nemo import registration

    recipe = getattr(registration, name)(dir="somewhere", overrides="data.sources.demo.path=shards save_every=7")
    return {
        "function": recipe.__fn_or_cls__.__name__,
        "length": recipe.data.config.packing.sequence_length,
        "context": recipe.trainer.strategy.context_parallel_size,
        "steps": recipe.trainer.max_steps,
        "rates": [recipe.model.optim.optim.vit.lr, recipe.model.optim.optim.llm.lr],
        "dropout": (recipe.model.stage.residual_dropout, recipe.model.stage.response_residual_dropout),
        "log": recipe.log.ckpt.folder,
    }


@pytest.mark.parametrize("model", ["4b", "8b", "o7b"])
def test_factories_carry_the_published_numbers(workers, model):
    pretrain, long = (workers.run(recipe_job, f"molmo2_{model}_{stage}")[0] for stage in ("pretrain", "long"))
    assert pretrain["function"] == long["function"] == "train"
    assert (pretrain["length"], pretrain["rates"], pretrain["dropout"]) == (2536, [6e-6, 2e-5], (0.0, 0.1))
    assert (long["length"], long["context"], long["steps"]) == (36864, 8, 2000)
    assert (long["rates"], long["dropout"]) == ([5e-6, 1e-5], (0.1, 0.0))
    assert long["log"] == "somewhere/long/checkpoints"


def routes_job(folder: str) -> list[str]:
    """Recipes that differ between the ways to ask for them: NeMo's command line, Hydra, and a printed configuration."""
    from nemo.collections import llm
    from nemo_run.cli.lazy import LazyEntrypoint

    import molmo2_nemo.nemo.registration  # noqa: F401  (what the entry point imports)
    from molmo2_nemo.nemo.recipes import stage_recipe
    from molmo2_nemo.settings.compose import STAGES, compose
    from molmo2_nemo.settings.schema import load_yaml, to_yaml

    changed = ["stage.optim.llm.lr=3e-6", "checkpoint.keep_every=500", "faults.spike_sigma=6"]
    different = []
    for preset in ("tiny", "8b"):
        for stage in STAGES:
            asked = f"molmo2_{preset}_{stage}(dir='runs/x', overrides='{' '.join(changed)}')"
            nemo = LazyEntrypoint(llm.train, factory=asked).resolve()
            cfg = compose([f"recipe={preset}", f"stage={stage}", "output_dir=runs/x", *changed])
            hydra = stage_recipe(cfg)
            printed = Path(folder) / f"{preset}_{stage}.yaml"
            printed.write_text(to_yaml(cfg))
            if not (nemo == hydra == stage_recipe(load_yaml(printed))):
                different.append(asked)
            assert nemo.model.optim.optim.llm.lr == 3e-6 and nemo.log.ckpt.keep.keep_every == 500
            hydra.model.optim.max_steps += 1  # what is compared is compared to the last field
            if nemo == hydra:
                different.append("nothing, even where there is something")
    return different


def test_nemos_command_line_and_hydra_give_one_recipe(workers, tmp_path):
    assert workers.run(routes_job, str(tmp_path))[0] == []


def loggers_job() -> tuple[bool, bool, str]:
    from molmo2_nemo.errors import UserError
    from molmo2_nemo.nemo.recipes import stage_recipe
    from molmo2_nemo.settings.compose import compose

    usual = stage_recipe(compose(["recipe=tiny", "stage=sft"])).log
    quiet = stage_recipe(compose(["recipe=tiny", "stage=sft", "log.tensorboard=false"])).log
    try:
        said = str(stage_recipe(compose(["recipe=tiny", "stage=sft", "log.wandb=mine"])).log.wandb.project)
    except UserError as error:
        said = str(error)
    return usual.tensorboard is not None and usual.wandb is None, quiet.tensorboard is None, said


def test_loggers(workers):
    """TensorBoard unless refused; Weights & Biases if asked for, and said where its package is not there."""
    usual, quiet, said = workers.run(loggers_job)[0]
    assert usual and quiet
    installed = importlib.util.find_spec("wandb") is not None
    assert said == "mine" if installed else "the package wandb is not installed" in said
