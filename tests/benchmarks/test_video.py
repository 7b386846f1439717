"""benchmarks/video.py runs every way that is installed; the default decoder gives the plain loop's frames."""

from __future__ import annotations

import json

import numpy as np

from benchmarks.video import FILMS, choices, main, ways


def test_every_way_gives_the_same_frames(tmp_path):
    found = main(["--rounds", "1", "--seconds", "3", "--scale", "8", "--out", str(tmp_path / "r.json")])
    runnable, missing = ways()
    assert {*runnable, *missing} == {"pyav", "plain", "torchcodec", "ffmpeg"} and found["cannot_run"] == missing
    for film in found["films"].values():
        rows = {(row["frames"], row["way"]): row for row in film["rows"]}
        assert set(rows) == {(pattern, way) for pattern in choices(90) for way in runnable}
        for row in rows.values():
            assert row["frames_per_second"] > 0 and row["wanted"] == len(choices(90)[row["frames"]])
            assert row["values_unlike_plain"] == 0 or row["way"] != "pyav"
    assert set(found["films"]) == set(FILMS)
    assert json.loads((tmp_path / "r.json").read_text())["films"] == found["films"]


def test_choices_are_ascending_and_end_with_the_film():
    for pattern, wanted in choices(600).items():
        assert np.all(np.diff(wanted) > 0), pattern
    assert choices(600)["sparse"].tolist()[::9] == [0, 599]
