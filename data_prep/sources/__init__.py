"""Every data set that `molmo2 prepare` knows. Modules are listed here, and imported only when a source is looked up."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_prep.sources.base import Source

# One module per family; each holds SOURCES, a tuple. In the order of `molmo2 prepare --list`.
MODULES: tuple[str, ...] = (
    "pixmo",
    "cosyn",
    "image_multi",
    "image_academic",
    "image_manual",
    "text",
    "molmo2_video",
    "video_academic_hub",
    "video_academic_qa",
    "video_academic_clips",
    "video_academic_labels",
    "video_points",
    "tracking",
    "optional",
    "long_video",
)


@functools.cache
def all_sources() -> dict[str, Source]:
    """Name -> source, in the order of MODULES.

    Raises:
        AssertionError: two sources of one name.
    """
    found: dict[str, Source] = {}
    for module in MODULES:
        for source in importlib.import_module(f"data_prep.sources.{module}").SOURCES:
            assert source.name not in found, f"the source {source.name} is defined twice"
            found[source.name] = source
    return found


def find_source(name: str) -> Source:
    """The source with that name, or with that name in the released mixture.

    Raises:
        UserError: there is none; the message suggests the nearest name.
    """
    from molmo2_nemo.errors import UserError, nearest

    sources = all_sources()
    for source in sources.values():
        if name in (source.name, source.published_as):
            return source
    close = nearest(name, sources)
    hint = f" {close}" if close.startswith("did you mean") else ""
    raise UserError(f"no data set {name!r};{hint} molmo2 prepare --list shows all")
