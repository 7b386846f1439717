"""What `pip install` makes known to NeMo: this module is the package's `nemo_run.cli` entry point.

Importing it registers
  * the importer and exporter of `Molmo2Module` for "hf", so `llm.import_ckpt` and `llm.export_ckpt` know Molmo2;
  * NeMo-Run factories of `llm.train` for every preset and stage: `nemo llm train --factory molmo2_8b_long`.
"""

# No `from __future__ import annotations` here: NeMo-Run's command line reads the factories' annotations as they stand.

from pathlib import Path
from typing import Any

import nemo_run as run
from nemo.collections import llm
from nemo.lightning import io

from molmo2_nemo import compat, cpu
from molmo2_nemo.model.config import PRESETS, Molmo2Config
from molmo2_nemo.nemo.module import Molmo2Module
from molmo2_nemo.settings.compose import STAGES

cpu.enable()  # NeMo's command has imported this module: without CUDA its runs need the CPU shims
cpu.enable_megatron()


@io.model_importer(Molmo2Module, "hf")
class HFMolmo2Importer(io.ModelConnector[Any, Molmo2Module]):
    """A Hugging Face folder (either format) -> a NeMo checkpoint, tensor by tensor."""

    def init(self) -> Molmo2Module:
        from molmo2_nemo.convert.hf_config import read_model_config

        return module_of(read_model_config(Path(str(self)))[0])

    def apply(self, output_path: Path) -> Path:
        from molmo2_nemo.convert import import_checkpoint
        from molmo2_nemo.convert.checkpoints import read_model_file

        done = import_checkpoint(str(self), output_path, overwrite=True)
        imported = read_model_file(done)  # the tensors say what config.json cannot: whether the head is tied
        assert imported is not None
        module_of(imported).io_dump(done / "context", yaml_attrs=[])
        return done


def module_of(model_config: Molmo2Config) -> Molmo2Module:
    """The module of a model: by its preset's name, if it has one."""
    return Molmo2Module(model_config.name if model_config.name in PRESETS else model_config)


@io.model_exporter(Molmo2Module, "hf")
class HFMolmo2Exporter(io.ModelConnector[Molmo2Module, Any]):
    """A NeMo checkpoint, written under any layout -> a Hugging Face folder for transformers and vLLM."""

    def apply(self, output_path: Path, **options: Any) -> Path:
        from molmo2_nemo.convert import export_checkpoint

        return export_checkpoint(str(self), output_path, overwrite=True, **options)

    def nemo_load(self, *args: Any, **kwargs: Any) -> Any:
        """NeMo's export_ckpt would first load the whole model to ask whether ModelOpt has quantised it. Molmo2 streams
        its tensors instead; this error is the answer that sends NeMo on to `apply`."""
        raise RuntimeError("Molmo2 checkpoints are exported tensor by tensor, without loading the model")


def stage_factory(preset: str, stage: str) -> Any:
    """A function that makes the recipe of one preset and stage; its arguments are what a command line would change."""

    # NeMo-Run's command line reads plain strings here, no lists and no unions
    def recipe(dir: str = "", init_from: str = "", overrides: str = "") -> run.Partial:
        from molmo2_nemo.nemo.recipes import stage_recipe
        from molmo2_nemo.settings.compose import compose

        compat.check()
        cfg = compose([f"recipe={preset}", f"stage={stage}", *overrides.split()])
        cfg.output_dir = dir or cfg.output_dir
        cfg.init_from = init_from or cfg.init_from
        return stage_recipe(cfg)

    recipe.__name__ = f"molmo2_{preset}_{stage}"
    recipe.__doc__ = (
        f"Molmo2 {preset}, stage {stage}, as composed from conf/.\n\n"
        "Args:\n    dir: folder of the run.\n    init_from: checkpoint of the stage before.\n"
        "    overrides: further settings, written as for `molmo2 train`, with blanks between them.\n"
    )
    return recipe


for _preset in PRESETS:
    for _stage in STAGES:
        _recipe = stage_factory(_preset, _stage)
        globals()[_recipe.__name__] = run.cli.factory(target=llm.train, name=_recipe.__name__)(_recipe)
