"""What is logged of every step: one file per subject, found automatically. `Metric` in interface.py says what to write.

A file of this folder needs no mention elsewhere: `found` reads all of them.
"""

from __future__ import annotations

import importlib
import pkgutil

from molmo2_nemo.training.metrics.interface import Metric


def found() -> list[Metric]:
    """Every metric of this folder, in the order of a line of metrics.jsonl; alike on all ranks."""
    names = sorted(f"{__name__}.{file.name}" for file in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(name) for name in names]
    classes = [kind for module in modules for kind in vars(module).values() if _defined_in(kind, module.__name__)]
    return [kind() for kind in sorted(classes, key=lambda kind: (kind.place, kind.__module__, kind.__name__))]


def _defined_in(kind: object, module: str) -> bool:
    return isinstance(kind, type) and issubclass(kind, Metric) and kind is not Metric and kind.__module__ == module
