"""Data sets of the MolmoPoint mixture that no mixture here has: tracks in Molmo2's own videos, and in made ones.

They have the rows of the tracking sets, and are worded as these. Add one to a run with `data.sources.NAME.path=...`.
"""

from __future__ import annotations

from collections.abc import Mapping

from data_prep.sources.base import ArchiveMember, File, FirstOf, Hub, HubFile, Media, Row, Source, maybe
from data_prep.sources.tracking import FIELDS, KINDS, NOTES, tracking_records

ANY, SYN = "allenai/MolmoPoint-TrackAny", "allenai/MolmoPoint-TrackSyn"


def _any(row: Row, rates: Mapping[str, float]) -> Media | None:
    """The video of a row of TrackAny. None for an unknown source."""
    source, video = row["video_source"], row["video"]
    if source.lower() == "mammalnet":
        return File(f"MammalNet/trimmed_video/{video}")
    if source != "youtube":
        return None
    path = row.get("video_path") or video
    return File(*dict.fromkeys((f"youtube-cc/{path}", f"youtube-cc/{video}")))


def _syn(row: Row, rates: Mapping[str, float]) -> Media:
    """The video of a row of TrackSyn: unpacked as the published code does, or from the repository's archive."""
    video = row["video"]
    return FirstOf(File(f"MolmoPoint-TrackSyn/{video}"), ArchiveMember(HubFile(SYN, "synthetic_tracks.tar"), video))


SOURCES: tuple[Source, ...] = (
    Source(
        name="molmo_point_track_any",
        mixes={},
        kind=f"video, {KINDS['track']}",
        origin=Hub(
            ANY,
            configs=("track",),
            media="YouTube videos as youtube-cc/<video_path>, others as MammalNet/trimmed_video/<video>.mp4",
        ),
        licence="see the card on the hub; videos keep that of their owners",
        fields={**FIELDS, "video_source": str, "video_path": maybe(str)},
        records=tracking_records("track", _any, None),
        notes=f"Only in the mixture of MolmoPoint; rows and paths after its loader, never tried. {NOTES}",
    ),
    Source(
        name="molmo_point_track_syn",
        mixes={},
        kind=f"video, {KINDS['track']}",
        origin=Hub(SYN, configs=("track",)),
        licence="see the card on the hub; videos are synthetic",
        fields=FIELDS,
        records=tracking_records("track", _syn, None),
        notes=f"Only in the mixture of MolmoPoint; rows and paths after its loader, never tried. {NOTES}",
    ),
)
