"""Families of language models that a Molmo2 can be made of, one file each.

To add one, put a file here that defines `FAMILY`; nothing else needs to know it. Its sizes become presets.

To add a size:
    model        `sizes` of its family's file here, under the name of the preset
    settings     conf/model/NAME.yaml, conf/recipe/NAME.yaml, conf/recipe/stages/NAME_STAGE.yaml; recipes/NAME
    conversion   HUB_REPOSITORIES in convert/hf_config.py: where its remote code is published
    planner      HOURS in plan/published.py, where the paper reports its GPU-hours
tests/model/test_families.py checks that the files and entries are there.
"""

from __future__ import annotations

import importlib
import pkgutil

from molmo2_nemo.errors import UserError, nearest
from molmo2_nemo.model.families.base import Family, TextConfig


def _found() -> dict[str, Family]:
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")
    families = [importlib.import_module(f"{__name__}.{module}").FAMILY for module in modules]
    return {family.name: family for family in families}


FAMILIES: dict[str, Family] = _found()


def family_of(text: TextConfig) -> Family:
    """The family of a language model.

    Raises:
        UserError: `text.family` is not one of FAMILIES.
    """
    if text.family not in FAMILIES:
        raise UserError(f"unknown family of language models {text.family!r}; {nearest(text.family, FAMILIES)}")
    return FAMILIES[text.family]
