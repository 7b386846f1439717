"""The report's and the preview's pages on a phone and on a wide screen, in a real browser; axes say what they show."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from molmo2_nemo.cli.main import main
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.preview import curves
from molmo2_nemo.rundir.config_file import write_config
from molmo2_nemo.rundir.lines import append_line
from molmo2_nemo.rundir.progress import read_run
from molmo2_nemo.settings.compose import compose
from tests.preview.test_preview import annotation, jpeg
from tests.support.browser import browser, missing
from tests.support.screenshots import DESK, PHONE, WIDE, picture

SVG = "{http://www.w3.org/2000/svg}"
STEPS = 15


def memory() -> dict[str, dict | str]:
    """Figures of snapshots: of profiled steps, of memory that ran out, with and without a history; two are damaged."""
    names = ["molmo2_nemo/model/vision.py forward", "megatron/core/a-file-with-a-long-name.py _and_a_function", "<b>"]
    places = [{"name": n, "at_peak": 2**30 * (5 - i), "points": [2**28, 2**30 * (5 - i)]} for i, n in enumerate(names)]
    rest = {"reserved": 14 * 2**30, "allocated": 3 * 2**30, "rank": 3, "at": [0.0, 7.5]}
    steps = {**rest, "peak": 12 * 2**30, "events": 4000, "whole": False, "failed": None, "places": places}
    failed = {"wanted": 2**31, "free": 2**20, "place": names[0]}
    ran_out = {**steps, "failed": failed, "at": None, "whole": True}
    bare = {**rest, "at": [], "peak": 3 * 2**30, "events": 0, "whole": True, "failed": failed, "places": places[:1]}
    return {
        **{"steps-3-5.rank-3": steps, "out-of-memory.rank-3": ran_out, "out-of-memory.rank-4": {**bare, "rank": 4}},
        **{"steps-6-6.rank-0": "{", "steps-7-7.rank-0": {"peak": 1}},
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two stages of 15 steps; all groups have the same learning rate, their norms differ; the second has a score."""
    folder = tmp_path_factory.mktemp("phone") / "a-run-with-a-name-that-is-rather-long-for-a-phone"
    for stage in ("pretrain", "sft"):
        write_config(compose(["recipe=tiny", f"stage={stage}", f"output_dir={folder}", f"stage.max_steps={STEPS}"]))
        for step in range(1, STEPS + 1):
            line = {
                "step": step, "time": 1e6 + step, "loss": 8.0 / step, "seconds": 8.0, "tokens": 800, "wait": 0.1,
                "tokens_per_second": 100.0 + step, "fill": 0.96, "crop_fill": 0.5, "skipped": 3, "mfu": 0.31,
                "grad_norm_vit": 0.1 * step, "grad_norm_connector": 0.2 * step, "grad_norm_llm": 0.3 * step,
                "lr_vit": 1e-5 * step, "lr_connector": 1e-5 * step, "lr_llm": 1e-5 * step,
            }  # fmt: skip
            append_line(folder / stage / "metrics.jsonl", line)
        begun = {"time": 1e6, "host": "elsewhere", "pid": 1, "layout": "TP2+SP+DP2"}
        (folder / stage / "attempt.json").write_text(json.dumps(begun))
    score = {"step": STEPS, "time": 1e6, "tasks": {"mine": 0.5}, "groups": {"own data": 0.5}}
    append_line(folder / "sft" / "evaluation.jsonl", score)
    (folder / "sft" / "checkpoints" / "damaged-step=9").mkdir(parents=True)
    (folder / "sft" / "memory").mkdir()
    for name, found in memory().items():
        (folder / "sft" / "memory" / f"{name}.json").write_text(found if isinstance(found, str) else json.dumps(found))
    return folder


@pytest.fixture(scope="module")
def report(run, tmp_path_factory):
    page = tmp_path_factory.mktemp("report") / "page.html"
    assert main(["report", str(run), "--out", str(page)]) == 0
    return page


@pytest.fixture(scope="module")
def preview(tmp_path_factory):
    """A pack that is filled with one record again and again."""
    folder = tmp_path_factory.mktemp("preview")
    said = [annotation("What is at this place?", "a word that is not short " * 4)]
    record = {"json": json.dumps({"images": ["0.jpg"], "annotations": said}).encode(), "0.jpg": jpeg(300, 150)}
    write_shards(folder / "mine", [("a-key-that-is-rather-long-for-a-phone-held-upright", record)])
    assert main(["preview", str(folder / "mine"), "recipe=tiny", "stage=sft", "--out", str(folder / "out")]) == 0
    return folder / "out" / "index.html"


def test_a_record_that_repeats_in_a_pack_is_drawn_once(preview):
    text = preview.read_text()
    again = re.findall(r"the same tokens and crops as <a href='#([^']+)'>1</a>", text)
    sections = re.findall(r"<div id='([^']+)'><h3>\d+\. ", text)
    assert len(again) > 1 and set(again) == set(sections) and len(sections) == 1
    assert text.count("class=crops") == 1 and len(list(preview.parent.glob("*_example*.png"))) == 1


def test_images_asked_with_another_prompt_are_drawn_once(tmp_path):
    """A caption's prompt is drawn anew each time, so that its tokens differ; its crops do not."""
    said = [{"style": "long_caption", "text": "a grey field"}]
    record = {"json": json.dumps({"images": ["0.jpg"], "annotations": said}).encode(), "0.jpg": jpeg(300, 150)}
    write_shards(tmp_path / "mine", [("field", record)])
    assert main(["preview", str(tmp_path / "mine"), "recipe=tiny", "stage=sft", "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "index.html").read_text()
    first = re.findall(r"<div id='([^']+)'><h3>1\. ", text)
    again = re.findall(r"the same crops as <a href='#([^']+)'>1</a>", text)
    assert len(again) > 1 and set(again) == set(first)
    assert text.count("class=chips") == 1 + len(again)  # the tokens of each prompt
    assert text.count("class=crops") == 1 and len(list((tmp_path / "out").glob("*_example*.png"))) == 1


def ticks(svg, axis="x"):
    """(label, position) of each tick of an axis that has a label."""
    found = []
    for group in ET.fromstring(svg).iter(f"{SVG}g"):
        if re.fullmatch(rf"{axis}tick_\d+", group.get("id", "")):
            mark, labels = next(group.iter(f"{SVG}use")), list(group.iter(f"{SVG}text"))
            found += [("".join(label.itertext()), float(mark.get(axis))) for label in labels]
    return [(label, place) for label, place in found if label]


def test_ticks_stand_where_they_say(run):
    """Label against place of every tick of every chart: on one straight line."""
    stages, seen = read_run(run), 0
    for draw in curves.CHARTS:
        for svg in re.findall(r"<svg.*?</svg>", curves.figure(draw, stages), re.DOTALL):
            labels, places = zip(*ticks(svg), strict=True)
            numbers = np.array([float(label.replace("\u2212", "-")) for label in labels])
            line = np.polyfit(numbers, places, 1)
            assert len(labels) > 2 and np.abs(np.polyval(line, numbers) - places).max() < 0.01, labels
            assert all(re.fullmatch("[\u22120-9]+", label) for label in labels)
            seen += 1
    assert seen == 9  # the first chart twice


def test_stages_are_named_within_the_axes(run):
    """Also where a chart has values of the last step alone."""
    stages = read_run(run)
    for draw in curves.CHARTS:
        for svg in re.findall(r"<svg.*?</svg>", curves.figure(draw, stages), re.DOTALL):
            _, places = zip(*ticks(svg), strict=True)
            texts = [(text.text, float(text.get("x"))) for text in ET.fromstring(svg).iter(f"{SVG}text")]
            (first,), (second,) = ([x for text, x in texts if text == name] for name in ("pretrain", "sft"))
            assert min(places) < first < second < max(places), draw


def test_values_can_be_read_off(run):
    """Three labels or more on each vertical axis, in full: a common exponent would stand among the stages' names."""
    stages = read_run(run)
    for draw in curves.CHARTS:
        for svg in re.findall(r"<svg.*?</svg>", curves.figure(draw, stages), re.DOTALL):
            labels, places = zip(*ticks(svg, "y"), strict=True)
            numbers = np.array([float(label.replace(",", "").replace("\u2212", "-")) for label in labels])
            if draw is curves._norms:
                numbers = np.log(numbers)
            line = np.polyfit(numbers, places, 1)
            assert len(labels) > 2 and np.abs(np.polyval(line, numbers) - places).max() < 0.01, labels
            assert not set(re.findall(">(1e[^<]+)<", svg)) - set(labels), draw


@pytest.mark.parametrize("limits", [(0.2, 4.5), (0.31, 0.39), (0.9, 11.0), (0.9, 2.9), (1e-9, 1e9), (2e-9, 3e-9)])
def test_a_logarithmic_axis_has_labels(limits):
    low, high = limits
    shown = [tick for tick in curves._logarithmic(low, high).tick_values(low, high) if low <= tick <= high]
    assert 3 <= len(shown) <= 8


def test_legends_hide_no_curve(run):
    """They stand below the labels of the horizontal axis."""
    stages, seen = read_run(run), 0
    for draw in curves.CHARTS:
        for svg in re.findall(r"<svg.*?</svg>", curves.figure(draw, stages), re.DOTALL):
            groups = {group.get("id", ""): group for group in ET.fromstring(svg).iter(f"{SVG}g")}
            if (legend := groups.get("legend_1")) is not None:
                label = next(group for name, group in groups.items() if re.fullmatch(r"xtick_\d+", name))
                low = [float(text.get("y")) for text in legend.iter(f"{SVG}text")]
                assert min(low) > float(next(label.iter(f"{SVG}text")).get("y")) + 10
                seen += 1
    assert seen == 5  # scores, norms, rates, fill, times


def test_curves_that_coincide_share_a_name(run):
    stages = read_run(run)
    assert "vit, connector, llm" in curves.figure(curves._learning_rates, stages)
    norms = curves.figure(curves._norms, stages)
    assert "vit, " not in norms and all(f">{name}<" in norms for name in ("vit", "connector", "llm"))


def test_axes_have_units(run):
    shown = "".join(curves.figure(draw, read_run(run)) for draw in curves.CHARTS)
    for unit in (
        "optimizer step",
        "loss in nats",
        "tokens/s",
        "MFU in %",
        "fill in %",
        "learning rate",
        "norm",
        ">seconds<",
    ):
        assert unit in shown, unit


def test_a_damaged_checkpoint_is_an_incident(report):
    assert "checkpoint put aside as damaged: damaged-step=9" in report.read_text()


MEASURE = """
const shown = e => e.getClientRects().length > 0;
const holder = t => { while (t && !/auto|scroll/.test(getComputedStyle(t).overflowX)) t = t.parentElement; return t; };
return {
  page: document.documentElement.scrollWidth,
  window: window.innerWidth,
  tables: [...document.querySelectorAll('table')].filter(shown).map(holder).map(e => [e.scrollWidth, e.clientWidth]),
  captions: [...document.querySelectorAll('figcaption')].map(e => parseFloat(getComputedStyle(e).fontSize)),
  texts: [...document.querySelectorAll('svg text')].filter(shown).map(t => t.getBoundingClientRect()).map(
    box => Math.max(box.height, box.width)),  // of rotated ones the width is the height of the letters
};
"""


@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_pages_fit_the_screen(width, report, preview):
    """Neither the page nor a table in it scrolls sideways; text can be read."""
    with browser(width) as page:
        for file in (report, preview):
            page.open(file)
            found = page.run(MEASURE)
            shown = Image.open(io.BytesIO(picture(page, width)))
            assert shown.width == min(2 * width if width == PHONE else width, WIDE) and shown.height > 0.5 * shown.width
            assert found["window"] == width and found["page"] <= width, (file, found)
            assert all(wide <= room for wide, room in found["tables"]), (file, found["tables"])
            assert all(high >= 9 for high in found["texts"]), (file, sorted(found["texts"])[:5])
            assert len(found["captions"]) > 2 and min(found["captions"]) >= 12
            assert file is preview or (len(found["tables"]) == 4 and len(found["texts"]) > 50)


def test_who_held_the_memory(report):
    text = report.read_text()
    section = text[text.index("<h2>GPU memory</h2>") : text.index("<h2>Incidents</h2>")]
    assert re.findall("<h3>(.*?)</h3>", section) == [
        "sft, rank 3, out of memory", "sft, rank 4, out of memory", "sft, rank 3, steps 3-5",
        "sft, rank 0, steps 6-6", "sft, rank 0, steps 7-7",
    ]  # fmt: skip
    notes = re.findall(r"<p class=note>(.*?) Written \d{4}-\d\d-\d\d \d\d:\d\d\.</p>", section)
    ran_out = "Memory ran out: 2.0 GiB were asked for by molmo2_nemo/model/vision.py forward, 1.0 MiB were free; "
    held = "3.0 GiB in use at the end, of 14 GiB that PyTorch had of the device; "
    assert all("is damaged" in note for note in notes[3:])
    assert notes[:3] == [
        f"{ran_out}{held}peak 12 GiB in 4,000 allocations and frees.",
        f"{ran_out}{held}who asked for it: log.record_memory_history=true.",
        f"{held}peak 12 GiB in 4,000 allocations and frees, older ones are not kept.",
    ]
    assert section.count("<svg") == 4 and section.count("<table>") == 2  # both widths; none without a history
    assert ">seconds<" in section and ">allocations and frees<" in section
    assert "&lt;b&gt;</td><td>3.0 GiB</td><td>25%</td>" in section
