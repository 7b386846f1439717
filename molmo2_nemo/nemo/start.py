"""NeMo's libraries as a run loads them: with the CPU shims, and without what a run does not use.

`nemo.collections.llm` defines every model that NeMo has, and `modelopt` quantises, prunes and distils. They take a
quarter of the time that loading takes, in every process of a run. NeMo's trainer asks modelopt at each checkpoint and
step whether it has converted the model; the answers are known where modelopt was never loaded, so `UNCONVERTED` has
them. Where NeMo's own command starts a run it has loaded both already, and all stays as it is.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

from molmo2_nemo import cpu

CONVERTER = "modelopt"


def _nothing(*asked: Any, **named: Any) -> None:
    """There is no state to write or read, and no tensor of another shape to send."""


UNCONVERTED = {
    "nemo.collections.llm.modelopt.model_utils": {
        "save_modelopt_state": _nothing,
        "restore_modelopt_state": _nothing,
    },
    "nemo.collections.llm.modelopt.distill.utils": {"get_tensor_shapes_adjust_fn_for_distillation": _nothing},
}


def start_nemo() -> None:
    """Load NeMo's trainer, without NVIDIA's job telemetry (it would want settings of its own, and this project sends
    nothing anywhere)."""
    with nullcontext() if "nemo.lightning" in sys.modules else _loading():
        import nemo_run  # noqa: F401  (half of what it loads is for other clusters)
        from nemo.lightning.callback_group import CallbackGroup

    for number in (signal.SIGINT, signal.SIGTERM):
        faulthandler.unregister(number)  # Megatron's inference code would print a stack for every Ctrl-C

    cpu.enable_megatron()
    CallbackGroup.get_instance().callbacks.clear()


@contextmanager
def _loading() -> Iterator[None]:
    """Thousands of modules are loaded, none of which is garbage: collecting it meanwhile takes a fifth of the time, and
    more in every later collection. Libraries find no modelopt, unless somebody has loaded it."""
    hidden = CONVERTER not in sys.modules
    if hidden:
        sys.modules[CONVERTER] = None  # type: ignore[assignment]  # as Python says that there is none
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
        if hidden:
            del sys.modules[CONVERTER]
            for name, answers in UNCONVERTED.items():
                sys.modules.setdefault(name, _Answering(name, answers))


class _Answering(ModuleType):
    """Stands for a module of NeMo's whose answers are known, until somebody asks for more of it than these."""

    def __init__(self, name: str, answers: Mapping[str, Callable[..., None]]) -> None:
        super().__init__(name, "Answers for a model that modelopt has not converted.")
        self.__dict__.update(answers)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":  # what Python and its debuggers ask of any module
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        real = importlib.import_module(self.__name__)
        self.__dict__.update(vars(real))  # who has it already gets real answers from now on
        return getattr(real, name)
