"""Hydra composition: `conf/` and the command line's overrides become one typed `RunConfig`.

The layers, later ones win: dataclass defaults, model, data, cluster, stage (published numbers), the recipe's changes
for that stage, parallel, the command line.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molmo2_nemo.data.wordings import pin
from molmo2_nemo.errors import UserError, nearest, read_text
from molmo2_nemo.settings.renamed import new_name, with_new_names
from molmo2_nemo.settings.run import RunConfig
from molmo2_nemo.settings.schema import by_dotted_key, structure, to_dict

GROUPS = ("recipe", "scale", "model", "data", "stage", "parallel", "kernels", "cluster")
STAGES = ("pretrain", "sft", "long")
ALIASES = {("stage", "long_context"): "long"}


def conf_dir() -> Path:
    """The folder of the shipped configuration: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise UserError(f"the configuration folder is missing from {package}; install the package again")


def group_options(group: str, config_dir: str | Path | None = None) -> list[str]:
    """The names that `group=` takes: those of files in conf/ and in the user's folder."""
    folders = [conf_dir() / group] + ([Path(config_dir) / group] if config_dir else [])
    return sorted({p.stem for folder in folders if folder.is_dir() for p in folder.glob("*.yaml")})


def compose(overrides: Sequence[str], config_dir: str | Path | None = None) -> RunConfig:
    """The run that `overrides` describe.

    Args:
        overrides: Hydra's syntax: `group=choice` and `dotted.key=value`.
        config_dir: a folder of the user's own files, laid out like `conf/`.

    Raises:
        UserError: an override Hydra cannot read, an unknown group, choice or key, a value of the wrong type.
    """
    checked = _checked(overrides, config_dir)
    values = _compose(checked, config_dir)
    said = {override.lstrip("+~").partition("=")[0] for override in checked}
    where = f"--config-dir {config_dir}" if config_dir else "the configuration"
    cfg = structure(RunConfig, with_new_names(values, where, by_dotted_key(to_dict(RunConfig())), said))
    pin(cfg.data.text)
    return cfg


def _checked(overrides: Sequence[str], config_dir: str | Path | None) -> list[str]:
    """Overrides as Hydra should see them; group choices are checked here, keys after composition by the schema."""
    if config_dir and not Path(config_dir).is_dir():
        raise UserError(f"--config-dir {config_dir} is not a folder")
    known = {f.name for f in dataclasses.fields(RunConfig)} | set(GROUPS)
    ready = []
    for override in overrides:
        match = re.fullmatch(r"(~|\+{0,2})([^=]+?)(?:=(.*))?", override, flags=re.DOTALL)
        if not match or (match[1] != "~" and match[3] is None):
            raise UserError(f"cannot read {override!r}; settings are written key=value, for example stage.max_steps=20")
        prefix, key, value = match[1], new_name(match[2]), match[3]
        head = key.split(".")[0]
        if head not in known:
            raise UserError(f"unknown setting {key!r}; {nearest(head, known)}")
        if key in GROUPS:
            value = ALIASES.get((key, value), value)
            options = group_options(key, config_dir)
            if value not in options:
                raise UserError(f"unknown choice {key}={value}; {nearest(str(value), options)} ({', '.join(options)})")
            ready.append(f"{prefix}{key}={value}")
        elif prefix == "~":
            ready.append(f"~{key}" if value is None else f"~{key}={value}")
        else:
            # `++` sets or adds: the schema, not Hydra, says which keys exist, and names the nearest one.
            ready.append(f"++{key}={_readable(key, value)}")
    return ready


def _readable(key: str, value: str) -> str:
    """The value as Hydra's grammar wants it: text that it cannot read, such as a path with `=`, is quoted.

    Raises:
        UserError: a list or mapping that is not written to its end.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(f"++{key}={value}")
    except HydraException:
        if value[:1] in ("[", "{", "'", '"'):
            raise UserError(f"cannot read the value of {key}={value}; is a bracket or quote missing?") from None
        return "'" + value.replace("'", "\\'") + "'"
    return value


def _compose(overrides: list[str], config_dir: str | Path | None) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    ConfigStore.instance().store(name="schema", node=dataclasses.asdict(RunConfig()))
    if config_dir:
        overrides = [f"hydra.searchpath=['file://{Path(config_dir).resolve()}']", *overrides]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
            composed = hydra_compose("config", overrides)
        values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UserError(" ".join(str(error).split())) from None
    except UnicodeDecodeError:
        for path in Path(config_dir).rglob("*.yaml") if config_dir else ():
            read_text(path)  # names the file
        raise
    assert isinstance(values, dict)
    return {str(k): v for k, v in values.items()}
