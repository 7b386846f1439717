"""What is said of settings that will not come to bear, as a run starts."""

from __future__ import annotations

import pytest

from molmo2_nemo.cli.main import main
from molmo2_nemo.settings.compose import compose
from molmo2_nemo.settings.remarks import remarks

GROWS = "data.progression=[{until_step: 4, sequence_length: 64}, {until_step: 8, sequence_length: 96}]"
CHUNKS = ("memory.recompute=full", "stage.micro_batch_size=1")


def said(*overrides):
    return list(remarks(compose(["recipe=tiny", "stage=sft", *overrides])))


@pytest.mark.parametrize("stage", ["pretrain", "sft", "long"])
def test_the_shipped_stages_have_none(stage):
    assert list(remarks(compose(["recipe=tiny", f"stage={stage}"]))) == []


@pytest.mark.parametrize(
    ("steps", "late", "ends"),
    [
        (9, "", 0),
        (8, "data.packing (packs of 768 tokens, after step 8) is never", 96),
        (4, "data.progression[1] (packs of 96 tokens, after step 4) and data.packing (packs of 768 ", 64),
        (3, "data.progression[1] (packs of 96 tokens, after step 4) and data.packing (packs of 768 ", 64),
    ],
)
def test_phases_that_a_stage_never_reaches(steps, late, ends):
    found = said(GROWS, f"stage.max_steps={steps}", "data.packing.sequence_length=768")
    assert len(found) == bool(late)
    for line in found:
        assert line.startswith(late) and f"ends with step {steps} (stage.max_steps), on packs of {ends};" in line


@pytest.mark.parametrize(
    ("overrides", "starts"),
    [
        (["memory.sequence_chunk=384", "parallel=cp2"], ["memory.sequence_chunk=384 saves nothing"]),
        (["memory.sequence_chunk=383", "parallel=cp2"], []),
        (["memory.sequence_chunk=384", "parallel=cp2", "parallel.dynamic_context=true"], []),
        (["memory.sequence_chunk=384", "parallel=single"], []),
        (["memory.vision_chunk=24"], ["memory.vision_chunk=24 has no effect"]),
        (["memory.vision_chunk=24", "stage.micro_batch_size=2"], []),
        (["memory.loss_chunk=768"], ["memory.loss_chunk=768 has no effect"]),
    ],
)
def test_sizes_that_no_pack_reaches(overrides, starts):
    """Packs of 768 tokens and 24 crops."""
    sizes = ("data.packing.sequence_length=768", "data.packing.max_crops=24")
    found = said(*CHUNKS, *sizes, *overrides)
    assert len(found) == len(starts) and all(line.startswith(start) for line, start in zip(found, starts, strict=True))


def test_a_dry_run_says_it_for_each_stage_once(tmp_path, capsys):
    words = ["recipe=longvila", f"output_dir={tmp_path}", f"cluster.slurm.workdir={tmp_path}", "stage.max_steps=20"]
    assert main(["pipeline", *words, "--dry-run"]) == 0
    err = capsys.readouterr().err
    assert err.count("never reached") == 1 and "\nextend: data.packing (packs of 262,144 tokens, after step 40)" in err
