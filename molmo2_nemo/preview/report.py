"""The HTML report of a run: a table of its stages, curves, incidents, and the settings.

The page has no scripts and refers to no other hosts; all text of the run is escaped.
"""

from __future__ import annotations

import base64
import datetime
import html
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from molmo2_nemo.errors import UserError, plural
from molmo2_nemo.preview import answers, device_memory
from molmo2_nemo.preview.curves import CHARTS, figure
from molmo2_nemo.rundir.card import CARD, run_card
from molmo2_nemo.rundir.paths import CHECKPOINTS
from molmo2_nemo.rundir.progress import StageProgress, duration
from molmo2_nemo.rundir.straggler import straggler
from molmo2_nemo.settings.schema import to_yaml

STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; margin: 0 auto; max-width: 1080px }
body { padding: 18px 22px 60px }
h1 { font-size: 22px; margin: 0 0 4px }
h2 { font-size: 17px; margin: 30px 0 6px }
.note { color: #5b6875; margin: 0 0 12px }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: 14px }
th { text-align: right; font-weight: 600; color: #5b6875; border-bottom: 1px solid #c5ccd3; padding: 3px 6px }
td { text-align: right; padding: 3px 6px; border-bottom: 1px solid #e8ebee; font-variant-numeric: tabular-nums }
th:first-child, td:first-child, td.t { text-align: left; padding-left: 0 }
td, th { white-space: nowrap }
td.t { white-space: normal; overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 470px), 1fr)); gap: 22px 26px }
figure { margin: 0 }
figure.first { grid-column: 1 / -1 }
figcaption { color: #5b6875; font-size: 13px; margin-top: 5px }
svg { width: 100%; height: auto; display: block }
h3 { font-size: 15px; margin: 16px 0 6px }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 14px }
.card { border: 1px solid #e8ebee; border-radius: 6px; padding: 10px; overflow-wrap: anywhere }
.card img { width: 100%; max-width: 256px; display: block; margin: 0 auto 6px }
.card p { margin: 4px 0 }
summary { cursor: pointer; margin-top: 8px }
.slim { display: none }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff }
@media (max-width: 640px) {
body { padding: 12px 12px 40px }
.broad { display: none }
.slim { display: block }
.stages tbody { display: flex }
.stages tr { flex: auto }
.stages tr, .stages td, .stages th { display: block }
.stages tr:first-child { position: sticky; left: 0; background: #fff }
.stages tr:first-child th { text-align: left; padding-left: 0 }
.stages tr:not(:first-child) td { text-align: right }
.stages td:first-child { position: static; font-weight: 600 }
}
pre { font: 12px/1.45 ui-monospace, monospace; background: #f5f6f8; padding: 10px; overflow-x: auto }
"""


def page(stages: Sequence[StageProgress], title: str, card: str | None = None) -> str:
    """The whole page as HTML.

    Args:
        card: the text of the run's card, which the page then holds.

    Raises:
        UserError: no stage has finished a step yet, so there is nothing to show.
    """
    shown = [s for s in stages if s.steps]
    if not shown:
        raise UserError(f"{title}: no stage has finished a step yet; molmo2 status {title} shows their state")
    model = shown[0].config.model.preset if shown[0].config else ""
    charts = "".join(figure(draw, shown) for draw in CHARTS)
    sections = [
        f"<h1>{_text(title)}</h1><p class=note>Molmo2 {_text(model)}, {_when(shown)}</p>",
        f"<div class=wide>{table(stages)}</div>",
        card_link(card, title) if card is not None else "",
        "<h2>Curves</h2><p class=note>Optimizer steps, stages one after the other.</p>",
        f"<div class=charts>{charts}</div>",
        answers.section(stages),
        device_memory.section(stages),
        incidents(stages),
        "<h2>Settings</h2>",
        *(f"<details><summary>{_text(s.name)}</summary><pre>{_text(to_yaml(s.config))}</pre></details>"
          for s in stages if s.config),
    ]  # fmt: skip
    head = "<meta charset=utf-8><meta name=viewport content='width=device-width'>"
    return (
        f"<!doctype html><html lang=en>{head}<title>{_text(title)}</title><style>{STYLE}</style>"
        f"<body>{''.join(sections)}</body></html>\n"
    )


def card_link(card: str, title: str) -> str:
    """A link that saves the card, and whether the run's files still say what it does."""
    held = base64.b64encode(card.encode()).decode()
    current = False
    with suppress(json.JSONDecodeError, UserError):  # a damaged card, or files that no card can be made of
        current = json.loads(card) == json.loads(json.dumps(run_card(title)))
    old = "" if current else f"; the run's files have changed since: molmo2 report {_text(title)} --card"
    link = f"<a download={CARD} href='data:application/json;base64,{held}'>{CARD}</a>"
    return f"<p class=note>{link}: what ran, on what data, and what came of it{old}</p>"


def table(stages: Sequence[StageProgress]) -> str:
    """A table with one row per stage; on a phone with one column per stage."""
    columns = ("stage", "state", "layout", "steps", "first loss", "last loss", "tokens", "time", "tokens/s", "MFU",
               "fill", "crops")  # fmt: skip
    rows = []
    for stage in stages:
        steps = stage.steps
        losses = [m["loss"] for m in steps if m.get("loss") is not None]
        seconds = sum(m["seconds"] for m in steps)
        tokens = sum(m["tokens"] for m in steps)
        total = f" of {stage.max_steps:,}" if stage.max_steps and stage.step < stage.max_steps else ""
        cells = [
            stage.name,
            stage.state,
            str(stage.attempt.get("layout", "-")),
            f"{stage.step:,}{total}",
            f"{losses[0]:.3f}" if losses else "-",
            f"{losses[-1]:.3f}" if losses else "-",
            _big(tokens),
            duration(seconds) if steps else "-",
            f"{tokens / seconds:,.0f}" if seconds else "-",
            *(_mean(steps, name) for name in ("mfu", "fill", "crop_fill")),
        ]
        rows.append(cells)
    known = [i for i in range(len(columns)) if any(row[i] != "-" for row in rows)]  # there is no MFU on a CPU
    head = "".join(f"<th>{_text(columns[i])}</th>" for i in known)
    body = "".join(f"<tr>{''.join(f'<td>{_text(row[i])}</td>' for i in known)}</tr>" for row in rows)
    return f"<table class=stages><tr>{head}</tr>{body}</table>"


def incidents(stages: Sequence[StageProgress]) -> str:
    """A table of skipped steps, skipped records, a rank that is slower than the rest, and errors."""
    rows = []
    for stage in stages:
        for fault in stage.faults[-20:]:
            records = ", ".join(fault.get("records", [])[:6])
            rows.append((stage.name, f"{fault['step']:,}", f"skipped: {fault['fault']} ({records})"))
        if stage.steps and (count := stage.steps[-1].get("skipped")):
            rows.append((stage.name, "", f"{plural(count, 'record')} skipped"))
        if (slow := straggler(stage.steps)) is not None:
            rows.append((stage.name, f"{stage.step:,}", slow))
        for folder in sorted((stage.folder / CHECKPOINTS).glob("damaged-*")):
            rows.append((stage.name, "", f"checkpoint put aside as damaged: {folder.name}"))
        for error in stage.errors[-5:]:
            rows.append((stage.name, "", f"error: {error['message']}"))
    if not rows:
        return "<h2>Incidents</h2><p class=note>No step and no record was skipped, and nothing failed.</p>"
    body = "".join(f"<tr><td>{_text(a)}</td><td>{_text(b)}</td><td class=t>{_text(c)}</td></tr>" for a, b, c in rows)
    return f"<h2>Incidents</h2><div class=wide><table><tr><th>stage</th><th>step</th><th></th></tr>{body}</table></div>"


def _mean(steps: Sequence[dict[str, Any]], name: str) -> str:
    known = [m[name] for m in steps if m.get(name) is not None]
    return f"{sum(known) / len(known):.0%}" if known else "-"


def _big(count: float) -> str:
    """`61,067`, `9.14 B`."""
    return f"{count / 1e9:,.2f} B" if count >= 1e9 else f"{count:,}"


def _when(stages: Sequence[StageProgress]) -> str:
    times = [m["time"] for s in stages for m in s.steps if "time" in m]
    if not times:
        return "undated"
    first, last = (datetime.datetime.fromtimestamp(t).strftime("%Y-%m-%d %H:%M") for t in (min(times), max(times)))
    return f"{first} to {last}"


def _text(value: object) -> str:
    return html.escape(str(value))
