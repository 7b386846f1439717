"""`molmo2 convert`: the three directions, and mistakes that end in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from molmo2_nemo.cli.main import main
from molmo2_nemo.convert.checkpoints import read_model_file
from molmo2_nemo.convert.megatron_io import MegatronCheckpoint
from molmo2_nemo.convert.names import FORMATS, Format, external_shapes
from molmo2_nemo.convert.safetensors_io import SafetensorsFolder
from molmo2_nemo.model.config import preset
from tests.convert.test_checkpoints import FIXTURES, make_source
from tests.convert.test_initial import save_llm, save_vit

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _loud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("molmo2_nemo.launch.worker.quiet", lambda: None)  # leave this process's logging as it is


@pytest.mark.parametrize("written_as", FORMATS)
def test_import_and_export(tmp_path: Path, written_as: Format, capsys: pytest.CaptureFixture[str]) -> None:
    make_source(tmp_path / "hf", preset("tiny"), written_as, torch.float32)
    middle, out = str(tmp_path / "megatron"), str(tmp_path / "out")
    assert main(["convert", "import", str(tmp_path / "hf"), middle, "--dtype", "bfloat16"]) == 0
    assert MegatronCheckpoint(Path(middle)).dtype("embedding.extra.weight") == torch.bfloat16
    assert main(["convert", "export", middle, out, "--format", written_as, "--dtype", "float32"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [middle, out, "load it with transformers 5:"]
    call = said[3].strip()
    assert call == f"transformers.AutoModelForImageTextToText.from_pretrained({out!r})"
    assert said[4].split()[0] == f"{out}/README.md" and call.split("(")[0] in (Path(out) / "README.md").read_text()
    tensors = SafetensorsFolder(Path(out)).tensors
    assert tensors.keys() == external_shapes(preset("tiny"), written_as).keys()
    assert {info.dtype for info in tensors.values()} == {torch.float32}
    assert main(["convert", "export", middle, out]) == 2
    assert "out exists; name another folder or give --overwrite" in capsys.readouterr().err
    assert main(["convert", "export", middle, out, "--overwrite"]) == 0
    assert "bfloat16" in (Path(out) / "config.json").read_text()


def test_init(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm, vit = str(save_llm(tmp_path / "llm", "olmo3")), str(save_vit(tmp_path / "vit"))
    out = tmp_path / "out"
    assert main(["convert", "init", "--llm", llm, "--vit", vit, str(out), "--dtype", "bfloat16", "--seed", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # blocks 9 and 10 (32 tensors), the final norm (2), the pooling head (11)
    assert lines[0].startswith("model custom; 45 tensors of the vision model left out on purpose")
    assert lines[-1] == str(out)
    assert json.loads((out / "origin.json").read_text())["seed"] == 7
    config = read_model_file(out)
    assert config is not None and config.text.family == "olmo3"


def test_mistakes_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm, vit, out = save_llm(tmp_path / "llm", "qwen3_tied"), save_vit(tmp_path / "vit"), tmp_path / "out"
    broken = tmp_path / "broken"
    shutil.copytree(FIXTURES / "olmo3", broken)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[:-9])
    (tmp_path / "file").touch()
    nameless = tmp_path / "nameless"
    assert main(["convert", "import", str(FIXTURES / "olmo3"), str(nameless)]) == 0
    (nameless / "molmo2.json").unlink()
    capsys.readouterr()
    for words, message in (
        (["import", broken, out], "model.safetensors is truncated"),
        (["import", llm, out], "model_type is 'qwen3', expected 'molmo2'"),
        (["import", FIXTURES / "olmo3", tmp_path / "file" / "below"], "file is a file; name a folder"),
        (["export", llm, out], "is a model in Hugging Face format"),
        (["export", nameless, out], "not a checkpoint of any known Molmo2: tiny: "),
        (
            ["init", "--llm", vit, "--vit", llm, out],
            "model_type is 'siglip_vision_model', expected one of olmo3, qwen3",
        ),
        (["init", "--llm", llm, "--vit", vit, "--model", "8b", out], "not the base models of '8b'"),
    ):
        assert main(["convert", *map(str, words)]) == 2
        shown = capsys.readouterr()
        assert message in shown.err and shown.err.startswith("molmo2: error: ") and shown.err.count("\n") == 1
        assert not shown.out and not out.exists()
