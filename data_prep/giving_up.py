"""When `molmo2 prepare` stops because the next samples would fail as well.

Media that are not there count apart from those that cannot be used: a user may have a small part of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_prep.addition import Addition
from data_prep.download import FAILED
from data_prep.elsewhere import elsewhere
from data_prep.media_kinds import NOT_FOUND
from data_prep.output import Output
from data_prep.record_builder import Built
from data_prep.sources.base import Sample, Skip, SourceError
from molmo2_nemo.errors import UserError

GIVE_UP_AFTER = 200  # samples, of different media, that all fail for one reason: the cause is a general one
ABSENT_AFTER = 2000  # different media of which none is there: --source is wrong, or the user has few of them
OUTAGE_AFTER = 50  # consecutive failed downloads: the network is at fault, not the files


class Patience:
    """Stops a run where further items would fail as well."""

    def __init__(self, output: Output, folders: Sequence[Path], *, strict: bool, keep_going: bool):
        self.output, self.folders, self.strict, self.keep_going = output, folders, strict, keep_going
        self.failed = 0  # downloads in a row
        self.absent, self.broken = set[int](), set[int]()  # fingerprints of different media
        self.first_absent: list[str] = []  # names of the first that is not there
        self.reasons: set[tuple[str, str]] = set()
        self.patient = keep_going or isinstance(output, Addition) or output.records > 0

    def downloaded(self, built: Built | Skip) -> None:
        """Count downloads that failed one after the other.

        Raises:
            UserError: so many that the network is at fault. No shard was closed since the first, so all are retried.
        """
        self.failed = self.failed + 1 if isinstance(built, Skip) and built.reason == FAILED else 0
        if self.failed >= OUTAGE_AFTER and not self.keep_going:
            raise UserError(
                f"{self.failed} downloads in a row failed. Check the network and run the command again; complete "
                f"shards are kept; with --keep-going it goes on without them{self._lists()}. The last failure: "
                f"{built.detail if isinstance(built, Skip) else ''}"
            )

    def take(self, item: object, built: Built | Skip) -> None:
        """Look at what has become of the next item.

        Raises:
            UserError: with `strict`, at the first item that is skipped because it cannot be used.
            SourceError: none of the first samples became a record, and the cause is a general one.
        """
        if not isinstance(built, Skip):
            self.patient = True
            return
        if self.strict:
            raise UserError(str(built))
        if self.patient or not isinstance(item, Sample):
            return
        if built.reason == NOT_FOUND:
            missing = [medium for medium in built.media if not medium.there]
            self.first_absent = self.first_absent or [medium.names[0] for medium in missing]
            self.absent.update(hash(medium.names) for medium in missing)
            if len(self.absent) >= ABSENT_AFTER:
                raise SourceError(self._absent(built))
            return
        marks = {hash(medium.names) for medium in built.media if medium.there} or {hash(item.key)}
        self.broken |= marks
        field = built.fault.field if built.fault is not None else ""
        self.reasons.add((built.reason, field.partition("[")[0] if field.startswith("images[") else field))
        if len(self.reasons) > 1:
            self.patient = True
        elif len(self.broken) >= GIVE_UP_AFTER:
            raise SourceError(
                f"none of the first {len(self.broken)} samples became a record, all for one reason; the last, {built}. "
                f"Mend the cause and run the command again, or go on with --keep-going{self._lists()}"
            )

    def _lists(self) -> str:
        paths = self.output.give_up()
        return f" ({', '.join(map(str, paths))} {'list' if len(paths) > 1 else 'lists'} what could not be used so far)"

    def hint(self) -> str:
        """Where the files may be that are not where they are looked for."""
        if not self.first_absent:
            return ""
        where = elsewhere(self.folders, self.first_absent)
        return where or "Are the media below --source, as molmo2 prepare --list NAME says?"

    def _absent(self, last: Skip) -> str:
        return (
            f"none of the first {len(self.absent):,} files that the samples name is there; the last, {last}. "
            f"{self.hint()} If you have a part of them only, add --keep-going{self._lists()}"
        )
