"""A Molmo2 in Hugging Face format, opened and checked: which format, which tensors are used, whether its head is tied.

What a conversion does to a folder beyond renaming is said in `Source.notes`, one sentence each.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from molmo2_nemo.convert.hf_config import read_model_config
from molmo2_nemo.convert.megatron_io import LAYER
from molmo2_nemo.convert.names import (
    HEAD,
    VISION_BLOCKS,
    Format,
    Rule,
    embedding_rules,
    external_shapes,
    format_of,
    rules,
    same_bits,
    same_values,
    to_canonical,
)
from molmo2_nemo.convert.safetensors_io import SafetensorsFolder, listing
from molmo2_nemo.errors import ConversionError
from molmo2_nemo.model.config import PRESETS, Molmo2Config


@dataclass
class Source:
    """A Hugging Face folder that has everything its model needs. `notes`: what is lost or decided on import."""

    folder: SafetensorsFolder
    model_config: Molmo2Config
    written_as: Format  # how the tensors are named, whatever the config.json is like
    notes: list[str]

    def rules(self) -> list[Rule]:
        return list(rules(self.model_config, self.written_as))


def open_source(path: Path, tie_embeddings: bool | None = None) -> Source:
    """Open a folder with a Molmo2. Reads headers, and the embedding where the head must be compared with it.

    The names of the tensors say which format it is, not the config.json: transformers' `save_pretrained` writes a
    native config.json beside tensors with the remote code's names.

    Args:
        tie_embeddings: see `import_checkpoint`.

    Raises:
        ConversionError: not a complete Molmo2 in safetensors.
    """
    model_config, described = read_model_config(path)
    folder = SafetensorsFolder(path)
    before = list(folder.notes)
    notes = list(before)
    try:
        written_as = format_of(folder.tensors) or described
    except ConversionError as error:
        raise ConversionError(f"{path} {error}") from error
    notes += leave_upper_blocks(folder, model_config, written_as)
    shapes = external_shapes(model_config, written_as) | table_shapes(folder, model_config, written_as)
    folder.check(shapes, optional=frozenset([HEAD]))
    folder.verify()
    notes += folder.notes[len(before) :]
    model_config, said = with_head(model_config, folder, written_as, tie_embeddings)
    return Source(folder, model_config, written_as, notes + said)


def leave_upper_blocks(folder: SafetensorsFolder, model_config: Molmo2Config, written_as: Format) -> list[str]:
    """Forget the blocks of the vision encoder above the deepest feature layer, which nothing reads."""
    block = re.compile(rf"^{re.escape(VISION_BLOCKS[written_as])}\.(\d+)\.")
    built = model_config.vision.num_built_layers
    upper = [name for name in folder.tensors if (found := block.match(name)) and int(found[1]) >= built]
    for name in upper:
        del folder.tensors[name]
    return [f"left out {listing(upper)}: blocks above the deepest feature layer are never read"] if upper else []


def table_shapes(
    folder: SafetensorsFolder, model_config: Molmo2Config, written_as: Format
) -> dict[str, tuple[int, ...]]:
    """Shapes of the two embedding tables where they are cut elsewhere than between base and extra rows.

    transformers' `save_pretrained` halves the joined table, whatever the two sizes were.
    """
    rule = next(iter(embedding_rules(model_config, written_as == "native")))
    if rule.kind != "embedding_parts" or not all(name in folder.tensors for name in rule.external):
        return {}
    stored = {name: folder.tensors[name].shape for name in rule.external}
    if any(len(shape) != 2 for shape in stored.values()):
        return {}
    rows = model_config.text.vocab_size + model_config.extra_vocab_size
    return stored if sum(shape[0] for shape in stored.values()) == rows else {}


def with_head(
    model_config: Molmo2Config, folder: SafetensorsFolder, written_as: Format, tie_embeddings: bool | None
) -> tuple[Molmo2Config, list[str]]:
    """`model_config` with `tie_embeddings` decided by the rule that `import_checkpoint` documents, and what to say
    about it.

    Raises:
        ConversionError: no head where there must be one.
    """
    text = model_config.text
    notes: list[str] = []
    untied_preset = model_config.name in PRESETS and not text.tie_embeddings
    if HEAD not in folder.tensors:
        if tie_embeddings is False or (untied_preset and tie_embeddings is None):
            raise ConversionError(f"{folder.folder} lacks tensor {HEAD}")
        tie_embeddings = True
    elif tie_embeddings is None:
        tie_embeddings = not untied_preset
        if tie_embeddings:
            tie_embeddings, notes = compare_head(model_config, folder, written_as)
    name = model_config.name if tie_embeddings == text.tie_embeddings else "custom"
    return replace(model_config, name=name, text=replace(text, tie_embeddings=tie_embeddings)), notes


def compare_head(model_config: Molmo2Config, folder: SafetensorsFolder, written_as: Format) -> tuple[bool, list[str]]:
    """Whether the stored head is a copy of the base embedding, and what is lost if it is stored as that."""
    rule = replace(next(iter(embedding_rules(model_config, written_as == "native"))), head=None)
    tables = {name: folder.read(name) for name in rule.external}
    table = to_canonical(rule, tables, model_config)["embedding.base.weight"]
    head = folder.read(HEAD)
    if same_bits(head, table):
        return True, []
    if same_values(head, table):
        kinds = f"type {head.dtype} and not {table.dtype}" if head.dtype != table.dtype else "other signs of zeros"
        return True, [f"{HEAD} has the values of the embedding's base rows, but {kinds}: those rows are kept for both"]
    if model_config.text.tie_embeddings:
        model = (
            f"head of its own; it can be asked and exported, but is not the {model_config.name!r} that recipes train"
        )
        return False, [f"{HEAD} is not a copy of the embedding's base rows: imported with a {model}"]
    return False, []


def canonical_types(chosen: Iterable[Rule], folder: SafetensorsFolder) -> tuple[dict[str, torch.dtype], list[str]]:
    """Stored type of every canonical tensor: the widest of what becomes one tensor, so that none loses a bit. Layers
    are stacked in a checkpoint: they have one type.

    Returns:
        the types, and what to say where there were several.
    """
    together: dict[str, list[str]] = {}  # stacked name -> external tensors
    keys: dict[str, str] = {}  # canonical name -> stacked name
    for rule in chosen:
        for name in rule.canonical:
            layer = LAYER.match(name)
            keys[name] = f"decoder.layers.{layer[2]}" if layer else name
            together.setdefault(keys[name], []).extend(rule.external)
    widest = {
        key: functools.reduce(torch.promote_types, (folder.tensors[name].dtype for name in names))
        for key, names in together.items()
    }
    changed = [
        name
        for key, names in together.items()
        for name in dict.fromkeys(names)
        if folder.tensors[name].dtype != widest[key]
    ]
    notes = []
    if changed:
        first = folder.tensors[changed[0]].dtype
        notes = [f"stored in a wider type than {first}, with what becomes one tensor with them: {listing(changed)}"]
    return {name: widest[key] for name, key in keys.items()}, notes
