"""docs/data_sets.md: the table of all published data sets, made from the catalogue.

python -m data_prep.bringing.page > docs/data_sets.md
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from data_prep.bringing.catalogue import FETCHED, load
from data_prep.bringing.needs import ALONE, Need, needs_of
from data_prep.official_layout import HOMES, PACKED, official_folder
from data_prep.sources import all_sources

HEAD = """\
# The published data sets: what can be had, and how

Made from `data_prep/bringing/catalogue.yaml` by `python -m data_prep.bringing.page`; `molmo2 prepare --needs
NAME` shows the same with addresses, target folders and what is there already, and
[bringing.md](bringing.md) explains it. Rows (questions, captions, tracks) come from the Hugging
Face Hub where the table does not say otherwise. GB are what publishers state for the transfer; empty: not
stated. No address was tried from where this was written; they are those of the official code and the
publishers' pages.

"""
TODAY = (  # `how` of a need -> what can be had, from worst to best
    ("nobody", "**no**: hosted nowhere"),
    ("hand", "by hand"),
    ("youtube", "what YouTube still has"),
    ("bucket", "yes, you pay the transfer"),
    ("hub", "yes, fetched"),
    ("fetch", "yes, fetched"),
    (ALONE, "yes, `prepare` alone"),
)


LAYOUT = """\

## The folders of the published code

A data root of the published code (`MOLMO_DATA_DIR`) works as `--source ROOT`, and so do its folders `torch_datasets`,
`video_datasets` and `video_datasets/video_track`: media, and the tables that are brought by hand, are found where its
classes look. The folders are read from that code; no real tree of this kind was tried. Rows come from the Hub's cache
or the Hub all the same, not from copies that the code keeps beside the media. All tracking sets count from
`video_datasets/video_track/`, Molmo2's own videos from `video_datasets/`, images by path or hash (`images/`,
`text_vqa/`, `pixmo_images/`, `mantis-instruct/`) from `torch_datasets/`; the others from these folders:

| data set | folder below the data root |
|---|---|
"""
PACKED_HEAD = """\

Of these the published code keeps only packed copies (`save_to_disk`) or files in the cache of the Hub's library, which
are not read. Bring the publisher's files again, or link them if you kept them:

| data set | what to link where |
|---|---|
"""


def layout() -> str:
    """The part of the page about the folders of the published code."""
    rows = [f"| `{name}` | {official_folder(name)} |" for name in HOMES]
    packed = [f"| `{name}` | {official_folder(name)} |" for name in PACKED]
    return LAYOUT + "\n".join(rows) + "\n" + PACKED_HEAD + "\n".join(packed) + "\n"


def page(needs: Sequence[Need]) -> str:
    """The page, as Markdown."""
    lines = [
        HEAD + _summary(needs),
        "",
        "| data set | what must be brought | today | GB | licence |",
        "|---|---|---|--:|---|",
    ]
    first_with: dict[tuple[str, ...], str] = {}
    for name, group in groupby(needs, key=lambda need: need.data_set):
        these = list(group)
        items = tuple(need.item for need in these)
        earlier = first_with.setdefault(items, name) if items != ("",) else name
        known = [need.gb for need in these if need.gb is not None]
        cells = [f"`{name}`", _what(these) if earlier == name else f"as `{earlier}`", today(these)]
        cells += [f"{sum(known):,.1f}" if known else "", "; ".join(dict.fromkeys(need.licence for need in these))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" + layout()


def _what(needs: Sequence[Need]) -> str:
    parts = []
    for need in needs:
        ends = [f"then {need.after}"] if need.after else []
        ends += [f"form: {need.form}"] if need.form else []
        ends += ["by hand"] if need.how == "hand" and any(other.how != "hand" for other in needs) else []
        parts.append(f"{need.what} ({'; '.join(ends)})" if ends else need.what)
    return "<br>".join(parts)


def today(needs: Sequence[Need]) -> str:
    """What can be had of a data set, judged by what is hardest to bring."""
    ways = {need.how for need in needs}
    worst = next(words for how, words in TODAY if how in ways)
    if worst == "by hand" and ways & set(FETCHED):
        return "partly fetched, the rest by hand"
    return "fetched, then a step by hand" if worst == "yes, fetched" and any(need.after for need in needs) else worst


def _summary(needs: Sequence[Need]) -> str:
    counts: dict[str, int] = {}
    for _, group in groupby(needs, key=lambda need: need.data_set):
        words = today(list(group))
        counts[words] = counts.get(words, 0) + 1
    rows = [f"| {words} | {count} |" for words, count in sorted(counts.items(), key=lambda item: -item[1])]
    return "\n".join(["| today | data sets |", "|---|--:|", *rows, f"| all | {sum(counts.values())} |"])


def made() -> str:
    """The page as the catalogue has it."""
    return page(needs_of(list(all_sources().values()), load()))


if __name__ == "__main__":
    print(made(), end="")
