"""The HTML page of a preview: self-contained (inline images, no scripts, no other hosts), with all data escaped."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
from PIL import Image

from molmo2_nemo.data.tally import KINDS, counted
from molmo2_nemo.data.tokenizer import EXTRA_SPECIAL_TOKENS, Molmo2Tokenizer
from molmo2_nemo.errors import plural
from molmo2_nemo.preview import draw
from molmo2_nemo.preview.collect import PackView, Part
from molmo2_nemo.settings.run import RunConfig

MAX_CROPS = 64  # crops drawn of one example
MAX_CHIPS = 700  # tokens shown of one example; a run of the same visual token counts once
MAX_TEXT = 600  # characters shown of a message in the tree

STYLE = """
:root { color-scheme: light }
body { font: 14px/1.45 system-ui, sans-serif; color: #1f2933; margin: 0 auto; max-width: 1240px; padding: 14px 20px }
h1 { font-size: 19px; margin: 0 0 2px }
h2 { font-size: 17px; margin: 22px 0 6px; border-top: 2px solid #1f2933; padding-top: 8px }
h3 { font-size: 15px; margin: 16px 0 6px }
.note { color: #5b6875; margin: 2px 0 6px }
table { border-collapse: collapse }
td, th { text-align: left; padding: 1px 12px 1px 0; vertical-align: top; font-weight: normal }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.legend { margin: 6px 0 }
.legend span { white-space: nowrap; margin-right: 13px }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 2px }
.swatch { margin-right: 4px; vertical-align: -1px }
.pack { display: grid; grid-template-columns: minmax(300px, 430px) 1fr; gap: 22px; margin-top: 10px }
img { display: block }
img.mask, img.strip { width: 100%; border: 1px solid #c5ccd3 }
.crops { display: flex; flex-wrap: wrap; gap: 8px }
.crops figure { margin: 0 }
.crops img { max-width: 100% }
figcaption { font-size: 12px }
.tree { display: flex; align-items: stretch }
.root { flex: 0 0 190px; align-self: center; border: 2px solid #e8913a; border-radius: 6px; padding: 7px 10px }
.line { flex: 0 0 22px; align-self: center; border-top: 2px solid #8c96a3 }
.branches { flex: 1; border-left: 2px solid #8c96a3 }
.branch { margin: 5px 0; padding: 4px 10px; border-left: 18px solid; border-radius: 0 6px 6px 0; background: #f5f6f8 }
.branch, .chips { overflow-wrap: anywhere }
.branch .meta { color: #5b6875; float: right; margin-left: 14px }
.answer { font-weight: 600 }
.chips { line-height: 1.9 }
.chip { font: 12px ui-monospace, monospace; padding: 1px 2px; margin-right: 1px; border-radius: 3px }
.chip { border-bottom: 3px solid transparent; white-space: pre-wrap }
.chip.loss { border-bottom-color: #1f2933; font-weight: 600 }
.chip.visual { padding: 1px 5px }
summary { cursor: pointer; font-weight: 600; margin-top: 12px }
.wide { overflow-x: auto }
.wide td, .wide th { white-space: nowrap }
@media (max-width: 760px) {
body { padding: 10px 12px }
.pack, .tree { display: block }
.pack > div { min-width: 0 }
.root { display: inline-block; max-width: 100%; box-sizing: border-box }
.branch .meta { float: none; display: block; margin: 0 }
.crops figure { width: calc((100% - 16px) / 3) }
.wide td, .wide th { padding-right: 8px }
.wide td:nth-child(2) { white-space: normal; overflow-wrap: anywhere; min-width: 6em }
.wide th { white-space: normal }
}
"""


def write_pages(
    views: list[PackView], cfg: RunConfig, tokenizer: Molmo2Tokenizer, folder: Path, about: str
) -> list[Path]:
    """Write index.html and the PNGs of every pack and example into `folder`; returns the paths, the page first."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    body = [f"<h1>molmo2 preview</h1><p class=note>{_text(about)}</p>", legend(views)]
    for number, view in enumerate(views, start=1):
        used = max(1, sum(part.example.num_tokens for part in view.parts))
        mask = view.mask(tokenizer.vocab_size, cfg.model.visual_attention)
        square = draw.enlarge(draw.mask_image(mask, used, draw.shown_branches(view)), 960)
        crops = [
            [] if again else draw.draw_crops(part, limit=MAX_CROPS)
            for part, again in zip(view.parts, repeats(view.parts, tokens=False), strict=True)
        ]
        body.append(pack_section(view, square, crops, tokenizer))
        path = folder / f"pack{number}.png"
        draw.overview(view, square).save(path, optimize=True)
        written.append(path)
        for place, drawn in enumerate(crops, start=1):
            if drawn:
                path = folder / f"pack{number}_example{place}.png"
                draw.contact_sheet(drawn).save(path)
                written.append(path)
    page = folder / "index.html"
    page.write_text(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>molmo2 preview</title><style>{STYLE}</style><body>{''.join(body)}</body></html>\n",
        encoding="utf-8",
    )
    return [page, *written]


def repeats(parts: list[Part], *, tokens: bool) -> list[int]:
    """For each part of a pack the number, from 1, of an earlier one with the same record and crops; 0: none.

    Args:
        tokens: the same tokens too; without, another prompt may be asked of the same images.
    """
    first: dict[tuple[str, bytes, bytes, bytes], int] = {}
    found = []
    for number, part in enumerate(parts, start=1):
        example = part.example
        said = example.input_ids.tobytes() if tokens else b""
        drawn = (example.key, said, example.crops.tobytes(), example.pooling.tobytes())
        found.append(first.get(drawn, 0))
        first.setdefault(drawn, number)
    return found


def legend(views: list[PackView]) -> str:
    """The legend of the colours, once per page."""
    most = max((len(part.branches()) for view in views for part in view.parts), default=1)
    entries = [("visual token", draw.VISUAL), ("root text (seen by every branch)", draw.ROOT)]
    entries += [(f"branch {i}", colour) for i, colour in enumerate(draw.BRANCHES[:most])]
    keys = "".join(f"<span><i class=swatch style='background:{c}'></i>{n}</span>" for n, c in entries)
    again = " (colours repeat after 8)" if most > len(draw.BRANCHES) else ""
    return (
        f"<p class=legend>{keys}<span><i class=swatch style='background:{draw.PADDING}'></i>padding</span>"
        f"<span><i class=swatch style='background:{draw.INK}'></i>loss weight</span>{again}</p>"
    )


def pack_section(
    view: PackView, square: Image.Image, crops: list[list[tuple[str, Image.Image]]], tokenizer: Molmo2Tokenizer
) -> str:
    """Overview of a pack (mask, numbers, strip), then its examples.

    Args:
        square: the mask; crops: those of each example with their captions, none where an earlier one has them.
    """
    image = draw.data_uri(square)
    strip = draw.data_uri(draw.token_strip(view))
    same, seen = repeats(view.parts, tokens=True), repeats(view.parts, tokens=False)
    parts = ""
    for i, (part, drawn) in enumerate(zip(view.parts, crops, strict=True), start=1):
        if earlier := same[i - 1]:
            note = f"<p class=note>the same tokens and crops as {_link(view, earlier)}</p>"
            parts += f"<h3 id='{_anchor(view, i)}'>{i}. {_text(part.example.key)}</h3>{note}"
        else:
            note = f"<p class=note>the same crops as {_link(view, seen[i - 1])}</p>" if seen[i - 1] else ""
            parts += example_section(_anchor(view, i), part, i, drawn, note, tokenizer)
    return (
        f"<h2>{_text(view.title)}</h2>"
        f"<img class=strip src='{strip}' alt='the tokens of the pack from left to right, loss weights below'>"
        "<div class=note>the pack from left to right; bars: loss weight of each token</div>"
        f"<div class=pack><div><img class=mask src='{image}' alt='attention mask'>"
        "<div class=note>attention mask: rows are queries, columns are keys; white: masked. "
        "Paler: only part of the pairs under the pixel are allowed. Padding is left out.</div></div>"
        f"<div>{pack_numbers(view)}</div></div>{parts}"
    )


def pack_numbers(view: PackView) -> str:
    """Budgets and a table of the examples."""
    tokens, crops = sum(p.example.num_tokens for p in view.parts), view.batch.crops.shape[0]
    weights = view.batch.loss_weights[0]
    lines = [
        f"{tokens:,} of {view.budget[0]:,} tokens ({tokens / view.budget[0]:.1%})",
        f"{crops} of {view.budget[1]} crops",
        f"{plural(int((weights > 0).sum()), 'token')} with loss, weights sum to {weights.sum():.2f}",
    ]
    if view.skipped:
        causes = ", ".join(f"{cause}: {count}" for cause, count in sorted(view.skipped.items()))
        lines.append(f"skipped so far: {_text(causes)}")
    rows = "".join(
        f"<tr><td class=n>{i}</td><td><a href='#{_anchor(view, i)}'>{_text(p.example.key)}</a></td>"
        f"<td class=n>{p.example.num_tokens:,}</td><td class=n>{p.example.num_crops}</td>"
        f"<td class=n>{len(p.branches())}</td><td class=n>{p.example.loss_weights.sum() / max(weights.sum(), 1e-9):.0%}"
        "</td></tr>"
        for i, p in enumerate(view.parts, start=1)
    )
    head = "<tr><th>#<th>example<th>tokens<th>crops<th>branches<th>of the loss</tr>"
    return f"<p>{'<br>'.join(lines)}</p><div class=wide><table>{head}{rows}</table></div>"


def example_section(
    anchor: str, part: Part, number: int, crops: list[tuple[str, Image.Image]], note: str, tokenizer: Molmo2Tokenizer
) -> str:
    """Tree, crops and tokens of one example.

    Args:
        crops: with their captions.
        note: HTML in the place of crops that an earlier example has.
    """
    example = part.example
    seen = note if example.num_crops else ""
    if crops:
        some = f" ({len(crops)} of {example.num_crops} drawn)" if len(crops) < example.num_crops else ""
        figures = "".join(
            f"<figure><figcaption>{_text(caption)}</figcaption><img src='{draw.data_uri(image, photo=True)}' "
            "alt='a crop with pooling windows'></figure>"
            for caption, image in crops
        )
        seen = (
            f"<h3>{visual_summary(part)}{some}</h3><div class=crops>{figures}</div><div class=note>magenta: pooling "
            "windows, each one visual token; dimmed: margins of tiles outside every window</div>"
        )
    return (
        f"<div id='{anchor}'><h3>{number}. {_text(example.key)}</h3>{tree(part)}{seen}"
        f"<details open><summary>{plural(example.num_tokens, 'token')}</summary>{chips(part, tokenizer)}"
        "</details></div>"
    )


def visual_summary(part: Part) -> str:
    """A one-line summary of the images or the video."""
    info = part.example.info
    if "frame_times" in info:
        width, height = info["size"]
        frames = f"{plural(len(info['frame_times']), 'frame')} of {info['duration']:.1f} s"
        return f"video {width} x {height} at {info['fps']:.1f} fps: {frames}"
    sizes = [
        f"{im['size'][0]} x {im['size'][1]} in {im['tiling'][0]} x {im['tiling'][1]} tiles" for im in info["images"]
    ]
    ignored = f", {info['ignored']} ignored" if info.get("ignored") else ""
    return f"{plural(len(sizes), 'image')}: {'; '.join(sizes)}{ignored}"


def tree(part: Part) -> str:
    """The root and its branches with their messages, loss tokens and weights."""
    example, info = part.example, part.example.info
    boxes = []
    conversations = info.get("conversations", [])
    for number, tokens in enumerate(part.branches()):
        weights = example.loss_weights[tokens]
        loss = weights[weights > 0]
        weight = "no loss" if not len(loss) else f"{len(loss)} x {_range(loss)} = {loss.sum():.2f}"
        turns = conversations[number] if number < len(conversations) else []
        said = "<br>".join(f"{_text(u, MAX_TEXT)} <span class=answer>{_text(a, MAX_TEXT)}</span>" for u, a in turns)
        boxes.append(
            f"<div class=branch style='border-left-color:{draw.branch_colour(number)}'><span class=meta>"
            f"branch {number}: {plural(tokens.stop - tokens.start, 'token')}, loss {weight}</span>{said}</div>"
        )
    dropped = "".join(f"<br>{KINDS[kind].plain}: {count:,}" for kind, count in counted(info).items())
    lines = [_document(part) or f"<b>root</b>: {plural(part.root_tokens, 'token')}"]
    lines += [f"{int(example.visual.sum())} visual, {plural(example.num_crops, 'crop')}"]
    root = f"<div class=root>{'<br>'.join(lines)}{dropped}</div><div class=line></div>"
    return f"<div class=tree>{root}<div class=branches>{''.join(boxes)}</div></div>"


def _document(part: Part) -> str:
    """Which part of a document an example is; "" if it is none."""
    info, count = part.example.info, part.example.num_tokens
    if not info.get("raw_text"):
        return ""
    start, stop, total = info.get("piece", (0, count, count))
    return f"<b>raw text</b>: tokens {start + 1:,} to {stop:,} of {total:,}"


def chips(part: Part, tokenizer: Molmo2Tokenizer) -> str:
    """The tokens in order; a run of the same visual token is shown once with its length."""
    example = part.example
    ids = example.input_ids
    branch = np.full(len(ids), -1)
    for number, tokens in enumerate(part.branches()):
        branch[tokens] = number
    out: list[str] = []
    at = 0
    while at < len(ids) and len(out) < MAX_CHIPS:
        stop = at + 1
        if example.visual[at]:
            while stop < len(ids) and ids[stop] == ids[at]:
                stop += 1
            name = EXTRA_SPECIAL_TOKENS[int(ids[at]) - tokenizer.vocab_size]
            times = f" x{stop - at}" if stop - at > 1 else ""
            out.append(f"<span class='chip visual' style='background:{draw.VISUAL}66'>{_text(name)}{times}</span>")
        else:
            out.append(_chip(example, at, int(branch[at]), tokenizer))
        at = stop
    rest = f" <span class=note>and {len(ids) - at:,} more</span>" if at < len(ids) else ""
    return f"<div class=chips>{''.join(out)}{rest}</div><div class=note>underlined: the next token has a loss; " \
        "hover for position, weight and label</div>"  # fmt: skip


def _chip(example: object, at: int, branch: int, tokenizer: Molmo2Tokenizer) -> str:
    ids, weights = example.input_ids, example.loss_weights  # type: ignore[attr-defined]
    token = tokenizer.decode([int(ids[at])])
    weight = float(weights[at])
    label = int(example.labels[at])  # type: ignore[attr-defined]
    hint = f"position {example.position_ids[at]}, id {ids[at]}"  # type: ignore[attr-defined]
    if weight > 0:
        hint += f", weight {weight:.3g}, label {tokenizer.decode([label])!r}"
    kind = "chip loss" if weight > 0 else "chip"
    shown = token.replace("\n", "\u23ce") or "\u2205"
    colour = draw.branch_colour(branch)
    return f"<span class='{kind}' style='background:{colour}38' title='{_text(hint)}'>{_text(shown)}</span>"


def _range(values: np.ndarray) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{high:.3g}" if high - low < 1e-6 * high else f"{low:.3g}..{high:.3g}"


def _link(view: PackView, number: int) -> str:
    return f"<a href='#{_anchor(view, number)}'>{number}</a>"


def _anchor(view: PackView, number: int) -> str:
    return "".join(c if c.isalnum() else "-" for c in f"{view.title}-{number}")


def _text(value: object, limit: int | None = None) -> str:
    text = str(value)
    if limit is not None and len(text) > limit:
        text = text[:limit] + "..."
    return html.escape(text, quote=True)
