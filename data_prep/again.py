"""What a later call of `molmo2 prepare` says of a data set that was complete."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_prep.ledger import LEDGER
from data_prep.prepare import Summary
from molmo2_nemo.errors import plural


def again_lines(summary: Summary, folder: Path) -> Iterator[str]:
    """Lines; none for a first call."""
    look, counts = summary.look, summary.counts
    if look is None:
        if summary.already and "parts" in summary.head:
            yield (
                f"joined of {summary.head['parts']} parts: nothing is added to it, and its media are not compared; "
                "prepare the parts again and join them anew"
            )
        elif summary.already and not (folder / LEDGER).is_file():
            yield (
                f"prepared without {LEDGER}, by an older version: taken as it is; --overwrite prepares it anew, "
                "and later calls then notice changed media and retry missing ones"
            )
        return
    if summary.already and not look.due and not look.gone:
        yield f"nothing has changed ({look.media:,} media compared)"
    if look.retried:
        yield f"{counts.get('mended', 0):,} of {look.skipped:,} skipped samples could be added"
    if counts.get("added"):
        yield f"{plural(counts['added'], 'new record')}"
    if counts.get("restored"):
        yield f"{plural(counts['restored'], 'record')} that repair had removed prepared anew"
    if look.changed:
        yield f"{look.changed:,} media of records have changed (the first: {look.first_changed}):"
        lost = f", {counts['lost']:,} can no longer be used" if counts.get("lost") else ""
        yield f"  {plural(counts.get('replaced', 0), 'record')} prepared anew{lost}"
        if counts.get("unread"):
            stay = plural(counts["unread"], "record stays as it was", "records stay as they were")
            yield f"  {stay}: their media cannot be read now"
    if look.gone:
        yield f"{look.gone:,} media are gone (the first: {look.first_gone}); their records stay as they are"
    if not summary.already:
        yield "the data set has another fingerprint now: a run that was begun with it cannot be resumed with this one"
