"""What Hydra shows of a composition, by its own means: `--cfg hydra`, `--cfg all`, `--package` and `--info`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import UserError, nearest
from molmo2_nemo.settings.compose import checked_overrides, composing, primary
from molmo2_nemo.settings.hydra_keys import KINDS


def hydra_yaml(
    overrides: Sequence[str],
    config_dir: str | Path | None = None,
    config_name: str | None = None,
    *,
    package: str | None = None,
    resolve: bool = False,
) -> str:
    """Hydra's own part of the composition as YAML: choices, search path, and settings of which a run reads none.

    Args:
        overrides, config_dir, config_name: as for `compose`.
        package: the part of it to give, `hydra` or a dotted key below.
        resolve: interpolations resolved; where one cannot be outside Hydra's own start, an error says so.

    Raises:
        UserError: settings that cannot be composed, or no such part.
    """
    from hydra import compose as hydra_compose
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    name, checked = primary(config_name, config_dir), checked_overrides(overrides, config_dir)
    with composing(config_dir):
        composed = hydra_compose(name, checked, return_hydra_config=True)
        before = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(composed)  # what ${hydra:...} stands for
        try:
            values = OmegaConf.to_container(OmegaConf.masked_copy(composed, ["hydra"]), resolve=resolve)
        finally:
            HydraConfig.instance().cfg = before
    assert isinstance(values, dict)
    note = (
        "# Composed by Hydra; of this part a run reads only what was chosen, and starts, logs and sweeps by itself.\n"
    )
    return (note if package is None else "") + part_of({str(k): v for k, v in values.items()}, package)


def part_of(values: Mapping[str, Any], package: str | None) -> str:
    """A part of nested values as YAML, under the line by which Hydra says which it is.

    Args:
        package: dotted key; None or `_global_`: the whole.

    Raises:
        UserError: there is no such key; names the nearest.
    """
    import yaml

    found: Any = values
    if package in (None, "_global_"):
        return yaml.safe_dump(dict(found), sort_keys=False, default_flow_style=False)
    assert package is not None
    for number, part in enumerate(package.split(".")):
        if not isinstance(found, Mapping) or part not in found:
            above = ".".join(package.split(".")[:number])
            known = list(found) if isinstance(found, Mapping) else []
            raise UserError(
                f"--package {package}: no {part!r} in {above or 'the configuration'}; {nearest(part, known)}"
            )
        found = found[part]
    if not isinstance(found, Mapping | list):
        return f"{'null' if found is None else str(found).lower() if isinstance(found, bool) else found}\n"
    return f"# @package {package}\n" + yaml.safe_dump(found, sort_keys=False, default_flow_style=False)


def info(
    kind: str, overrides: Sequence[str], config_dir: str | Path | None = None, config_name: str | None = None
) -> None:
    """Prints what Hydra says of its composition.

    Args:
        kind: one of KINDS: the list of defaults or their tree, the configuration, search path, plugins.
        overrides, config_dir, config_name: as for `compose`.

    Raises:
        UserError: an unknown kind, or settings that cannot be composed.
    """
    from hydra.types import RunMode

    if kind not in KINDS:
        raise UserError(f"--info {kind}: {nearest(kind, KINDS)} ({', '.join(KINDS)})")
    name, checked = primary(config_name, config_dir), checked_overrides(overrides, config_dir)
    with composing(config_dir) as hydra, _shown():
        hydra.show_info(kind, config_name=name, overrides=checked, run_mode=RunMode.RUN)


@contextmanager
def _shown() -> Iterator[None]:
    """Hydra shows by logging: to stdout while the block lasts, with the root logger as it was afterwards."""
    root, disabled = logging.getLogger(), logging.root.manager.disable
    level, handlers = root.level, list(root.handlers)
    root.handlers.clear()
    logging.disable(logging.NOTSET)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.disable(disabled)
