"""The fields of a Molmo2's config.json: their names in both formats, their types, and what a file may leave out.

A file leaves out what its reader assumes. The readers are transformers' own Molmo2 for the native format, the published
remote code for the other, and they do not assume the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from molmo2_nemo.convert.names import Format
from molmo2_nemo.errors import ConversionError

MAX_LAYERS = 1000  # more than any model has: the work before the first tensor is read grows with it
MAX_COUNT = 2**40
Number = TypeVar("Number", int, float)


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return (is_integer(value) and abs(value) <= MAX_COUNT) or (isinstance(value, float) and math.isfinite(value))


def is_integers(value: Any) -> bool:
    return isinstance(value, list) and all(is_integer(item) and abs(item) <= MAX_COUNT for item in value)


@dataclass(frozen=True)
class Kind:
    """A type of value: how to recognise it, and its name in messages."""

    fits: Callable[[Any], bool]
    title: str


COUNT = Kind(lambda value: is_integer(value) and 1 <= value <= MAX_COUNT, "an integer of at least 1")
ROWS = Kind(lambda value: is_integer(value) and 0 <= value <= MAX_COUNT, "an integer of at least 0")
LAYERS = Kind(lambda value: is_integer(value) and 1 <= value <= MAX_LAYERS, f"an integer from 1 to {MAX_LAYERS}")
SCALE = Kind(lambda value: is_number(value) and value >= 0, "a number of at least 0")
POSITIVE = Kind(lambda value: is_number(value) and value > 0, "a number above 0")
FLAG = Kind(lambda value: isinstance(value, bool), "true or false")
WORD = Kind(lambda value: isinstance(value, str), "a string")
INTEGERS = Kind(is_integers, "a list of integers")
LAYER_LIST = Kind(lambda value: is_integers(value) and len(value) > 0, "a list of at least one integer")
SIDES = Kind(
    lambda value: COUNT.fits(value) or (is_integers(value) and len(value) == 2 and all(side > 0 for side in value)),
    "a list of two integers above 0",
)

SAME: Any = object()  # the remote code assumes what transformers assumes


@dataclass(frozen=True)
class Field:
    """One field. `null` says that null means the same as leaving it out."""

    default: Any  # what transformers assumes
    kind: Kind
    remote: Any = SAME  # what the remote code assumes
    remote_name: str | None = None  # its name in the remote code's files, where it differs
    null: bool = False

    def assumed(self, source: Format) -> Any:
        return self.default if source == "native" or self.remote is SAME else self.remote


# Fields of which only one format has a name have the same meaning, or the one value that both have, in the other.
VISION: dict[str, Field] = {
    "hidden_size": Field(1152, COUNT),
    "intermediate_size": Field(4304, COUNT),
    "num_hidden_layers": Field(25, LAYERS, remote=27),
    "num_attention_heads": Field(16, COUNT),
    "num_key_value_heads": Field(16, COUNT),
    "head_dim": Field(72, COUNT),
    "patch_size": Field(14, COUNT, remote_name="image_patch_size"),
    "hidden_act": Field("gelu_pytorch_tanh", WORD),
    "layer_norm_eps": Field(1e-6, SCALE),
    "image_size": Field([378, 378], SIDES, remote_name="image_default_input_size", null=True),
    "attention_bias": Field(True, FLAG),
    "num_channels": Field(3, COUNT),
    "num_position_embeddings": Field(None, COUNT, remote=577, remote_name="image_num_pos", null=True),
    "initializer_range": Field(0.02, SCALE),
}
ADAPTER: dict[str, Field] = {
    "vision_feature_layer": Field([24, 18], LAYER_LIST, remote=[-3, -9], remote_name="vit_layers", null=True),
    "hidden_size": Field(1152, COUNT),
    "num_attention_heads": Field(16, COUNT),
    "num_key_value_heads": Field(16, COUNT),
    "head_dim": Field(72, COUNT),
    "intermediate_size": Field(18944, COUNT),
    "text_hidden_size": Field(3584, COUNT),
    "hidden_act": Field("silu", WORD),
    "attention_bias": Field(True, FLAG),
    "mlp_bias": Field(False, FLAG),
    "pooling_attention_mask": Field(True, FLAG, remote=False),
    "initializer_range": Field(0.02, SCALE),
}
TEXT: dict[str, Field] = {
    "hidden_size": Field(4096, COUNT, remote=3584),
    "num_attention_heads": Field(32, COUNT, remote=28),
    "num_key_value_heads": Field(8, COUNT, remote=4),
    "head_dim": Field(128, COUNT),
    "vocab_size": Field(151936, COUNT, remote=152064),
    "additional_vocab_size": Field(128, ROWS),
    "attention_bias": Field(False, FLAG, remote=True, remote_name="qkv_bias"),
    "use_qk_norm": Field(None, FLAG, remote=False, null=True),  # a native model has them in any case
    "qk_norm_type": Field("qwen3", WORD, remote="olmo"),
    "num_hidden_layers": Field(36, LAYERS, remote=48),
    "intermediate_size": Field(12288, COUNT, remote=18944),
    "hidden_act": Field("silu", WORD),
    "max_position_embeddings": Field(36864, COUNT, remote=4096),
    "rms_norm_eps": Field(1e-6, SCALE, remote_name="layer_norm_eps"),
    "norm_after": Field(False, FLAG),
    "rope_scaling_layers": Field(None, INTEGERS, null=True),
    "initializer_range": Field(0.02, SCALE),
}
SECTIONS: dict[str, tuple[dict[Format, str], dict[str, Field]]] = {
    "vision": ({"native": "vision_config", "remote": "vit_config"}, VISION),
    "adapter": ({"native": "adapter_config", "remote": "adapter_config"}, ADAPTER),
    "text": ({"native": "text_config", "remote": "text_config"}, TEXT),
}


@dataclass(frozen=True)
class Section:
    """One part of a config.json under native names, filled up, every known field of its type."""

    key: str  # of the part in its file; "" where the file is the part
    source: Format  # whose defaults apply
    values: Mapping[str, Any]
    written: Mapping[str, str]  # native name -> name in the file, where they differ

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def path(self, name: str) -> str:
        """A field as its file writes it, for messages."""
        name = self.written.get(name, name)
        return f"{self.key}.{name}" if self.key else name

    def expect(self, **wanted: Any) -> None:
        """Refuse a variant that would silently compute something else.

        Raises:
            ConversionError: names the field.
        """
        for name, value in wanted.items():
            found = self.values.get(name, value)
            if found != value or isinstance(found, bool) != isinstance(value, bool):
                raise ConversionError(
                    f"{self.path(name)} is {found!r:.60}, expected {value!r}: not a Molmo2 that is supported"
                )


def read_section(data: Mapping[str, Any], part: Literal["vision", "adapter", "text"], source: Format) -> Section:
    """One part of a config.json.

    Raises:
        ConversionError: the part is no object, or a field is of the wrong type; names the field as the file does.
    """
    keys, known = SECTIONS[part]
    key = keys[source]
    found = data.get(key)
    if found is not None and not isinstance(found, dict):
        raise ConversionError(f"{key} is a {type(found).__name__}, expected an object")
    return checked(found or {}, known, key, source)


def checked(found: Mapping[str, Any], known: Mapping[str, Field], key: str, source: Format) -> Section:
    """`found` as a `Section`; either format's names are taken, as transformers does, and the remote code's first.

    Raises:
        ConversionError: a field is of the wrong type.
    """
    native = {field.remote_name: name for name, field in known.items() if field.remote_name is not None}
    native = {old: new for old, new in native.items() if old not in known}
    written = {native[name]: name for name in found if name in native}
    values = {name: field.assumed(source) for name, field in known.items()}
    for given in sorted(found, key=native.__contains__):  # what comes later counts
        name, value = native.get(given, given), found[given]
        field = known.get(name)
        if field is None or value is not None or not field.null:
            values[name] = value
    section = Section(key, source, values, written)
    for name, field in known.items():
        if values[name] is not field.assumed(source):
            require(section.path(name), values[name], field.kind)
    return section


def require(name: str, value: Any, kind: Kind) -> None:
    """Raises:
    ConversionError: `value` is not of this kind; `name` is that of its field."""
    if not kind.fits(value):
        shown = "null" if value is None else f"{value!r:.60}"
        raise ConversionError(f"{name} is {shown}, expected {kind.title}")
