"""The page of results: targets beside what was measured, from made results, on 80 columns."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from benchmarks.gpu.page import WIDTH, page, planner_errors, profile, table, targets
from benchmarks.gpu.parts import PARTS

TITLES = {part.name: part.title for part in PARTS}


def row(seconds: float, memory: float, mfu: float, measured: bool = True, **more: Any) -> dict[str, Any]:
    found = {"seconds": seconds, "memory_gib": memory, "mfu": mfu, "measured": measured, "tflops": 989 * mfu}
    plan = {"seconds": 1.1 * seconds, "memory_gib": 0.95 * memory}
    return found | {"tokens_per_second": 16384 / seconds, "planned": plan} | more


def steps(stage: str, mfu: float) -> dict[str, Any]:
    layers = {"2": row(1.0, 30.0, 0.3), "6": row(2.0, 40.0, 0.35), "36": row(9.5, 115.0, mfu, measured=False)}
    return {"stages": {stage: {"tokens": 16384, "layers": layers}}}


SUMMARY = {
    "flash[fa2], share of full": {"reached": 0.8},
    "flash[fa3], share of full": {"reached": 0.9},
    "flash, mixed packs against dense bias": {"reached": 12.0},
    "video against dense bias": {"reached": 3.0},
}
PACK = {
    "tokens": 16384,
    "seconds": {"flash": {"forward": 0.001, "backward": 0.002}, "dense bias": {"forward": 0.01, "backward": 0.02}},
    "times faster than dense bias": {"flash": {"both": 10.0}},
    "TFLOP/s": {"flash": {"both": 300.0}, "dense bias": {"both": 30.0}},
}
TABLE = """steps 5 to 5 of sft, rank 0: 2,000 ms for 1 step; device busy 1,900 ms (95%), idle 100 ms
        ms  share    calls  kind
     900.0  47.4%      100  attention
        ms  share    calls  the largest kernels
     900.0  47.4%      100  void flash_fwd_kernel  [attention]"""


def results(tiny: bool = False) -> dict[str, Any]:
    machine = {"machine": {"python": "3.12.3"}, "card": "NVIDIA H100", "packages": {"torch": "2.11.0", "apex": None}}
    verdict = {"card": {"distance": 0.01, "allowed": 0.02, "within": True}}
    data = {
        "environment": machine,
        "train_sft": steps("sft", 0.43),
        "train_long": steps("long", 0.39),
        "attention": {"summary": SUMMARY, "mixed": [PACK], "video": []},
        "depth": {"stages": {"sft": {"layers": {"10": row(3.3, 50.0, 0.36)}}}},
        "kernels": {
            "rows": [
                {"piece": "norm", "way": "plain", "seconds": 0.003, "peak": 3 << 20},
                {"piece": "norm", "way": "compiled", "seconds": 0.001, "peak": None},
                {"piece": "norm", "way": "torch", "cannot run": "made-up reason that is not inside"},
            ]
        },
        "probe": {"figures": {"copy on the device": {"ms": 1.0, "TB/s": 3.0}, "attention": {"error": "no kernel"}}},
        "curve": {"verdicts": verdict, "within": True, "separates": True},
    }
    data["train_sft"]["stages"]["sft"]["profile"] = TABLE
    parts = [{"name": n, "state": "passed", "seconds": 50.0, "why": "", "data": d} for n, d in data.items()]
    why = "after 60 s; out of " + "x" * 400
    parts.append({"name": "offload", "state": "stopped", "seconds": 60.0, "why": why, "data": {}})
    return {"commit": "a" * 40, "tiny": tiny, "seconds": 512.3, "parts": parts}


def data_of(found: dict[str, Any]) -> dict[str, Any]:
    return {part["name"]: part["data"] for part in found["parts"] if part["data"]}


def test_every_target_has_its_verdict():
    verdicts = {what: (value, verdict) for what, _, value, verdict in targets(data_of(results()), False)}
    assert verdicts["MFU, 4B stage 3, full depth"] == ("39.0%", "NOT REACHED")
    assert verdicts["MFU, 4B stage 2, full depth"] == ("43.0%", "reached")
    assert verdicts["attention, share of full flash by pairs"] == ("0.90 flash[fa3]", "reached")
    assert verdicts["attention, video over dense bias"] == ("3.00", "NOT REACHED")
    assert verdicts["planner's memory, worst of 4"] == ("-5%", "reached")
    assert verdicts["planner's time, worst of 4"] == ("+10%", "reached")
    assert verdicts["loss curve within rounding noise"] == ("yes", "reached")


def test_what_did_not_run_is_not_reached():
    rows = targets({}, False)
    assert len(rows) == 8 and {(value, verdict) for *_, value, verdict in rows} == {("-", "not run")}
    found = data_of(results())
    found["curve"]["separates"] = False  # a comparison that cannot fail proves nothing
    assert targets(found, False)[-1][2:] == ("no", "NOT REACHED")
    del found["train_long"]["stages"]["long"]["layers"]["36"]  # one depth only: nothing is extrapolated
    assert targets(found, False)[0][2:] == ("-", "not run")


def test_tiny_sizes_reach_nothing():
    rows = targets(data_of(results()), True)
    assert {verdict for *_, verdict in rows} == {"tiny sizes", "not run"}
    assert "no figure here says anything about a GPU" in " ".join(page(results(tiny=True), TITLES).split())


def test_the_planner_is_judged_by_measured_depths_only():
    found = data_of(results())
    found["train_long"]["stages"]["long"]["layers"]["36"]["planned"]["seconds"] = 1e9
    assert max(planner_errors(found, "seconds")) == pytest.approx(0.1)


def test_the_page_has_every_part_and_fits():
    text = page(results(), TITLES)
    assert max(map(len, text.splitlines())) <= WIDTH
    for name in TITLES:
        assert f"| {name} " in text, name
    assert "NVIDIA H100, 512 s, commit aaaaaaaaaaaa." in text and "Not installed: apex." in text
    assert "10 layers at stage 2 take +10.0% against the line through 2 and 6." in text  # 3.3 s, 3.0 on the line
    assert "| norm  | compiled | 1.00 | -   | 3.00x" in text and "made-up reason that is not ins.. |" in text
    assert "| tiny        | not run" in text and "- offload, stopped: after 60 s; out of" in text
    assert "     900.0  47.4%      100  attention" in text and "flash_fwd_kernel" not in text
    assert "| ~9.50 (10.45) | ~1,725   | ~425    | ~43.0% | ~115.0 (109.2) |" in text
    assert "copy on the device" in text and "| failed | no kernel |" in text


def test_nothing_found_is_a_page_too():
    text = page({"commit": "unknown", "tiny": False, "seconds": 1.0, "parts": []}, TITLES)
    assert text.count("not run") == len(TITLES) + 8 and "no card" in text


def test_a_table_is_cut_to_the_page():
    lines = table(("what", "value"), [("x" * 100, "1.0"), ("short", "22.0")])
    assert {len(line) for line in lines} == {WIDTH}
    assert lines[2].startswith("| xxx") and ".. | 1.0   |" in lines[2]


def test_a_profile_without_its_table_is_shown_as_it_is():
    assert profile("nothing was profiled")[0] == "nothing was profiled"


def test_results_are_left_as_they_were():
    found = results()
    before = copy.deepcopy(found)
    page(found, TITLES)
    assert found == before
