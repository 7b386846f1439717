"""Every piece has the ways that its setting offers; a way that cannot run is refused or passed over with a reason."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
import yaml

from molmo2_nemo.errors import UserError
from molmo2_nemo.fused.choice import PIECES, choose, choose_all, described, in_common, possible
from molmo2_nemo.model.config import KernelConfig
from molmo2_nemo.settings.compose import compose

CONF = Path(__file__).parents[2] / "conf" / "kernels"


def test_settings_and_table_have_the_same_pieces_and_ways():
    offered = {name: set(get_args(hint)) for name, hint in get_type_hints(KernelConfig).items()}
    assert offered == {piece: {"auto", *ways} for piece, ways in PIECES.items()}
    assert all("plain" in ways for ways in PIECES.values())
    assert vars(KernelConfig()) == dict.fromkeys(PIECES, "auto")
    assert yaml.safe_load((CONF / "plain.yaml").read_text()) == dict.fromkeys(PIECES, "plain")


def test_docs_name_every_piece_and_way():
    rows = [
        line for line in (CONF.parents[1] / "docs" / "kernels.md").read_text().splitlines() if line.startswith("| `")
    ]
    documented = {row.split("`")[1]: row.split("|")[2] for row in rows}
    assert set(documented) == set(PIECES)
    assert not [(p, way) for p, ways in PIECES.items() for way in ways if f"`{way}`" not in documented[p]]


def test_auto_is_plain_on_a_cpu():
    choices = choose_all(vars(KernelConfig()), "cpu", torch.float32)
    assert {choice.name for choice in choices.values()} == {"plain"}
    assert described(choices).startswith("kernels: ") and "(" in described(choices)


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="triton is installed")
def test_without_triton_compiled_ways_are_passed_over_or_refused_on_cuda():
    choices = choose_all(vars(KernelConfig()), "cuda", torch.bfloat16)
    assert "norm torch (F.rms_norm; not compiled: triton is not installed)" in described(choices)
    assert "swiglu plain (tensor operations; not compiled: triton is not installed)" in described(choices)
    with pytest.raises(UserError, match="kernels.norm=compiled: triton is not installed; use auto or one of: torch"):
        choose("norm", "compiled", "cuda", torch.bfloat16)


def test_an_unknown_way_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'compiled'"):
        choose("norm", "compild", "cpu", torch.float32)


def test_transformer_engines_norm_is_not_offered():
    """It was never built in: the refusal says what of Transformer Engine is used, and where."""
    with pytest.raises(
        UserError, match="kernels.norm is 'te'; expected one of: auto, plain, torch, compiled .*not built in"
    ):
        compose(["kernels.norm=te"])
    with pytest.raises(UserError, match=r"kernels.swiglu is 'te'; expected one of: auto, plain, compiled$"):
        compose(["kernels.swiglu=te"])


def test_auto_takes_what_every_rank_can_run():
    """One rank cannot compile: the others do not either, and say why."""
    here = possible("cuda", torch.bfloat16) | {"norm": frozenset({"compiled", "torch", "plain"})}
    there = here | {"norm": frozenset({"torch", "plain"})}
    assert in_common([here, there])["norm"] == {"torch", "plain"}
    choice = choose("norm", "auto", "cuda", torch.bfloat16, in_common([here, there]))
    assert choice.name == "torch"
    assert choice.fell_back is not None and choice.fell_back.startswith("not compiled: ")
    residual = choose("residual", "auto", "cuda", torch.bfloat16, dict.fromkeys(PIECES, frozenset({"plain"})))
    assert residual.name == "plain"


def test_a_way_that_another_rank_lacks_is_named(monkeypatch):
    from molmo2_nemo.fused import choice

    ways = {"fast": choice.Way("fast", None), "plain": choice.Way("plain", None)}
    monkeypatch.setitem(choice.PIECES, "norm", ways)
    found = choose("norm", "auto", "cuda", torch.bfloat16, {"norm": frozenset({"plain"})})
    assert (found.name, found.fell_back) == ("plain", "not fast: another rank cannot run it")
