"""Between plain YAML values and the typed dataclasses of `molmo2_nemo.settings.run`, with errors a person can act on.

OmegaConf's structured configs know no `Literal`, so the dataclasses are read here; Hydra only composes plain values.
"""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from molmo2_nemo.errors import UserError, nearest, read_text
from molmo2_nemo.settings.nemo_launcher import is_launchers, of_launcher
from molmo2_nemo.settings.renamed import WITHDRAWN, with_new_names
from molmo2_nemo.settings.run import RunConfig

T = TypeVar("T")


def structure(cls: type[T], values: Any, path: str = "") -> T:
    """Builds the dataclass `cls` from a mapping; missing keys keep their defaults.

    Raises:
        UserError: an unknown key (names the nearest known one), a value of the wrong type, or not one of those allowed.
    """
    if not isinstance(values, dict):
        raise UserError(f"{path or 'config'} must be a group of settings, not {values!r}")
    hints = get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            dotted = f"{path}.{key}" if path else str(key)
            close = nearest(str(key), known)
            if close.startswith("did you mean") and path:
                close = close.replace("'", f"'{path}.", 1)
            raise UserError(f"unknown setting {dotted!r}; {close}")
    made = {k: _value(hints[k], v, f"{path}.{k}" if path else k) for k, v in values.items()}
    return cls(**made)


def _value(hint: Any, value: Any, path: str) -> Any:
    """`value` as the type that the annotation `hint` names."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _value(next(a for a in args if a is not type(None)), value, path)
    if origin is Literal:
        if value not in args:
            why = WITHDRAWN.get(f"{path}={value}")
            raise UserError(
                f"{path} is {value!r}; expected one of: {', '.join(map(str, args))}{f' ({why})' if why else ''}"
            )
        return value
    if dataclasses.is_dataclass(hint):
        return structure(hint, value, path)  # type: ignore[arg-type]
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{path} must map names to settings, not {value!r}")
        return {str(k): _value(args[1], v, f"{path}.{k}") for k, v in value.items()}
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{path} must be a list, not {value!r}; write it in brackets, {path}=[...]")
        return origin(_value(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    return _scalar(hint, value, path)


def _scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 (no dot) as text
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))
    raise UserError(f"{path} is {value!r}; expected {wanted}")


def to_dict(cfg: RunConfig) -> dict[str, Any]:
    """The configuration as plain values, ready for YAML or JSON."""
    return dataclasses.asdict(cfg)


def not_default(cfg: Any) -> dict[str, Any]:
    """A configuration, or a part of one, as plain values without those that `structure` gives it anyway.

    What is left out of a group is as its own class has it, whatever the group is where nothing of it is set: a learning
    rate of `stage.optim.vit` is left out where it is GroupConfig's, not where it is OptimConfig's.
    """
    values, found = dataclasses.asdict(cfg), {}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        usual = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value != usual:
            found[field.name] = not_default(value) if dataclasses.is_dataclass(value) else values[field.name]
    return found


def to_yaml(cfg: RunConfig) -> str:
    import yaml

    return yaml.safe_dump(to_dict(cfg), sort_keys=False, default_flow_style=False)


def load_yaml(path: str | Path) -> RunConfig:
    """Reads a resolved configuration written by `to_yaml`.

    Raises:
        UserError: the file is missing, is not YAML, or does not fit the schema.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a configuration file" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}")
    return read_yaml(read_text(path), str(path))


def read_yaml(text: str, path: str) -> RunConfig:
    """The configuration in a YAML text, its settings under their current names; `path` names it in errors.

    Raises:
        UserError: the text is not YAML, or does not fit the schema.
    """
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from None
    if values is None:
        raise UserError(f"{path} is empty; expected the settings of a run")
    if is_launchers(values):
        raise UserError(of_launcher(values, list(by_dotted_key(to_dict(RunConfig()))), path))
    if isinstance(values, dict):
        values = with_new_names(values, path)
    try:
        return structure(RunConfig, values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def by_dotted_key(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested plain values as `{dotted key: value}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{path}.{key}" if path else key
        if isinstance(value, dict) and value:
            flat.update(by_dotted_key(value, dotted))
        else:
            flat[dotted] = value
    return flat
