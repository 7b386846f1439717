"""The three sets of weight names of a Molmo2: this package's (canonical), transformers' native (>= 5), remote code.

A `Rule` ties a few canonical tensors to the few external tensors that hold the same numbers, in both directions. A
conversion walks the rules one after another, so never more than one rule's tensors are in memory.

Legend: d text width, N query heads, G key/value heads, H head dim, F feed-forward width, V base vocabulary.
Canonical layouts that differ from the external ones:
    linear_qkv [G * (N/G + 2) * H, d]   per key/value group: its query heads, its key head, its value head (Megatron's)
    linear_fc1 [2 * F, d]               rows [gate ; up]; the remote code's ff_proj has [up ; gate]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from molmo2_nemo.errors import ConversionError
from molmo2_nemo.model.config import LoraConfig, Molmo2Config
from molmo2_nemo.model.families import family_of
from molmo2_nemo.model.families.base import LayerNames, TextConfig

Format = Literal["native", "remote"]
FORMATS: tuple[Format, ...] = ("native", "remote")
HEAD = "lm_head.weight"  # the output head, in both formats
LAYER_NAMES: dict[Format, LayerNames] = {
    "native": LayerNames(prefix="model.language_model.layers.{i}"),
    "remote": LayerNames(
        prefix="model.transformer.blocks.{i}",
        attention_norm="attn_norm",
        mlp_norm="ff_norm",
        qkv=("self_attn.att_proj",),
        proj="self_attn.attn_out",
        gate_up=("mlp.ff_proj",),
        down="mlp.ff_out",
    ),
}

# Beginnings of the names that only one format has, and of those of one block of the vision encoder.
BEGINNINGS: dict[Format, tuple[str, ...]] = {
    "native": ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector."),
    "remote": ("model.transformer.", "model.vision_backbone."),
}
VISION_BLOCKS: dict[Format, str] = {
    "native": "model.vision_tower.layers",
    "remote": "model.vision_backbone.image_vit.transformer.resblocks",
}

# embedding_parts: the base and the extra table, together cut anywhere when read, between the two when written.
Kind = Literal[
    "copy",
    "qkv_split",
    "qkv_rows",
    "gate_up_split",
    "up_gate_rows",
    "embedding_rows",
    "embedding_parts",
    "embedding",
]


@dataclass(frozen=True)
class Rule:
    """The same numbers under canonical and under external names.

    `head` is the external name of the output head where the head is tied: written as a copy of the base embedding, and
    checked to be one when read.
    """

    kind: Kind
    canonical: tuple[str, ...]
    external: tuple[str, ...]
    head: str | None = None


def format_of(names: Iterable[str]) -> Format | None:
    """The format that tensors are named in; None where no name says so.

    Raises:
        ConversionError: some are named in one, some in another.
    """
    first: dict[Format, str] = {}
    for name in names:
        for known, beginnings in BEGINNINGS.items():
            if name.startswith(beginnings):
                first.setdefault(known, name)
    if len(first) > 1:
        raise ConversionError(f"has tensors of more than one format: {' and '.join(first.values())}")
    return next(iter(first), None)


def canonical_shapes(model_config: Molmo2Config) -> dict[str, tuple[int, ...]]:
    """Every canonical parameter of the whole model and its shape, in the order of the forward pass."""
    vision, connector, text = model_config.vision, model_config.connector, model_config.text
    d, width = text.hidden_size, vision.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    linear(shapes, "vision.patch_embedding", width, vision.patch_dim)
    shapes["vision.position_embedding"] = (vision.num_patches, width)
    for i in range(vision.num_built_layers):
        block = f"vision.blocks.{i}"
        for norm in ("norm1", "norm2"):
            shapes[f"{block}.{norm}.weight"] = shapes[f"{block}.{norm}.bias"] = (width,)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear(shapes, f"{block}.attention.{name}", width, width)
        linear(shapes, f"{block}.mlp.fc1", vision.ffn_size, width)
        linear(shapes, f"{block}.mlp.fc2", width, vision.ffn_size)
    for name in ("q_proj", "k_proj", "v_proj"):
        linear(shapes, f"connector.pooling.{name}", connector.hidden_size, vision.feature_size)
    linear(shapes, "connector.pooling.o_proj", connector.hidden_size, connector.hidden_size)
    for name in ("gate_proj", "up_proj"):
        shapes[f"connector.projector.{name}.weight"] = (connector.ffn_size, connector.hidden_size)
    shapes["connector.projector.down_proj.weight"] = (d, connector.ffn_size)
    shapes["embedding.base.weight"] = (text.vocab_size, d)
    shapes["embedding.extra.weight"] = (model_config.extra_vocab_size, d)
    for i in range(text.num_layers):
        shapes |= layer_shapes(text, i)
        if model_config.lora is not None:
            shapes |= adapter_shapes(model_config.lora, layer_shapes(text, i))
    shapes["decoder.final_layernorm.weight"] = (d,)
    if not text.tie_embeddings:
        shapes["output_layer.weight"] = (text.vocab_size, d)
    return shapes


def linear(shapes: dict[str, tuple[int, ...]], name: str, out_size: int, in_size: int) -> None:
    """Add the weight and bias of one biased linear map."""
    shapes[f"{name}.weight"] = (out_size, in_size)
    shapes[f"{name}.bias"] = (out_size,)


def layer_shapes(text: TextConfig, i: int) -> dict[str, tuple[int, ...]]:
    """Canonical parameters of decoder layer `i`."""
    d, heads, groups, head = text.hidden_size, text.num_heads, text.num_kv_heads, text.head_dim
    q_norm, k_norm = family_of(text).qk_norm_widths(text)
    attention_norm, mlp_norm = norm_names(text)
    shapes = {
        attention_norm: (d,),
        "self_attention.linear_qkv.weight": ((heads + 2 * groups) * head, d),
        "self_attention.q_layernorm.weight": (q_norm,),
        "self_attention.k_layernorm.weight": (k_norm,),
        "self_attention.linear_proj.weight": (d, heads * head),
        mlp_norm: (d,),
        "mlp.linear_fc1.weight": (2 * text.ffn_size, d),
        "mlp.linear_fc2.weight": (d, text.ffn_size),
    }
    return {f"decoder.layers.{i}.{name}": shape for name, shape in shapes.items() if shape != (0,)}


def adapter_shapes(lora: LoraConfig, layer: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Canonical adapters beside a layer's parameters."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in layer.items():
        if name.split(".")[-2] in lora.targets:
            shapes[name.replace("weight", "lora_a")] = (lora.rank, shape[1])
            shapes[name.replace("weight", "lora_b")] = (shape[0], lora.rank)
    return shapes


def norm_names(text: TextConfig) -> tuple[str, str]:
    """Names, within a layer, of the attention branch's norm and of the MLP branch's norm."""
    if family_of(text).post_norm:  # the norm belongs to the branch's last linear map
        return "self_attention.linear_proj.post_norm.weight", "mlp.linear_fc2.post_norm.weight"
    return "input_layernorm.weight", "pre_mlp_layernorm.weight"


def rules(model_config: Molmo2Config, target: Format) -> Iterator[Rule]:
    """All rules between the canonical names and those of one external format."""
    if target not in FORMATS:
        raise ConversionError(f"unknown format {target!r}; known formats: {', '.join(FORMATS)}")
    native = target == "native"
    yield from vision_rules(model_config, target)
    yield from embedding_rules(model_config, native)
    for i in range(model_config.text.num_layers):
        yield from layer_rules(model_config.text, i, LAYER_NAMES[target])
    final = "model.language_model.norm.weight" if native else "model.transformer.ln_f.weight"
    yield Rule("copy", ("decoder.final_layernorm.weight",), (final,))


def vision_rules(model_config: Molmo2Config, target: Format) -> Iterator[Rule]:
    """Vision encoder and connector: pure renaming."""
    native, blocks = target == "native", VISION_BLOCKS[target]
    tower = "model.vision_tower" if native else "model.vision_backbone.image_vit"
    parts = ("weight", "bias")
    projections = {p: p if native else f"w{p[0]}" for p in ("q_proj", "k_proj", "v_proj", "o_proj")}

    for part in parts:
        yield Rule("copy", (f"vision.patch_embedding.{part}",), (f"{tower}.patch_embedding.{part}",))
    yield Rule("copy", ("vision.position_embedding",), (f"{tower}.positional_embedding",))
    if native:
        names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        attention = "self_attn"
    else:
        names = {"norm1": "attention_norm", "norm2": "ffn_norm", "mlp.fc1": "feed_forward.w1"}
        names["mlp.fc2"] = "feed_forward.w2"
        attention = "attention"
    names |= {f"attention.{ours}": f"{attention}.{theirs}" for ours, theirs in projections.items()}
    for i in range(model_config.vision.num_built_layers):
        for ours, theirs in names.items():
            for part in parts:
                yield Rule("copy", (f"vision.blocks.{i}.{ours}.{part}",), (f"{blocks}.{i}.{theirs}.{part}",))

    connector = "model.multi_modal_projector" if native else "model.vision_backbone"
    for ours, theirs in projections.items():
        for part in parts:
            external = f"{connector}.image_pooling_2d.{theirs}.{part}"
            yield Rule("copy", (f"connector.pooling.{ours}.{part}",), (external,))
    for ours, remote in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        external = f"{connector}.image_projector.{ours if native else remote}.weight"
        yield Rule("copy", (f"connector.projector.{ours}.weight",), (external,))


def embedding_rules(model_config: Molmo2Config, native: bool) -> Iterator[Rule]:
    """Embedding tables and the head."""
    tied = HEAD if model_config.text.tie_embeddings else None
    base, extra = "embedding.base.weight", "embedding.extra.weight"
    if native:
        yield Rule("embedding_rows", (base, extra), ("model.language_model.embed_tokens.weight",), head=tied)
    else:
        tables = ("model.transformer.wte.embedding", "model.transformer.wte.new_embedding")
        yield Rule("embedding_parts", (base, extra), tables, head=tied)
    if not model_config.text.tie_embeddings:
        yield Rule("copy", ("output_layer.weight",), (HEAD,))


def layer_rules(text: TextConfig, i: int, names: LayerNames) -> Iterator[Rule]:
    """Decoder layer `i`, in a format that calls its weights `names`."""
    ours = f"decoder.layers.{i}"

    def rule(kind: Kind, canonical: str, *external: str) -> Rule:
        return Rule(kind, (f"{ours}.{canonical}",), tuple(names.of_layer(i, name) for name in external))

    for canonical, external in zip(norm_names(text), (names.attention_norm, names.mlp_norm), strict=True):
        yield rule("copy", canonical, external)
    yield rule("qkv_split" if len(names.qkv) == 3 else "qkv_rows", "self_attention.linear_qkv.weight", *names.qkv)
    split = len(names.gate_up) == 2
    yield rule("gate_up_split" if split else "up_gate_rows", "mlp.linear_fc1.weight", *names.gate_up)
    if family_of(text).qk_norm != "none":
        yield rule("copy", "self_attention.q_layernorm.weight", names.q_norm)
        yield rule("copy", "self_attention.k_layernorm.weight", names.k_norm)
    yield rule("copy", "self_attention.linear_proj.weight", names.proj)
    yield rule("copy", "mlp.linear_fc2.weight", names.down)


def external_shapes(model_config: Molmo2Config, target: Format) -> dict[str, tuple[int, ...]]:
    """Every tensor of an external format and its shape, the tied copy of the head included."""
    return rule_shapes(rules(model_config, target), model_config)


def rule_shapes(chosen: Iterable[Rule], model_config: Molmo2Config) -> dict[str, tuple[int, ...]]:
    """Every external tensor of the chosen rules and its shape, the tied copy of the head included."""
    shapes: dict[str, tuple[int, ...]] = {}
    ours = canonical_shapes(model_config)
    text = model_config.text
    for rule in chosen:
        first = ours[rule.canonical[0]]
        if rule.kind == "qkv_split":
            widths = (text.num_heads, text.num_kv_heads, text.num_kv_heads)
            for name, heads in zip(rule.external, widths, strict=True):
                shapes[name] = (heads * text.head_dim, *first[1:])
        elif rule.kind == "gate_up_split":
            for name in rule.external:
                shapes[name] = (text.ffn_size, *first[1:])
        elif rule.kind == "embedding_parts":
            shapes |= {name: ours[part] for name, part in zip(rule.external, rule.canonical, strict=True)}
        else:  # one external tensor: the canonical rows together
            rows = sum(ours[name][0] for name in rule.canonical)
            shapes[rule.external[0]] = (rows, *first[1:])
        if rule.head:
            shapes[rule.head] = first
    return shapes


def to_external(rule: Rule, tensors: list[Tensor], model_config: Molmo2Config) -> dict[str, Tensor]:
    """External tensors of one rule from its canonical ones (in the order of `rule.canonical`)."""
    first = tensors[0]
    if rule.kind == "qkv_split":
        parts: tuple[Tensor, ...] = split_qkv(first, model_config.text)
    elif rule.kind == "qkv_rows":
        parts = (torch.cat(split_qkv(first, model_config.text)),)
    elif rule.kind == "gate_up_split":
        parts = first.chunk(2)
    elif rule.kind == "up_gate_rows":
        parts = (torch.cat(first.chunk(2)[::-1]),)
    elif rule.kind == "embedding_rows":
        parts = (torch.cat(tensors),)
    elif rule.kind == "embedding_parts":
        parts = tuple(tensors)
    else:
        parts = (first,)
    external = dict(zip(rule.external, parts, strict=True))
    if rule.head:
        external[rule.head] = first
    return external


def to_canonical(rule: Rule, tensors: dict[str, Tensor], model_config: Molmo2Config) -> dict[str, Tensor]:
    """Canonical tensors of one rule from its external ones. A tied head may be absent.

    Raises:
        ConversionError: the head of a tied model is not a copy of the base embedding.
    """
    parts = [tensors[name] for name in rule.external]
    first = parts[0]
    if rule.kind == "qkv_split":
        ours = [join_qkv(first, parts[1], parts[2], model_config.text)]
    elif rule.kind == "qkv_rows":
        groups, heads, head = model_config.text.num_kv_heads, model_config.text.num_heads, model_config.text.head_dim
        q, k, v = first.split([heads * head, groups * head, groups * head])
        ours = [join_qkv(q, k, v, model_config.text)]
    elif rule.kind == "gate_up_split":
        ours = [torch.cat(parts)]
    elif rule.kind == "up_gate_rows":
        ours = [torch.cat(first.chunk(2)[::-1])]
    elif rule.kind in ("embedding_rows", "embedding_parts"):
        rows = [model_config.text.vocab_size, model_config.extra_vocab_size]
        ours = parts if [len(part) for part in parts] == rows else list(torch.cat(parts).split(rows))
    else:
        ours = parts
    if rule.head and rule.head in tensors and not same_values(tensors[rule.head], ours[0]):
        raise ConversionError(
            f"{rule.head} is not a copy of the base rows of {rule.external[0]}, but model {model_config.name!r} ties "
            "its head to them"
        )
    return dict(zip(rule.canonical, ours, strict=True))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one type and shape are the same, bit by bit."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return one.dtype == other.dtype and torch.equal(one.view(whole), other.view(whole))


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers, whatever their types and the sign of a zero."""
    wide = torch.promote_types(one.dtype, other.dtype)
    return same_bits(one, other) or torch.equal(one.to(wide), other.to(wide))


def split_qkv(qkv: Tensor, text: TextConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's interleaved [G * (N/G + 2) * H, d] into query [N*H, d], key [G*H, d] and value [G*H, d]."""
    per_group = text.num_heads // text.num_kv_heads
    grouped = qkv.view(text.num_kv_heads, per_group + 2, text.head_dim, -1)
    q, k, v = grouped.split([per_group, 1, 1], dim=1)
    width = qkv.shape[-1]
    return q.reshape(-1, width), k.reshape(-1, width), v.reshape(-1, width)


def join_qkv(q: Tensor, k: Tensor, v: Tensor, text: TextConfig) -> Tensor:
    """The inverse of `split_qkv`."""
    width = q.shape[-1]
    grouped = [part.reshape(text.num_kv_heads, -1, text.head_dim, width) for part in (q, k, v)]
    return torch.cat(grouped, dim=1).reshape(-1, width)
