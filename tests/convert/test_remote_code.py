"""Exports for the published remote code, run by that code under the transformers of this environment.

The code is its authors' and not in this repository: name a folder with their `modeling_molmo2.py` and
`configuration_molmo2.py` in MOLMO2_REMOTE_CODE; without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from molmo2_nemo.convert import export_checkpoint, import_checkpoint
from tests.convert.parity import read_cases
from tests.convert.test_checkpoints import FIXTURES, SMALL
from tests.convert.test_source import same_checkpoints

torch.set_num_threads(1)
CODE = Path(os.environ.get("MOLMO2_REMOTE_CODE", ""))
FILES = ("configuration_molmo2.py", "modeling_molmo2.py")
pytestmark = pytest.mark.skipif(
    not all((CODE / name).is_file() for name in FILES),
    reason="the published remote code is not here: MOLMO2_REMOTE_CODE names no folder with modeling_molmo2.py",
)


@pytest.mark.parametrize("fixture", SMALL)
def test_the_remote_code_computes_the_same(tmp_path: Path, fixture: str) -> None:
    checkpoint = import_checkpoint(FIXTURES / fixture, tmp_path / "megatron", dtype=torch.float32)
    folder = export_checkpoint(checkpoint, tmp_path / "remote", format="remote")
    for name in FILES:
        shutil.copy(CODE / name, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {auto: name.split("--")[1] for auto, name in config["auto_map"].items()}
    (folder / "config.json").write_text(json.dumps(config))
    script = FIXTURES / "remote_code.py"
    cache = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(FIXTURES / fixture), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | cache,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logits = safetensors.torch.load_file(tmp_path / "logits.safetensors")
    for kind, case in read_cases(FIXTURES / fixture).items():
        assert (logits[kind] - torch.from_numpy(case["logits"])).abs().max() < 2e-5, kind
    assert len(json.loads((tmp_path / "generated.json").read_text())) == 6
    same_checkpoints(checkpoint, import_checkpoint(tmp_path / "saved", tmp_path / "again"))
