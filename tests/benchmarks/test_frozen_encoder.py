"""benchmarks/frozen_encoder.py runs every way on a small scale; the script itself compares their bits."""

from __future__ import annotations

import json

import torch

from benchmarks.frozen_encoder import main


def test_every_way_is_measured(tmp_path):
    threads = torch.get_num_threads()
    found = main(["--rounds", "1", "--blocks", "2", "--crops", "2", "--out", str(tmp_path / "r.json")])
    torch.set_num_threads(threads)
    assert set(found["seconds"]) == {"together", "one by one", "first", "later", "from disk", "hash"}
    assert all(value > 0 for values in found["seconds"].values() for value in values)
    assert found["bytes_per_crop"] > 729 * 2304 * 4
    assert json.loads((tmp_path / "r.json").read_text())["seconds"] == found["seconds"]
