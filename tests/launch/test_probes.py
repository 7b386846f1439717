"""What `molmo2 doctor` finds out about a machine and about recipes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from molmo2_nemo import compat
from molmo2_nemo.data.manifest import MANIFEST
from molmo2_nemo.errors import UserError
from molmo2_nemo.launch import probes
from molmo2_nemo.launch.overlay import RECORD, find_overlay
from molmo2_nemo.launch.readiness import missing_for
from molmo2_nemo.settings.compose import compose


def test_doctor_looks_at_the_data_sets_of_every_stage(monkeypatch, tmp_path):
    monkeypatch.setenv("MOLMO2_DATA", str(tmp_path))
    for name in compose(["recipe=8b", "stage=long"]).data.sources:
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).touch()
    said = [line for line in missing_for("8b", tmp_path) if "shards" in line]
    assert len(said) == 1
    assert said[0].startswith("2 of 120 data sets have no shards (pixmo_cap_with_transcripts, tulu4_max_2304): ")


def test_doctor_tells_a_gpu_library_that_imports_from_one_that_does_not(monkeypatch, tmp_path):
    (tmp_path / "flash_attn_interface.py").write_text("raise ImportError('undefined symbol: torch')")
    (tmp_path / "flash_attn_3-3.0.0.dist-info").mkdir()
    (tmp_path / "flash_attn_3-3.0.0.dist-info" / "METADATA").write_text("Name: flash_attn_3\nVersion: 3.0.0\n")
    (tmp_path / "flash_attn_3-3.0.0.dist-info" / "top_level.txt").write_text("flash_attn_interface\n")
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(probes.GPU_PACKAGES, "other", ("no_such_module", "tests"))
    try:
        found = {finding.name: finding for finding in probes._gpu_packages()}
    finally:
        for name in ("flash_attn", "flash_attn.cute"):
            sys.modules.pop(name, None)
    assert found["FlashAttention-3"].level == "note"
    assert found["FlashAttention-3"].seen == "flash_attn_3 3.0.0 does not import: undefined symbol: torch"
    assert "pip uninstall flash_attn_3" in found["FlashAttention-3"].fix
    assert found["FlashAttention-4"].level == "ok" and found["FlashAttention-4"].seen.startswith("flash_attn ")
    assert found["other"].seen.startswith("-")


def test_the_stack_says_what_comes_from_where_and_what_was_tried(monkeypatch, tmp_path):
    made = {"torch": "2.7.0", "lightning": "2.5.1", "transformer_engine": "2.14.0", "numpy": "3.0.0"}
    for name, number in made.items():
        (tmp_path / f"{name}-{number}.dist-info").mkdir()
        (tmp_path / f"{name}-{number}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {number}\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = {finding.name: finding for finding in probes.stack()}
    assert "overlay" not in found and "environment" not in found["torch"].seen
    assert found["nemo-toolkit"].seen.split() == ["2.7.3", "tried"]
    (tmp_path / RECORD).write_text(json.dumps({"beside": {"torch": "2.7.0", "megatron-core": "0.1"}}))
    found = {finding.name: finding for finding in probes.stack()}
    assert found["overlay"].level == "note" and "made beside megatron-core 0.1 (now 0.1" in found["overlay"].seen
    assert found["nemo-toolkit"].seen.split() == ["2.7.3", "environment", "tried"]
    assert found["lightning"].level == "ok" and found["lightning"].seen.endswith("overlay      accepted; tried: 2.4.0")
    assert found["transformer-engine"].seen.startswith("2.14.0         overlay")
    assert found["numpy"].level == "missing" and found["numpy"].seen.startswith(
        "3.0.0          overlay      was not tried"
    )
    assert found["numpy"].fix == compat.TRIED["numpy"].get
    monkeypatch.setenv(compat.UNTRIED, "1")
    assert {finding.name: finding for finding in probes.stack()}["numpy"].level == "note"


@pytest.mark.parametrize(
    "text", ["xx", "{}", "[]", pytest.param("[" * 100_000, id="deep"), '{"beside": [1]}', '{"beside": {"torch": 2}}']
)
def test_a_damaged_overlay_is_one_line(text, monkeypatch, tmp_path):
    (tmp_path / RECORD).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"^{tmp_path / RECORD}.*; make it again: requirements/overlay.py"):
        find_overlay()
    found = list(probes.stack())
    assert (found[0].name, found[0].level) == ("overlay", "missing")
    assert str(tmp_path / RECORD) in found[0].seen and found[0].fix.startswith("make it again")
    assert "torch" in {finding.name for finding in found}


def test_file_systems(tmp_path, monkeypatch):
    assert probes.file_system(tmp_path) != "unknown"
    assert probes.file_system(Path("/proc")) == "proc"
