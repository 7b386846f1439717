"""Hugging Face folder -> Megatron checkpoint, and back. One process, no model, no GPU; tensor by tensor."""

from __future__ import annotations

import functools
import json
import shutil
import typing
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from molmo2_nemo.convert.companions import write_companions
from molmo2_nemo.convert.folders import MODEL_FILE, new_folder, refuse_own_source
from molmo2_nemo.convert.hf_config import config_json, parse_config
from molmo2_nemo.convert.hf_fields import FLAG, WORD, Kind, require
from molmo2_nemo.convert.json_files import is_present, parse_object
from molmo2_nemo.convert.megatron_io import MegatronCheckpoint, MegatronWriter
from molmo2_nemo.convert.model_card import CARD_FILE, model_card
from molmo2_nemo.convert.names import FORMATS, HEAD, Format, Rule, external_shapes, rules, to_canonical, to_external
from molmo2_nemo.convert.preprocessing import read_processors, recorded_data, run_data
from molmo2_nemo.convert.safetensors_io import SafetensorsFolder, SafetensorsWriter
from molmo2_nemo.convert.source import canonical_types, open_source
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.tokenizer import SHIPPED, Molmo2Tokenizer
from molmo2_nemo.errors import ConversionError, UserError
from molmo2_nemo.files import write_text
from molmo2_nemo.model.config import PRESETS, LoraConfig, Molmo2Config, VisualAttention, preset, with_options
from molmo2_nemo.rundir.config_file import run_of_checkpoint
from molmo2_nemo.rundir.paths import CONFIG
from molmo2_nemo.settings.renamed import with_new_names
from molmo2_nemo.settings.run import ModelSelection
from molmo2_nemo.settings.schema import structure

# Settings of a run's `model` that change the function
OPTIONS = ("visual_attention", "rope_scaling", "rope_factor", "rope_base")
GENERATION_FILE = "generation_config.json"  # in an imported checkpoint that came with one
TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
ATTENTIONS = typing.get_args(VisualAttention)
MODEL_FIELDS = {  # of MODEL_FILE
    "name": WORD,
    "tie_embeddings": FLAG,
    "visual_attention": Kind(lambda value: value in ATTENTIONS, " or ".join(map(repr, ATTENTIONS))),
    "config": Kind(lambda value: isinstance(value, dict), "an object"),
}


def import_checkpoint(
    hf_dir: str | Path,
    out_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    tie_embeddings: bool | None = None,
    overwrite: bool = False,
) -> Path:
    """Convert a Molmo2 in Hugging Face format, native or remote-code, into a Megatron checkpoint.

    Every layout can load the result (`init_from`). Peak memory: the tensors of one rule, at most the two embedding
    tables and the head. `out_dir` gets `weights/`, `molmo2.json` (with `notes`: what is not as it was, or was decided)
    and, if the source has them, `tokenizer/` and `generation_config.json`.

    Args:
        dtype: stored type; None keeps the source's, and takes the widest of tensors that become one.
        tie_embeddings: whether the head is the embedding; None means whether the stored head is a copy of the base
            embedding, or missing. (A preset with a head of its own keeps it in any case, and cannot miss it.)
        overwrite: replace `out_dir` if it exists, once the new one is complete.

    Returns:
        `out_dir`.

    Raises:
        ConversionError: the source is not a complete Molmo2 in safetensors, something beside its weights is damaged, or
            `out_dir` is the source, or round or inside it; nothing is left at `out_dir`.
    """
    path, target = Path(hf_dir), Path(out_dir)
    refuse_own_source(target, path)
    source = open_source(path, tie_embeddings)
    types, notes = canonical_types(source.rules(), source.folder)
    if dtype is not None:
        types, notes = dict.fromkeys(types, dtype), []
    generation = generation_settings(path)
    processors, said = read_processors(path, source.model_config)
    said += check_tokenizer(path, source.model_config)
    with new_folder(target, overwrite=overwrite) as staging:
        writer = MegatronWriter(staging / "weights", source.model_config)
        for rule in source.rules():
            import_rule(rule, source.folder, writer, types)
        writer.finish()
        write_model_file(staging / MODEL_FILE, source.model_config, [*source.notes, *notes, *said], processors)
        copy_tokenizer(path, staging / TOKENIZER_FOLDER)
        if generation is not None:
            shutil.copyfile(path / GENERATION_FILE, staging / GENERATION_FILE)
    return target


def export_checkpoint(
    ckpt_dir: str | Path,
    out_dir: str | Path,
    *,
    format: Format = "native",
    dtype: torch.dtype | None = None,
    model_config: Molmo2Config | None = None,
    tokenizer: Molmo2Tokenizer | str | Path | None = None,
    data: DataConfig | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> Path:
    """Convert a Megatron checkpoint, written under any layout, into a folder for transformers and vLLM.

    Peak memory: one tensor (at most the two embedding tables joined).

    Args:
        format: "native" (transformers >= 5) or "remote" (the published remote-code files' names).
        dtype: stored type; None keeps the checkpoint's.
        model_config: None finds it: `molmo2.json` of an imported checkpoint, else the preset of the same sizes.
        tokenizer: None finds it: the one imported with the checkpoint, else that of the run's config.yaml, else "tiny"
            for the preset of that name. Without one, the folder has no tokenizer files.
        data: image and video settings; None takes those that `data_of` finds.
        overwrite: replace `out_dir` if it exists, once the new one is complete.

    Returns:
        `out_dir`.

    Raises:
        ConversionError: not a complete checkpoint of a Molmo2; `out_dir` is the checkpoint, a folder round it or a part
            of it (inside it, where NeMo exports to, a new folder or an earlier export will do). Nothing is left at
            `out_dir`.
    """
    source, target = Path(ckpt_dir), Path(out_dir)
    refuse_own_source(target, source, replaceable="config.json")
    if format not in FORMATS:
        raise ConversionError(f"unknown format {format!r}; known formats: {', '.join(FORMATS)}")
    checkpoint = MegatronCheckpoint(source)
    run = run_settings(source)
    if model_config is None:
        model_config = model_of(source, checkpoint, run)
    checkpoint.check(model_config)
    tokenizer = find_tokenizer(source, model_config, run, tokenizer)
    shapes = external_shapes(model_config, format)
    dtypes = external_dtypes(checkpoint, model_config, format, dtype)
    with new_folder(target, overwrite=overwrite) as staging:
        with SafetensorsWriter(staging, shapes, dtypes, max_shard_bytes) as writer:
            for rule in rules(model_config, format):
                export_rule(rule, checkpoint, writer, model_config)
        stored = str(dtypes[HEAD]).removeprefix("torch.")
        text = json.dumps(config_json(model_config, format, stored), indent=2)
        (staging / "config.json").write_text(text + "\n")
        write_text(staging / CARD_FILE, model_card(source, model_config, format, stored))
        write_companions(
            staging,
            model_config,
            format,
            tokenizer,
            data or data_of(source, model_config, run),
            generation=generation_settings(source),
        )
    return target


def import_rule(
    rule: Rule, folder: SafetensorsFolder, writer: MegatronWriter, types: Mapping[str, torch.dtype]
) -> None:
    """Import the tensors of one rule. A function of its own frees them before those of the next rule are read."""
    names = [*rule.external, *([rule.head] if rule.head and rule.head in folder.tensors else [])]
    canonical = to_canonical(rule, {name: folder.read(name) for name in names}, writer.model_config)
    for name in list(canonical):
        writer.write(name, canonical.pop(name).to(types[name]))


def export_rule(
    rule: Rule, checkpoint: MegatronCheckpoint, writer: SafetensorsWriter, model_config: Molmo2Config
) -> None:
    """Export the tensors of one rule; the inverse of `import_rule`."""
    tensors = [read_merged(checkpoint, name, model_config) for name in rule.canonical]
    for name, tensor in to_external(rule, tensors, model_config).items():
        writer.write(name, tensor)


def read_merged(checkpoint: MegatronCheckpoint, name: str, model_config: Molmo2Config) -> torch.Tensor:
    """One canonical tensor, with its LoRA adapter (if any) merged."""
    weight = checkpoint.read(name, vocabulary_rows(name, model_config))
    if model_config.lora is None or name.split(".")[-2] not in model_config.lora.targets:
        return weight
    lora_a, lora_b = (checkpoint.read(name.replace("weight", part)) for part in ("lora_a", "lora_b"))
    return (weight.float() + model_config.lora.scale * (lora_b.float() @ lora_a.float())).to(weight.dtype)


def vocabulary_rows(name: str, model_config: Molmo2Config) -> int | None:
    """Rows to keep of a table that is padded for tensor parallelism; None for other tensors."""
    return model_config.text.vocab_size if name in ("embedding.base.weight", "output_layer.weight") else None


def external_dtypes(
    checkpoint: MegatronCheckpoint, model_config: Molmo2Config, target: Format, dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Stored type of every external tensor."""
    dtypes = {}
    for rule in rules(model_config, target):
        stored = [checkpoint.dtype(name) for name in rule.canonical]
        # tensors joined into one may have different types; none may lose bits
        for name in (*rule.external, *([rule.head] if rule.head else [])):
            dtypes[name] = dtype or functools.reduce(torch.promote_types, stored)
    return dtypes


def generation_settings(folder: Path) -> dict[str, Any] | None:
    """The generation_config.json of a folder, None where there is none.

    Raises:
        ConversionError: it is damaged.
    """
    path = folder / GENERATION_FILE
    return parse_object(path.read_bytes(), str(path)) if is_present(path) else None


def write_model_file(
    path: Path,
    model_config: Molmo2Config,
    notes: Sequence[str] = (),
    preprocessing: Mapping[str, Any] | None = None,
) -> None:
    """Record the model configuration of an imported checkpoint, what is to be said about the import, and image and
    video settings that differ from the published ones."""
    data = {
        "name": model_config.name,
        "tie_embeddings": model_config.text.tie_embeddings,
        "visual_attention": model_config.visual_attention,
        "config": config_json(model_config, "native", "float32"),
        "notes": list(notes),
        "preprocessing": preprocessing or {},
    }
    path.write_text(json.dumps(data, indent=2) + "\n")


def read_model_file(checkpoint: Path) -> Molmo2Config | None:
    """The model of an imported checkpoint; None where there is no such file.

    Raises:
        ConversionError: the file is damaged.
    """
    path = checkpoint / MODEL_FILE
    if not is_present(path):
        return None
    data = parse_object(path.read_bytes(), str(path))
    try:
        for name, kind in MODEL_FIELDS.items():
            require(name, data.get(name), kind)
        model_config, _ = parse_config(data["config"])
    except UserError as error:
        raise ConversionError(f"{path} is damaged: {error}") from error
    text = replace(model_config.text, tie_embeddings=data["tie_embeddings"])
    return replace(model_config, name=data["name"], text=text, visual_attention=data["visual_attention"])


def recognise_checkpoint(checkpoint: MegatronCheckpoint, lora: LoraConfig | None = None) -> Molmo2Config:
    """The preset whose tensors (and adapters) a checkpoint holds.

    Raises:
        ConversionError: no preset matches; the message says how each differs.
    """
    reasons = []
    for name in PRESETS:
        try:
            checkpoint.check(with_options(preset(name), lora=lora))
            return preset(name)
        except ConversionError as error:
            reasons.append(f"{name}: {error}")
    raise ConversionError(f"{checkpoint.folder} is not a checkpoint of any known Molmo2: " + "; ".join(reasons))


def model_of(folder: Path, checkpoint: MegatronCheckpoint, run: dict[str, Any]) -> Molmo2Config:
    """The model of a checkpoint: that of its `molmo2.json`, else the preset of its sizes, with the run's attention
    settings applied.

    Args:
        folder: where the checkpoint lies.
        run: from `run_settings`.

    Raises:
        ConversionError: no known model, or a damaged file.
    """
    settings = run.get("model") or {}
    try:
        selected = structure(ModelSelection, {key: settings[key] for key in OPTIONS if key in settings}, "model")
        chosen = {key: getattr(selected, key) for key in OPTIONS if key in settings}
        chosen["lora"] = structure(LoraConfig, (run.get("stage") or {}).get("lora") or {}, "stage.lora")
        with_options(preset("tiny"), lora=chosen["lora"])
    except UserError as error:
        raise ConversionError(f"the run's config.yaml: {error}") from None
    model_config = read_model_file(folder) or recognise_checkpoint(checkpoint, chosen["lora"])
    try:
        return with_options(model_config, **chosen)
    except UserError as error:
        raise ConversionError(f"the run's config.yaml: {error}") from None


def run_settings(checkpoint: Path) -> dict[str, Any]:
    """The config.yaml of the run that a checkpoint belongs to, with the current names of settings; empty if there is
    none.

    Raises:
        ConversionError: it is damaged.
    """
    run = run_of_checkpoint(checkpoint)
    if run is None:
        return {}
    path = run / CONFIG
    try:
        loaded = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    return with_new_names(loaded, str(path)) if isinstance(loaded, dict) else {}


def data_of(folder: Path, model_config: Molmo2Config, run: dict[str, Any]) -> DataConfig:
    """The image and video settings of a checkpoint: those of its run, else those that it was imported with, else the
    published ones at its model's crop size.

    Args:
        folder: where the checkpoint lies.
        run: from `run_settings`.

    Raises:
        ConversionError: a damaged file.
    """
    found = run_data(run)
    if found is not None:
        return found
    path = folder / MODEL_FILE
    imported = parse_object(path.read_bytes(), str(path)).get("preprocessing") if is_present(path) else {}
    return recorded_data(imported, model_config, str(path))


def find_tokenizer(
    checkpoint: Path, model_config: Molmo2Config, run: dict[str, Any], given: Molmo2Tokenizer | str | Path | None
) -> Molmo2Tokenizer | None:
    """The tokenizer to write beside the weights (see `export_checkpoint`)."""
    if isinstance(given, Molmo2Tokenizer):
        found = given
    else:
        imported = checkpoint / TOKENIZER_FOLDER
        of_run = (run.get("data") or {}).get("tokenizer")
        name = (
            given or (imported if imported.is_dir() else of_run) or ("tiny" if model_config.name in SHIPPED else None)
        )
        if name is None:
            return None
        found = Molmo2Tokenizer.load(str(name), vocab_size=model_config.text.vocab_size)
    if found.vocab_size != model_config.text.vocab_size:
        raise ConversionError(
            f"tokenizer {found.name!r} has {found.vocab_size} base ids, the model "
            f"{model_config.text.vocab_size} base rows"
        )
    return found


def source_tokenizer(folder: Path, model_config: Molmo2Config) -> Molmo2Tokenizer | None:
    """The tokenizer of a Hugging Face folder, None where there is no tokenizer.json.

    Raises:
        ConversionError: it is damaged, or not this model's.
    """
    present = [is_present(folder / name) for name in TOKENIZER_FILES]
    if not present[0]:
        return None
    try:
        return Molmo2Tokenizer.load(folder.resolve(), vocab_size=model_config.text.vocab_size)
    except UserError as error:
        raise ConversionError(f"{folder} has a tokenizer that cannot be used, repair or remove it: {error}") from error


def check_tokenizer(folder: Path, model_config: Molmo2Config) -> list[str]:
    """Reads the tokenizer of a Hugging Face folder; what to say where there is part of one.

    Raises:
        ConversionError: see `source_tokenizer`.
    """
    if source_tokenizer(folder, model_config) is None and (folder / TOKENIZER_FILES[1]).is_file():
        return [f"{TOKENIZER_FILES[1]} is there without {TOKENIZER_FILES[0]}: imported without a tokenizer"]
    return []


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer of an imported model, if it has a tokenizer.json."""
    if (source / TOKENIZER_FILES[0]).is_file():
        target.mkdir()
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
