"""A run whose checkpoints have no room is refused before anything is loaded, with the bytes."""

from __future__ import annotations

import re
import shutil
from types import SimpleNamespace

import pytest

from molmo2_nemo.cli.main import main
from molmo2_nemo.launch.disk import checkpoint_bytes, disk_problems, to_come
from molmo2_nemo.settings.compose import compose


def of(*words):
    return compose(["recipe=tiny", "stage=sft", "stage.max_steps=50", "save_every=10", *words])


def test_the_bytes_of_checkpoints_that_were_written():
    """Against the files of a run of the needle recipe on a CPU, whose model is tiny and trained whole in fp32."""
    cfg = compose(["recipe=needle", "stage=sft"])
    assert cfg.cluster.precision == "fp32"
    assert checkpoint_bytes(cfg) == pytest.approx(38_914_118, rel=0.05)  # bytes of files, 2026-11-29


@pytest.mark.parametrize(
    ("words", "there", "count"),
    [
        ([], [], 3),  # two stay, and the third is whole before the first goes
        ([], [10, 20], 1),
        ([], [50], 0),  # finished
        (["checkpoint.keep_last=1"], [], 2),
        (["stage.max_steps=15"], [], 2),  # at 10 and at the end
        (["stage.max_steps=5"], [], 1),
        (["checkpoint.keep_every=20"], [], 4),  # 20, 30, 40 and 50
        (["checkpoint.keep_every=20"], [10, 20], 2),  # 10 goes when 30 is whole
        (["checkpoint.keep_every=4", "stage.max_steps=2000000000"], [], 100_000_001),  # counted one by one it hangs
    ],
)
def test_how_many_lie_there_at_a_time(words, there, count):
    assert to_come(of(*words), there) == count


def test_too_little_room_is_refused_with_the_bytes():
    cfg = of("output_dir=runs/here")
    each = checkpoint_bytes(cfg)
    assert list(disk_problems(cfg, 3 * each)) == []
    (said,) = disk_problems(cfg, 2.9 * each)
    sizes = [int(n) for n in re.findall(r"(\d+) MiB", said)]
    assert sizes == [round(each / 2**20), round(2.9 * each / 2**20)] and said.startswith("output_dir=runs/here: 3 ")
    assert "checkpoint.keep_last=1" in said and "cluster.check_memory=false" in said
    assert list(disk_problems(of("checkpoint.keep_last=1"), 2 * each)) == []  # as it advises
    assert list(disk_problems(of("cluster.check_memory=false"), 0.0)) == []


def test_the_command_refuses_it(tmp_path, monkeypatch, capsys, shards):
    """With whatever else is wrong, and before a folder is made."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1 << 40, free=20 * 2**20))
    words = ["recipe=tiny", "stage=sft", "parallel=single", f"output_dir={tmp_path}/run"]
    assert main(["train", *words, f"data.sources.demo.path={shards}/sft"]) == 2
    err = capsys.readouterr().err
    assert "20 MiB are free on that file system" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()
