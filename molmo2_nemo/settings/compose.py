"""Hydra composition: `conf/` and the command line's overrides become one typed `RunConfig`.

The layers, later ones win: dataclass defaults, model, data, cluster, stage (published numbers), the recipe's changes
for that stage, parallel, the command line.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from molmo2_nemo.data.wordings import pin
from molmo2_nemo.errors import UserError, nearest, read_text
from molmo2_nemo.settings.hydra_keys import of_hydra
from molmo2_nemo.settings.nemo_launcher import is_launchers, of_launcher, of_stage
from molmo2_nemo.settings.renamed import new_name, with_new_names
from molmo2_nemo.settings.run import RunConfig
from molmo2_nemo.settings.schema import by_dotted_key, structure, to_dict

GROUPS = ("recipe", "scale", "model", "data", "stage", "parallel", "kernels", "cluster")
PRIMARY = "config"  # conf/config.yaml, from which composition starts
SEVERAL = re.compile(r",|\b(choice|range|interval|glob)\(")  # what an override that sweeps has
ALIASES = {("stage", "long_context"): "long"}
DEEPER = 3  # settings of one name in other places that are named


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


def stages_of(
    overrides: Sequence[str], config_dir: str | Path | None = None, config_name: str | None = None
) -> list[str]:
    """The stages that a pipeline with these overrides goes through, in order: `stages` of the recipe, or as overridden.

    Args:
        overrides: as for `compose`. What belongs to one stage alone is not asked for here, such as its data sets.

    Raises:
        UserError: no stage, one twice, or one that has no file in the group `stage`.
    """
    said = [o for o in overrides if o.split("=")[0].lstrip("+~") in ("stages", "recipe", "scale")]
    cfg = compose([*said, "data=molmo2"], config_dir, config_name)  # without data sets, which are a stage's
    stages = [ALIASES.get(("stage", name), name) for name in cfg.stages]
    known = group_options("stage", config_dir)
    if not stages:
        raise UserError(f"stages=[]: no stage to run; name some of {', '.join(known)}")
    for number, name in enumerate(stages):
        if name not in known:
            raise UserError(
                f"stages={listed(stages)}: unknown stage {name!r}; {nearest(name, known)}; a stage of your own is a "
                f"file stage/{name}.yaml in a folder that --config-dir names{of_stage(name)}"
            )
        if name in stages[:number]:
            own = Path(config_dir or "", "stage", f"{name}.yaml")
            file = own if config_dir and own.is_file() else f"conf/stage/{name}.yaml"
            raise UserError(
                f"stages={listed(stages)}: {name} is there twice, and both would train in one folder; give the second "
                f"a name of its own: a copy of {file} in a folder that --config-dir names"
            )
    return stages


def listed(names: Sequence[str]) -> str:
    """A list as the command line has it."""
    return f"[{','.join(names)}]"


def compose(
    overrides: Sequence[str], config_dir: str | Path | None = None, config_name: str | None = None
) -> RunConfig:
    """The run that `overrides` describe.

    Args:
        overrides: Hydra's syntax: `group=choice` and `dotted.key=value`.
        config_dir: a folder of the user's own files, laid out like `conf/`.
        config_name: the file that composition starts from, `<config_name>.yaml` in `config_dir`; default:
            conf/config.yaml. One of the user's own names that first: `defaults: [config, _self_]`.

    Raises:
        UserError: an override Hydra cannot read, an unknown group, choice, key or file, a value of the wrong type.
    """
    checked = checked_overrides(overrides, config_dir)
    values = _compose(checked, config_dir, primary(config_name, config_dir))
    said = {override.lstrip("+~").partition("=")[0] for override in checked}
    where = f"--config-dir {config_dir}" if config_dir else "the configuration"
    cfg = structure(RunConfig, with_new_names(values, where, by_dotted_key(to_dict(RunConfig())), said))
    pin(cfg.data.text)
    return cfg


def checked_overrides(overrides: Sequence[str], config_dir: str | Path | None) -> list[str]:
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
        if re.split(r"[./@]", key)[0] == "hydra":
            raise UserError(of_hydra(key, value))
        if head not in known:
            raise UserError(f"unknown setting {key!r}; {_meant(key, config_dir) or nearest(head, known)}")
        if value is not None and sweeps(f"{key}={value}"):
            raise UserError(
                f"{override}: several values; with --multirun (molmo2 train, pipeline) each makes a run of its own, "
                f"{key}=[...] is a list, and {key}=\"'...'\" a text with a comma"
            )
        if key in GROUPS:
            value = ALIASES.get((key, value), value)
            options = group_options(key, config_dir)
            if value not in options:
                raise UserError(f"unknown choice {key}={value}; {nearest(str(value), options)} ({', '.join(options)})")
            if config_dir and all((f / key / f"{value}.yaml").is_file() for f in (conf_dir(), Path(config_dir))):
                raise UserError(
                    f"{key}={value}: {config_dir}/{key}/{value}.yaml would not be read, but the shipped one; give "
                    "yours another name"
                )
            ready.append(f"{prefix}{key}={value}")
        elif prefix == "~":
            ready.append(f"~{key}" if value is None else f"~{key}={value}")
        else:
            # `++` sets or adds: the schema, not Hydra, says which keys exist, and names the nearest one.
            ready.append(f"++{key}={_readable(key, value)}")
    return ready


def _meant(key: str, config_dir: str | Path | None) -> str:
    """What an unknown key may stand for: a setting of one stage, one that lies deeper (`max_steps`); "" if nothing."""
    one, colon, rest = key.partition(":")
    if colon:
        return f"{one}: before a setting is for molmo2 pipeline, which runs several stages; write {rest}"
    head, _, rest = key.partition(".")
    if rest and head in group_options("stage", config_dir):
        return f"in a pipeline a setting of the stage {head} alone is written {head}:{rest}"
    settings = by_dotted_key(to_dict(RunConfig()))
    deeper = [repr(setting) for setting in settings if setting.endswith(f".{key}")]
    return f"did you mean {' or '.join(deeper[:DEEPER])}?" if deeper else ""


def sweeps(override: str) -> bool:
    """Whether Hydra's grammar reads several values: `a,b`, `choice(...)`, `range(...)` and the like."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if not SEVERAL.search(override):  # most have none of that, and reading takes time
        return False
    try:
        return OverridesParser.create().parse_override(override).is_sweep_override()
    except HydraException:
        return False


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


def primary(config_name: str | None, config_dir: str | Path | None) -> str:
    """The file that composition starts from, named as Hydra wants it: without `.yaml`.

    Raises:
        UserError: there is no such file; names those that there are, or the recipe of that name.
    """
    if config_name is None:
        return PRIMARY
    name = config_name.removesuffix(".yaml")
    folders = [conf_dir(), *([Path(config_dir)] if config_dir else [])]
    there = [folder for folder in folders if (folder / f"{name}.yaml").is_file()]
    if len(there) > 1:
        raise UserError(
            f"--config-name {config_name}: {config_dir}/{name}.yaml would not be read, but the shipped one; give "
            "yours another name"
        )
    if there:
        return name
    known = sorted({p.stem for folder in folders for p in folder.glob("*.yaml")})
    recipe = f"; recipe={name} is chosen without it" if name in group_options("recipe", config_dir) else ""
    where = f"{config_dir}" if config_dir else "the folder that --config-dir names"
    raise UserError(f"--config-name {config_name}: no file {name}.yaml in {where}; {nearest(name, known)}{recipe}")


@contextmanager
def composing(config_dir: str | Path | None = None) -> Iterator[Any]:
    """Hydra on conf/ and, behind it, the user's folder: Hydra's object.

    Raises:
        UserError: what Hydra or OmegaConf refuse while the block lasts, in one line.
    """
    from hydra import initialize_config_dir
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    schema = dataclasses.asdict(RunConfig())
    schema["stage"]["name"] = None  # that of its file, unless the file gives it another
    ConfigStore.instance().store(name="schema", node=schema)
    places = create_config_search_path(str(conf_dir()))
    if config_dir:  # not by hydra.searchpath, where Hydra looks for no primary configuration
        places.prepend("--config-dir", f"file://{Path(config_dir).resolve()}", anchor="schema")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
            GlobalHydra.instance().clear()
            yield Hydra.create_main_hydra2("molmo2", places)
    except MissingConfigException:
        raise
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UserError(_unfit(" ".join(str(error).split()))) from None
    except UnicodeDecodeError:
        for path in Path(config_dir).rglob("*.yaml") if config_dir else ():
            read_text(path)  # names the file
        raise


def _compose(overrides: list[str], config_dir: str | Path | None, config_name: str) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra.errors import MissingConfigException
    from omegaconf import OmegaConf, open_dict

    try:
        with composing(config_dir):
            composed = hydra_compose(config_name, overrides, return_hydra_config=True)
            if is_launchers(composed):
                names = [name for name in map(str, composed) if name != "hydra"]
                theirs = cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.masked_copy(composed, names)))
                known = list(by_dotted_key(to_dict(RunConfig())))
                raise UserError(of_launcher(theirs, known, f"--config-name {config_name}"))
            with open_dict(composed):
                chosen = composed.pop("hydra").runtime.choices
            if "recipe" not in chosen or "stage" not in composed:
                raise UserError(
                    f"--config-name {config_name}: {config_name}.yaml does not build on this project's settings; begin "
                    f"it with `defaults: [{PRIMARY}, _self_]`, and add `override recipe: 8b` and the like between them"
                )
            if composed.stage.get("name") is None:
                composed.stage.name = chosen["stage"]
            values = OmegaConf.to_container(composed, resolve=True)
    except MissingConfigException as error:
        raise UserError(_missing(error, overrides, config_dir)) from None
    assert isinstance(values, dict)
    return {str(k): v for k, v in values.items()}


def _unfit(said: str) -> str:
    """Hydra's words, or better ones where it cannot leave out what is not there."""
    gone = re.search(r"Could not delete from config\. '(.+?)' does not exist", said)
    unlike = re.fullmatch(r"Error merging override \+*([\w.]+)=(\{.*\})", said)
    if unlike is not None:
        return f"{unlike[1]} must be a list, not {unlike[2]}; write it in brackets, {unlike[1]}=[...]"
    if gone is None:
        return said
    own = (
        "; data=molmo2 is without data sets, so that those you add are all"
        if gone[1].startswith("data.sources.")
        else ""
    )
    return f"~{gone[1]}: these settings have no {gone[1]} to leave out{own}"


def _missing(error: Any, overrides: Sequence[str], config_dir: str | Path | None) -> str:
    """What to say where a file names another that is not there: of data, that the recipe has none for the stage."""
    group, _, name = str(error.missing_cfg_file or "").partition("/")
    if group != "data" or not name:
        return " ".join(str(error).split())
    said = dict(o.lstrip("+").split("=", 1) for o in overrides if "=" in o)
    family = name.partition("_")[0]  # of molmo2_sft: molmo2; other recipes' data are left out
    fitting = [o for o in group_options("data", config_dir) if "_" not in o or o.startswith(f"{family}_")]
    return (
        f"stage={said.get('stage', '')}: recipe={said.get('recipe', '')} has no data for it (there is no "
        f"conf/data/{name}.yaml); choose some: data={', data='.join(fitting)}, or write that file in a folder that "
        "--config-dir names"
    )
