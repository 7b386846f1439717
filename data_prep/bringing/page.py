"""docs/data_sets.md: the table of all published data sets, made from the catalogue.

python -m data_prep.bringing.page > docs/data_sets.md
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from data_prep.bringing.catalogue import FETCHED, load
from data_prep.bringing.needs import ALONE, Need, needs_of
from data_prep.sources import all_sources

HEAD = """\
# The published data sets: what can be had, and how

Made from `data_prep/bringing/catalogue.yaml` by `python -m data_prep.bringing.page`; `molmo2 prepare --needs
NAME` shows the same with addresses, target folders and what is there already, and
[data.md](data.md#bringing-what-they-need) explains it. Rows (questions, captions, tracks) come from the Hugging
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
    return "\n".join(lines) + "\n"


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
