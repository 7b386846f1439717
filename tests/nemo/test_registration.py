"""What NeMo knows once the package is installed: its own import and export calls, and recipe factories."""

from __future__ import annotations

import filecmp
import importlib.util
import os
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from unittest import mock

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

    from molmo2_nemo.nemo.registration import command_recipe
    from molmo2_nemo.settings.compose import compose
    from molmo2_nemo.settings.run import PUBLISHED_STAGES
    from molmo2_nemo.settings.schema import load_yaml, to_yaml

    changed = ["stage.optim.llm.lr=3e-6", "save_every=50", "checkpoint.keep_every=500", "faults.spike_sigma=6"]
    different = []
    for preset in ("tiny", "8b"):
        for stage in PUBLISHED_STAGES:
            asked = f"molmo2_{preset}_{stage}(dir='runs/x', overrides='{' '.join(changed)}')"
            nemo = LazyEntrypoint(llm.train, factory=asked).resolve()
            cfg = compose([f"recipe={preset}", f"stage={stage}", "output_dir=runs/x", *changed])
            hydra = command_recipe(cfg)
            printed = Path(folder) / f"{preset}_{stage}.yaml"
            printed.write_text(to_yaml(cfg))
            if not (nemo == hydra == command_recipe(load_yaml(printed))):
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


def peft_job() -> str:
    """What NeMo's own way of handing over adapters is answered."""
    from nemo.collections import llm
    from nemo.collections.llm.api import _set_with_io

    from molmo2_nemo.errors import UserError
    from molmo2_nemo.nemo.module import Molmo2Module

    module = Molmo2Module("tiny")
    assert module.model_transform is None
    try:
        _set_with_io(module, "model_transform", llm.peft.LoRA(dim=8))
    except UserError as error:
        return str(error)
    return "taken"


def test_nemos_adapters_are_refused_with_ours(workers):
    answer = workers.run(peft_job)[0]
    assert answer.startswith("NeMo's LoRA (peft, model_transform) is not applied to Molmo2")
    assert "stage.lora.rank=64" in answer


CHANGES = (  # name on NeMo's line, text, value
    ("trainer.max_steps", "5", 5),
    ("trainer.strategy.sequence_parallel", "true", True),
    ("data.micro_batch_size", "4", 4),
    ("data.config.packing.sequence_length", "512", 512),
    ("data.config.quarantine", "away", "away"),
    ("model.optim.optim.llm.lr", "3e-6", 3e-6),
    ("model.stage.train_vit", "false", False),
    ("model.kernels.norm", "plain", "plain"),
    ("model.seed", "7", 7),
)


def doors_job() -> tuple[dict, dict, tuple]:
    """What the verbs of `nemo llm` make of a recipe and a change, after NeMo-Run has sent it to a machine with GPUs;
    what others answer; and an executor with a change."""
    import fiddle
    from nemo.collections import llm
    from nemo_run.cli.api import RunContext
    from nemo_run.cli.lazy import LazyEntrypoint
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    import molmo2_nemo.nemo.registration  # noqa: F401  (what the entry point imports)
    from molmo2_nemo import cpu
    from molmo2_nemo.errors import UserError
    from molmo2_nemo.launch.nemo_command import built_recipe, differences
    from molmo2_nemo.settings.run import RunConfig
    from molmo2_nemo.settings.schema import structure

    def changes(verb: Any, factory: str, lines: list[str]) -> tuple[str, dict]:
        asked = LazyEntrypoint(verb, factory=factory, overwrites=lines).resolve()
        built = dict(fiddle.build(sent.deserialize(sent.serialize(asked))).keywords)
        cfg = structure(RunConfig, dict(built.pop("settings")))
        del built["workdir"]
        launched = mock.patch.dict(os.environ, LOCAL_WORLD_SIZE="4", MLFLOW_TRACKING_URI="http://there")
        with launched, mock.patch.object(cpu, "is_cpu_only", lambda: False):
            return cfg.output_dir, differences(built, built_recipe(cfg))

    found, answers, sent = {}, {}, ZlibJSONSerializer()
    factory = "molmo2_tiny_sft(dir='runs/x', overrides='parallel=single')"
    for verb in (llm.train, llm.pretrain, llm.finetune):
        found[verb.__name__] = changes(verb, factory, [f"{name}={text}" for name, text, _ in CHANGES])
    found["8b"] = changes(llm.train, "molmo2_8b_long(dir='runs/8b')", ["peft=lora"])
    for verb in (llm.validate, llm.prune, llm.distill, llm.ptq):
        try:
            answers[verb.__name__] = str(LazyEntrypoint(verb, factory=factory).resolve())
        except UserError as error:
            answers[verb.__name__] = str(error)
    executor = fiddle.build(RunContext(name="x").parse_executor("slurm", "nodes=2"))
    return found, answers, (executor.account, executor.nodes, executor.ntasks_per_node, executor.signal)


def test_the_verbs_of_nemos_command(workers):
    found, answers, executor = workers.run(doors_job)[0]
    changes = {name: value for name, _, value in CHANGES}
    assert found.pop("8b") == ("runs/8b", {"peft": "lora"})
    assert list(found) == ["train", "pretrain", "finetune"]
    for folder, differing in found.values():
        assert folder == "runs/x" and differing == changes
    assert list(answers) == ["validate", "prune", "distill", "ptq"]
    assert all(text.startswith(f"nemo llm {verb} does not run Molmo2's recipes: ") for verb, text in answers.items())
    assert executor == (None, 2, 8, "USR1@300")
