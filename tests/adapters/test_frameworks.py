"""In evaluation frameworks an export gives the answers of `molmo2 ask`, word for word: text, pictures, films.

The frameworks need transformers 5, so they run in environments of their own:
MOLMO2_LMMS_EVAL_PYTHON     the python of one with lmms-eval (`make test-frameworks` builds it, in .venv-frameworks)
MOLMO2_VLMEVALKIT_PYTHON    the python of one with the requirements of VLMEvalKit, and
MOLMO2_VLMEVALKIT           a checkout of it, which is not on PyPI
Without them these tests are skipped. tests/fixtures/frameworks.py is what runs there.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from molmo2_nemo.convert import export_checkpoint, import_checkpoint
from molmo2_nemo.inference.prompt import Prompt
from tests.convert.test_checkpoints import FIXTURES
from tests.convert.test_parity import tiny_folder
from tests.convert.test_transformers5 import ASKED, png
from tests.support.films import film
from tests.support.pool import start_megatron

torch.set_num_threads(1)
ROOT = FIXTURES.parents[1]
LMMS_EVAL = Path(os.environ.get("MOLMO2_LMMS_EVAL_PYTHON") or ROOT / ".venv-frameworks" / "bin" / "python")
VLMEVALKIT = Path(os.environ.get("MOLMO2_VLMEVALKIT_PYTHON") or "nowhere")
CHECKOUT = Path(os.environ.get("MOLMO2_VLMEVALKIT") or "nowhere")
TOKENS = 16
with_lmms_eval = pytest.mark.skipif(
    not LMMS_EVAL.is_file(), reason=f"no lmms-eval at {LMMS_EVAL}: make test-frameworks builds its environment"
)
with_vlmevalkit = pytest.mark.skipif(
    not (VLMEVALKIT.is_file() and (CHECKOUT / "vlmeval").is_dir()),
    reason="no VLMEvalKit: MOLMO2_VLMEVALKIT names a checkout, MOLMO2_VLMEVALKIT_PYTHON a python with its requirements",
)


def answered(checkpoint: Path, prompts: list[Prompt]) -> list[str]:
    """Job: our own answers."""
    from molmo2_nemo.inference.generate import answer_prompts
    from molmo2_nemo.inference.sampling import Sampling

    start_megatron()
    return [line["answer"] for line in answer_prompts(checkpoint, prompts, Sampling(TOKENS))]


@pytest.fixture(scope="module")
def asked(workers: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with the export and asked.json, and our own answers."""
    out = tmp_path_factory.mktemp("frameworks")
    checkpoint = import_checkpoint(tiny_folder(out / "hf"), out / "megatron")
    export_checkpoint(checkpoint, out / "export")
    questions, prompts = [], []
    for name, (sizes, seconds) in ASKED.items():
        files = [out / f"{name} {number}.png" for number, _ in enumerate(sizes)]
        for file, size in zip(files, sizes, strict=True):
            file.write_bytes(png(size))
        video = out / f"{name}.mp4" if seconds else None
        if video is not None and seconds:
            video.write_bytes(film(round(seconds * 30), fps=30))
        question = f"What is in the {name}?"
        shown = {"images": [str(file) for file in files], "video": str(video) if video else None}
        questions.append({"question": question, **shown, "tokens": TOKENS})
        prompts.append(Prompt(question, [file.read_bytes() for file in files], video and video.read_bytes()))
    (out / "asked.json").write_text(json.dumps(questions))
    return out, workers.run(answered, checkpoint, prompts)[0]


def in_framework(python: Path, out: Path, *words: str, beside: Path | None = None) -> list[str]:
    """The answers of a job of tests/fixtures/frameworks.py."""
    (out / "answered.json").unlink(missing_ok=True)
    command = [str(python), str(FIXTURES / "frameworks.py"), words[0], str(out / "export"), str(out), *words[1:]]
    paths = os.pathsep.join(str(path) for path in (ROOT, beside) if path)
    alone = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "hub")}
    done = subprocess.run(command, capture_output=True, text=True, env=alone, cwd=out)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "answered.json").read_text())


@with_lmms_eval
@pytest.mark.parametrize("batch", ["1", "3"])
def test_lmms_eval(asked: tuple[Path, list[str]], batch: str) -> None:
    """Through `generate_until`, one by one and in batches of unequal prompts."""
    out, ours = asked
    assert in_framework(LMMS_EVAL, out, "lmms-eval", batch) == ours
    assert len(set(ours)) > len(ours) // 2


@with_lmms_eval
def test_a_task_of_lmms_eval(asked: tuple[Path, list[str]]) -> None:
    """A task in a folder of one's own, from `simple_evaluate` to the logged answers."""
    out, ours = asked
    assert in_framework(LMMS_EVAL, out, "lmms-eval-task") == ours


@with_vlmevalkit
def test_vlmevalkit(asked: tuple[Path, list[str]]) -> None:
    """Through `generate` of the model that its registry builds."""
    out, ours = asked
    assert in_framework(VLMEVALKIT, out, "vlmevalkit", beside=CHECKOUT) == ours
