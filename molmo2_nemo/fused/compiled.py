"""Functions compiled by PyTorch (inductor): Triton kernels on CUDA, C++ on a CPU."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


class Compiled:
    """A function of tensors and numbers that is compiled when it is first called.

    Under a mode that sees every operation (a TorchDispatchMode: counting FLOPs, faking tensors), for which PyTorch does
    not compile, the function runs as it is, and a line says so.

    PyTorch compiles a function again for every dtype, width and use of gradients that it meets, and gives up after
    eight. So each combination has a copy of the function; in a copy only the number of rows differs from call to call.

    Args:
        function: without effects on anything else, and without closures; one graph (PyTorch says so where it is not).
            `Tensor.unflatten` breaks a graph under the CPU shims.
        rows: positions of the tensors whose first dimension may differ from call to call. Every other size is fixed.
    """

    def __init__(self, function: Callable[..., Any], *rows: int) -> None:
        self.function, self.rows = function, rows
        self.copies: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        if torch._C._len_torch_dispatch_stack():
            _say_uncompiled(" and ".join(_described(mode) for mode in _get_current_dispatch_mode_stack()))
            return self.function(*arguments)
        key: list[Any] = [torch.is_grad_enabled()]
        for position, value in enumerate(arguments):
            if not isinstance(value, Tensor):
                key.append(value)
                continue
            any_rows = position in self.rows
            if any_rows:
                torch._dynamo.maybe_mark_dynamic(value, 0)
            key += value.dtype, value.device, value.requires_grad, value.shape[any_rows:]
        copy = self.copies.get(tuple(key))
        if copy is None:
            copy = self.copies[tuple(key)] = self._copy()
        return copy(*arguments)

    def _copy(self) -> Callable[..., Any]:
        own, name = self.function, f"{self.function.__name__}_{len(self.copies)}"
        code = own.__code__.replace(co_name=name)
        return torch.compile(types.FunctionType(code, own.__globals__, name, own.__defaults__), fullgraph=True)


@functools.cache  # once a process for each set of modes
def _say_uncompiled(modes: str) -> None:
    print(f"kernels: compiled pieces run uncompiled under {modes}, for which PyTorch does not compile", flush=True)


def _described(mode: object) -> str:
    return f"{type(mode).__module__}.{type(mode).__qualname__}"


def problem(device: str, dtype: torch.dtype) -> str | None:
    """Why PyTorch cannot compile for a kind of device, or None. On CUDA a small function is compiled to find out, once
    a process: what Triton needs of a machine (a driver, a compiler, headers) cannot be known otherwise."""
    if device not in ("cpu", "cuda"):
        return f"compiled functions were not tried on {device}"
    missing = _missing(device)
    return _failure(device) if missing is None and device == "cuda" and torch.cuda.is_available() else missing


@functools.cache
def _failure(device: str) -> str | None:
    """What goes wrong when a function of one sum is compiled and run."""
    try:
        torch.compile(lambda x: (x * 2).sum())(torch.ones(8, device=device)).item()
        return None
    except Exception as error:  # of Triton, of the compiler, of the driver
        return f"compiling failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"


@functools.cache
def _missing(device: str) -> str | None:
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    variable, usual = ("CXX", ["g++", "clang++"]) if device == "cpu" else ("CC", ["gcc", "clang"])
    compilers = [os.environ[variable]] if variable in os.environ else usual
    if not any(shutil.which(name) for name in compilers):
        return f"there is no compiler on the path ({' or '.join(compilers)}; {variable}=... names another)"
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return None if headers.is_file() else f"Python's headers are missing ({headers})"
