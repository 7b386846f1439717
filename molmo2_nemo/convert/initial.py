"""The starting point of stage 1: base models in Hugging Face format -> a Megatron checkpoint of a new Molmo2."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from molmo2_nemo.convert.base_models import (
    combine,
    dropped_vit_tensors,
    llm_rules,
    read_llm,
    read_vit,
    vit_prefix,
    vit_rules,
)
from molmo2_nemo.convert.checkpoints import TOKENIZER_FOLDER, source_tokenizer, write_model_file
from molmo2_nemo.convert.folders import MODEL_FILE, ORIGIN_FILE, new_folder, refuse_own_source
from molmo2_nemo.convert.megatron_io import MegatronWriter
from molmo2_nemo.convert.names import Rule, canonical_shapes, rule_shapes, to_canonical
from molmo2_nemo.convert.safetensors_io import SafetensorsFolder
from molmo2_nemo.errors import ConversionError
from molmo2_nemo.model.config import Molmo2Config
from molmo2_nemo.model.families import family_of
from molmo2_nemo.settings.run import RunConfig

NEW_PARTS = ("connector.", "embedding.extra.")  # no base model has them


def init_checkpoint(
    llm_dir: str | Path,
    vit_dir: str | Path,
    out_dir: str | Path,
    *,
    model: str | None = None,
    seed: int = RunConfig.seed,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> Path:
    """Make the Megatron checkpoint that stage 1 starts from.

    Language model and vision tower are copied; the connector and the 128 extra embedding rows are fresh: weights
    N(0, 0.02), biases 0, drawn from (seed, name) as the trainer draws them. Peak memory: the tensors of one rule, at
    most the embedding table in both types. `out_dir` gets `weights/`, `molmo2.json`, `origin.json` (sources, seed, the
    tensors of the vision model that Molmo2 does without) and, if the language model has one, `tokenizer/`, extra tokens
    included.

    Args:
        llm_dir: a base model of one of the FAMILIES.
        vit_dir: SigLIP or its vision tower, as google/siglip2-so400m-patch14-384.
        model: the preset these must be the base models of; None recognises it, or makes a custom model.
        dtype: stored type. The default loses nothing of either source; stage 1 trains in it.
        overwrite: replace `out_dir` if it exists, once the new one is complete.

    Returns:
        `out_dir`.

    Raises:
        ConversionError: a source is of another family, of other sizes than the preset, or not complete in safetensors;
            a damaged tokenizer; `out_dir` is a source, or round or inside one. Nothing is left at `out_dir`.
    """
    llm, vit, target = Path(llm_dir), Path(vit_dir), Path(out_dir)
    refuse_own_source(target, llm, vit)
    model_config = combine(read_llm(llm), read_vit(vit), model)
    text_source = SafetensorsFolder(llm)
    text = list(llm_rules(model_config.text))
    optional = frozenset([family_of(model_config.text).base_names.head] if model_config.text.tie_embeddings else [])
    text_source.check(rule_shapes(text, model_config), optional)
    vision_source, vision, dropped = open_vision(vit, model_config)
    text_source.verify()
    vision_source.verify()
    tokenizer = source_tokenizer(llm, model_config)
    with new_folder(target, overwrite=overwrite) as staging:
        writer = MegatronWriter(staging / "weights", model_config)
        for source, chosen in ((vision_source, vision), (text_source, text)):
            for rule in chosen:
                write_rule(rule, source, writer, dtype)
        write_fresh(writer, model_config, seed, dtype)
        writer.finish()
        write_model_file(staging / MODEL_FILE, model_config)
        origin = {"llm": str(llm.resolve()), "vit": str(vit.resolve()), "seed": seed, "dropped": dropped}
        origin["notes"] = [*text_source.notes, *vision_source.notes]
        (staging / ORIGIN_FILE).write_text(json.dumps(origin, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(staging / TOKENIZER_FOLDER)
    return target


def open_vision(folder: Path, model_config: Molmo2Config) -> tuple[SafetensorsFolder, list[Rule], list[str]]:
    """The vision tower's tensors, checked; the rules to read it by; the names of the tensors left behind."""
    source = SafetensorsFolder(folder)
    try:
        prefix = vit_prefix(list(source.tensors))
    except ConversionError as error:
        raise ConversionError(f"{folder}: {error}") from error
    dropped = sorted(dropped_vit_tensors(list(source.tensors), model_config, prefix))
    for name in dropped:
        del source.tensors[name]
    chosen = list(vit_rules(model_config, prefix))
    shapes = rule_shapes(chosen, model_config)
    patches = f"{prefix}embeddings.patch_embedding.weight"
    if len(source.tensors[patches].shape) == 4:  # a convolution, [out, channel, row, column]
        size = model_config.vision.patch_size
        shapes[patches] = (model_config.vision.hidden_size, 3, size, size)
    source.check(shapes)
    return source, chosen, dropped


def write_rule(rule: Rule, source: SafetensorsFolder, writer: MegatronWriter, dtype: torch.dtype) -> None:
    """Convert the tensors of one rule. A convolution over patches becomes the linear map over patches whose values are
    ordered row, column, channel."""
    names = [*rule.external, *([rule.head] if rule.head and rule.head in source.tensors else [])]
    tensors = {name: source.read(name) for name in names}
    for name, tensor in tensors.items():
        if tensor.dim() == 4:
            tensors[name] = tensor.permute(0, 2, 3, 1).flatten(1)
    for name, tensor in to_canonical(rule, tensors, writer.model_config).items():
        writer.write(name, tensor.to(dtype))


def write_fresh(writer: MegatronWriter, model_config: Molmo2Config, seed: int, dtype: torch.dtype) -> None:
    """The parts that no base model has, drawn as the trainer draws them for a model from scratch."""
    from molmo2_nemo.model.init import fresh, init_std  # imports Megatron

    for name, shape in canonical_shapes(model_config).items():
        if name.startswith(NEW_PARTS):
            writer.write(name, fresh(name, shape, seed, init_std(model_config, name, shape)).to(dtype))
