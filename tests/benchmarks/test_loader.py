"""benchmarks/loader.py and loader_memory.py run every way on a small scale; the ways give the same arrays."""

from __future__ import annotations

import json

from benchmarks import loader, loader_memory


def test_every_way_gives_the_same_arrays(tmp_path):
    """The script compares them itself."""
    out = tmp_path / "r.json"
    found = loader.main(["--rounds", "1", "--seconds", "0", "--scale", "32", "--out", str(out)])
    assert set(found["results"]) == {"pictures", *loader.FILMS}
    for kind, rows in found["results"].items():
        assert {"plain", "plain tree", "before", "ours"} <= set(rows)
        assert rows["ours"]["ours_is_faster"] == 1 and rows["plain"]["crops_per_second"] > 0
        assert {"resize", "decode pictures" if kind == "pictures" else "decode videos"} <= set(rows["ours"]["shares"])
        assert "resize" in rows["before"]["shares"]
    assert set(json.loads(out.read_text())["results"]) == set(found["results"])


def test_memory_of_all_ways(tmp_path):
    """In this small case what waits is 24 films of 7 MB, in one way; windows of 8 hold none of them."""
    words = "--frames 16 --length 2048 --buffer 24 --workers 0 1 --pause 0 --out".split()
    found = loader_memory.main([*words, str(tmp_path / "m.json")])["results"]
    ours = {f"{way}, {workers} workers" for way in ("ours", "window") for workers in (0, 1)}
    assert set(found) == {*ours, "held, 0 workers"}
    assert all(row["waiting"] == 24 and row["highest_mib"] >= row["before_mib"] for row in found.values())
    grown = {way: row["highest_mib"] - row["before_mib"] for way, row in found.items()}
    assert grown["held, 0 workers"] - grown["ours, 0 workers"] > 24 * 6.5 / 2
    assert grown["window, 0 workers"] - grown["ours, 0 workers"] < 8 * 6.5 / 2
