"""Beside transformers 5: its fine-tunes are imported, its base models start stage 1, and exports load and answer there.

The other side runs in the environment of requirements/fixtures.txt (`make test-transformers` builds it, in
.venv-fixtures); without it these tests are skipped. tests/fixtures/transformers5.py is what runs there.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from molmo2_nemo.convert import export_checkpoint, import_checkpoint, init_checkpoint
from molmo2_nemo.data.config import VideoConfig
from molmo2_nemo.data.video.read import plan_video
from molmo2_nemo.inference.prompt import Prompt
from tests.convert.parity import answered, sharded_logits
from tests.convert.test_checkpoints import FIXTURES, notes, read_imported
from tests.convert.test_initial import text_logits, vision_features
from tests.convert.test_parity import tiny_folder
from tests.convert.test_source import same_checkpoints
from tests.fixtures.base_models import LLMS, to_patches
from tests.fixtures.pictures import picture
from tests.support.films import film

torch.set_num_threads(1)
ROOT = FIXTURES.parents[1]
PYTHON = Path(os.environ.get("MOLMO2_TRANSFORMERS5_PYTHON") or ROOT / ".venv-fixtures" / "bin" / "python")
ROTARY = ("yarn_mscale", "yarn_null_factor", "yarn_below_one", "yarn_some_layers")
ROTARY += ("linear_some_layers", "both_places", "no_base")
pytestmark = pytest.mark.skipif(
    not PYTHON.is_file(), reason=f"no transformers 5 at {PYTHON}: make test-transformers builds its environment"
)


def transformers5(*words: Any) -> None:
    """Run a job of tests/fixtures/transformers5.py."""
    command = [PYTHON, FIXTURES / "transformers5.py", *words]
    alone = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that transformers 5 makes for these tests."""
    folder = tmp_path_factory.mktemp("transformers5")
    checkpoint = import_checkpoint(FIXTURES / "qwen3_tied_odd", folder / "checkpoint", dtype=torch.float32)
    out = folder / "out"
    out.mkdir()
    transformers5("make", export_checkpoint(checkpoint, folder / "export"), out)
    return out


def check_logits(workers: Any, checkpoint: Path, fixture: str, expected: Path) -> None:
    """Logits of every case of a fixture, within what fp32 allows."""
    ours = workers.run(sharded_logits, checkpoint, FIXTURES / fixture, 1, 1)[0]
    for kind, theirs in safetensors.torch.load_file(expected).items():
        difference = (ours[kind][: len(theirs), : theirs.shape[1]] - theirs).abs().max()
        assert difference < 5e-6 * theirs.abs().max(), kind


def test_load_train_save_import(workers: Any, made: Path, tmp_path: Path) -> None:
    """As plain `save_pretrained` writes it, in shards, and in native names; head and table are trained apart."""
    plain = import_checkpoint(made / "plain", tmp_path / "plain")
    same_checkpoints(plain, import_checkpoint(made / "native", tmp_path / "native"))
    assert not read_imported(plain).text.tie_embeddings and notes(plain) == []
    check_logits(workers, plain, "qwen3_tied_odd", made / "trained.safetensors")


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_settings(workers: Any, made: Path, tmp_path: Path, name: str) -> None:
    checkpoint = import_checkpoint(made / name, tmp_path / "megatron")
    check_logits(workers, checkpoint, "qwen3_tied", made / f"{name}.safetensors")


@pytest.mark.parametrize("name", LLMS)
def test_language_models_of_stage_1(workers: Any, made: Path, tmp_path: Path, name: str) -> None:
    expected = safetensors.torch.load_file(made / "bases.safetensors")
    out = init_checkpoint(made / name, made / "tower", tmp_path / "out")
    logits = workers.run(text_logits, out, expected["ids"].tolist())[0]
    assert (logits - expected[name]).abs().max() < 2e-5 and expected[name].abs().max() > 1


@pytest.mark.parametrize("kind", ["whole", "tower", "naflex"])
def test_vision_models_of_stage_1(workers: Any, made: Path, tmp_path: Path, kind: str) -> None:
    expected = safetensors.torch.load_file(made / "bases.safetensors")
    out = init_checkpoint(made / "qwen3_tied", made / kind, tmp_path / "out")
    features = workers.run(vision_features, out, to_patches(expected["image"]))[0]
    assert (features - expected[kind]).abs().max() < 2e-5 * expected[kind].abs().max()


ANSWER = 24  # tokens
ASKED = {  # what is shown: pictures as width, height and seed, or seconds of a film of 30 frames per second
    "text": ([], None),
    "picture": ([(200, 120, 0)], None),
    "large picture": ([(700, 430, 1)], None),
    "high picture": ([(150, 640, 2)], None),
    "two pictures": ([(200, 120, 3), (300, 300, 4)], None),
    "four pictures": ([(126, 126, 5), (500, 130, 6), (400, 640, 7), (130, 127, 8)], None),
    "film": ([], 1.5),
    "longer film": ([], 6.2),
}


def png(size: tuple[int, int, int]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture(*size)).save(stream, "PNG")
    return stream.getvalue()


def film_of(seconds: float, settings: VideoConfig, path: Path) -> bytes:
    """A film; into `path` go the frames of it that training would show, as PyAV decodes them, and their times."""
    content = film(round(seconds * 30), fps=30)
    plan = plan_video(content, settings)
    with av.open(io.BytesIO(content)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    np.savez(path, frames=np.stack([decoded[number] for number in plan.numbers]), times=plan.times)
    return content


def test_exports_answer(workers: Any, tmp_path: Path) -> None:
    """Native exports, and remote-code ones without their code, which transformers 5 reads by itself: the same prompts
    and the same answers, token for token, about everything that can be shown."""
    checkpoint = import_checkpoint(tiny_folder(tmp_path / "hf"), tmp_path / "megatron")
    folders = [
        export_checkpoint(checkpoint, tmp_path / "native", format="native"),
        export_checkpoint(checkpoint, tmp_path / "remote", format="remote"),
    ]
    prompts, asked = [], []
    for number, (name, (sizes, seconds)) in enumerate(ASKED.items()):
        path = tmp_path / f"{number}.npz"
        content = film_of(seconds, VideoConfig(), path) if seconds else None
        question = f"What is in the {name}?"
        prompts.append(Prompt(question, [png(size) for size in sizes], content))
        video = str(path) if seconds else None
        asked.append({"question": question, "images": sizes, "video": video, "tokens": ANSWER})
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    transformers5("answers", tmp_path, *folders)
    found = json.loads((tmp_path / "answered.json").read_text())
    ours = workers.run(answered, checkpoint, prompts, ANSWER)[0]
    for format in ("native", "remote"):
        for name, one, other in zip(ASKED, found["answers"][format], ours, strict=True):
            assert one["prompt"] == other["prompt"], (format, name)
            assert one["answer"] == other["answer"] and len(one["answer"]) > 2, (format, name)
    assert len({tuple(one["answer"]) for one in ours}) > len(ours) // 2  # what is shown matters
    assert found["version"].startswith("5.")
