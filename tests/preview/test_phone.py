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


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two stages of 15 steps; all groups have the same learning rate, their norms differ."""
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
    (folder / "sft" / "checkpoints" / "damaged-step=9").mkdir(parents=True)
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


def ticks(svg):
    """(label, position) of each tick of the x axis."""
    found = []
    for group in ET.fromstring(svg).iter(f"{SVG}g"):
        if re.fullmatch(r"xtick_\d+", group.get("id", "")):
            mark = next(group.iter(f"{SVG}use"))
            found.append(("".join(next(group.iter(f"{SVG}text")).itertext()), float(mark.get("x"))))
    return found


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
    assert seen == 8  # the first chart twice


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
  tables: [...document.querySelectorAll('table')].filter(shown).map(
    t => [t.getBoundingClientRect().width, holder(t) ? holder(t).getBoundingClientRect().right : null]),
  texts: [...document.querySelectorAll('svg text')].filter(shown).map(t => t.getBoundingClientRect()).map(
    box => Math.max(box.height, box.width)),  // of rotated ones the width is the height of the letters
};
"""


@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_pages_fit_the_screen(width, report, preview):
    """The page does not scroll sideways; what is wider than it, a table, scrolls by itself; text can be read."""
    with browser(width) as page:
        for file in (report, preview):
            page.open(file)
            found = page.run(MEASURE)
            shown = Image.open(io.BytesIO(picture(page)))
            assert shown.width == min(2 * width if width == PHONE else width, WIDE) and shown.height > 0.5 * shown.width
            assert found["window"] == width and found["page"] <= width, (file, found)
            for wide, end in found["tables"]:
                assert wide <= width or (end is not None and end <= width), (file, found["tables"])
            assert all(high >= 9 for high in found["texts"]), (file, sorted(found["texts"])[:5])
            assert file is preview or (len(found["tables"]) == 2 and len(found["texts"]) > 50)
