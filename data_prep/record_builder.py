"""A source's `Sample` -> the members of a record, checked as in training, and its measures.

This is the work that runs in parallel: fetching, decoding, probing. The result depends only on the sample, the options
and the media, so any number of workers gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from pathlib import Path
from typing import Any

from data_prep.download import FAILED
from data_prep.ledger import Medium, media_of, not_fetched
from data_prep.media import Resolver
from data_prep.media_kinds import MediaError, StillImage, Video
from data_prep.noticed import noticed
from data_prep.run_limits import check_fits
from data_prep.shrink import all_smaller, in_size
from data_prep.sources.base import OWN, File, Inline, Media, Sample, Skip, Stored, Url
from molmo2_nemo.data.check import View, check_record
from molmo2_nemo.data.config import DataConfig, VideoConfig
from molmo2_nemo.data.json_values import FieldError
from molmo2_nemo.data.manifest import Entry
from molmo2_nemo.data.meant import check_meant, check_names
from molmo2_nemo.data.places import (
    CLAMPED,
    CLIP_CUT,
    Placing,
    check_places,
    early_times,
    in_lost_part,
    place_clip,
    place_subtitles,
)
from molmo2_nemo.data.record import BadRecord, Record, parse_record
from molmo2_nemo.data.video.sampling import TimeSampler
from molmo2_nemo.errors import DataError, UserError, verbose

LONG_GOP = 100  # frames decoded for each sampled one from which a video counts as slow to read
SLOW_TO_READ = f"long GOPs: over {LONG_GOP} frames decoded for each sampled one; --gop 60 re-encodes such videos"
SAID_BY_PLACING = {CLAMPED: "points_moved", CLIP_CUT: "clips_cut"}  # of own data, in other words
UNFORESEEN = "unforeseen"  # the reason of a sample that our code did not expect
MAX_KEY = 80  # characters; a member name can have 99
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
KEY_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")


@dataclass(frozen=True)
class BuildOptions:
    """Optional changes to the media of a data set."""

    cut_clips: bool = False  # store only the part of a video that the clip shows, without re-encoding
    video_height: int = 0  # re-encode videos that are higher, pixels; 0 = never
    video_fps: float = 0.0  # re-encode videos with more frames per second; 0 = never
    gop: int = 0  # re-encode videos with more frames from one key frame to the next; 0 = never
    max_image_side: int = 0  # make pictures with a longer side smaller, pixels; 0 = never


@dataclass(slots=True)
class Built:
    """A record ready to be written; `entry` has its measures, but no members yet."""

    key: str
    members: dict[str, bytes | Path]  # a path: read when it is written
    entry: Entry = field(default_factory=lambda: Entry(""))
    notes: tuple[str, ...] = ()  # what the summary counts; texts that many records have in common
    media: tuple[Medium, ...] = ()  # what it was made from, below --source


def member_key(key: str) -> str:
    """The key as a member name: letters, digits, `_` and `-`; where that changes it, a hash keeps it unique."""
    name = KEY_UNSAFE.sub("_", key).strip("_")[:MAX_KEY]
    if name == key:
        return name
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
    return f"{name[: MAX_KEY - 13]}-{digest}" if name else digest


def build_all(items: Sequence[Any], resolver: Resolver, options: BuildOptions) -> list[Any]:
    """Build a batch of records, a `Built` or `Skip` for each `Sample`; other items are passed on. The downloads of the
    whole batch run concurrently."""
    wanted: list[Media] = []
    for item in items:
        if isinstance(item, Sample):
            wanted += [*item.images, *([item.video] if item.video is not None else [])]
    resolver.prefetch(wanted)
    return [build(item, resolver, options) if isinstance(item, Sample) else item for item in items]


def _named(sample: Sample, field: str) -> str:
    """The name of the medium in a field of a sample; "" where it has none."""
    media = {f"images[{i}]": image for i, image in enumerate(sample.images)}
    medium = {**media, "video": sample.video, "subtitles": sample.subtitles}.get(field)
    if isinstance(medium, Inline):
        return f"{len(medium.data):,} bytes in the record itself"
    if isinstance(medium, Stored):
        return medium.name
    return medium.url if isinstance(medium, Url) else medium.paths[0] if isinstance(medium, File) else ""


def build(sample: Sample, resolver: Resolver, options: BuildOptions) -> Built | Skip:
    """Build one record, or return the reason why it cannot be built.

    Raises:
        OSError: the cache cannot be written.
    """
    fault, media = None, media_of(sample, resolver)
    try:
        built = _build(sample, resolver, options)
        built.media = media
        return built
    except MediaError as error:
        reason, detail = error.reason, error.detail
        fault = error.fault(error.field, _named(sample, error.field)) if error.field else None
    except BadRecord as error:
        reason, detail, fault = error.cause, error.detail, error.fault
    except FieldError as error:
        reason, detail, fault = "bad sample", str(error), error.fault
        if sample.place is not None:
            detail = f"{sample.place.of(fault.field)} {error.says}".lstrip()
    except UserError as error:
        reason, detail = "bad sample", str(error)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if verbose():
            raise
        reason, detail = UNFORESEEN, f"{type(error).__name__}: {error} (MOLMO2_VERBOSE=1 shows where)"
    # Some libraries put memory addresses into their messages, but skipped.jsonl must be the same in every run.
    media += not_fetched(sample, resolver) if reason == FAILED else ()
    return Skip(sample.key, reason, ADDRESS.sub("", detail)[:400], fault, sample.place, media)


def _build(sample: Sample, resolver: Resolver, options: BuildOptions) -> Built:
    images, config = _images(sample, resolver), resolver.config
    video = _video(sample, resolver)
    clip, part = sample.clip, video.part if video is not None else None
    if part is not None:  # a clip's times count from the start of the part
        clip = part if clip is None else (part[0] + clip[0], min(part[0] + clip[1], part[1]))
    mended: set[str] = set()
    if video is not None and clip is not None:
        if sample.place is not None:
            clip = place_clip(clip, video.duration, mended, lost=video.lost)
        elif not 0 <= clip[0] < min(clip[1], video.duration):
            raise outside(clip, video)
    data: dict[str, Any] = {}
    members: dict[str, bytes | Path] = {}
    trees, kept = sample.trees(), images
    if sample.boxes is not None and images:
        trees = [sample.boxes.points_inside(trees[0], (images[0].width, images[0].height), mended)]
    if images and options.max_image_side:
        kept = all_smaller(images, trees, options.max_image_side, config)
        if (kept[0].width, kept[0].height) != (images[0].width, images[0].height):
            trees = [in_size(tree, (images[0].width, images[0].height)) for tree in trees]
    if images:
        data["images"] = []
        for i, image in enumerate(kept):
            name = _same_image(kept, i) or f"{i}.{image.suffix}"
            data["images"].append(name)
            members[name] = image.data
    film, shown = video, clip
    subtitles = _subtitles(sample, resolver, film, shown, mended)
    if video is not None:
        video, clip = _stored(video, clip, replace(options, cut_clips=options.cut_clips or part is not None), config)
        data["video"] = video.suffix
        members[video.suffix] = video.data
    if subtitles:
        data["subtitles"] = subtitles
    if clip is not None:
        data["clip"] = [float(clip[0]), float(clip[1])]
    if sample.sampling:
        data["sampling"] = dict(sample.sampling)
    if sample.weight is not None:
        data["weight"] = sample.weight
    if sample.weight_factor is not None:
        data["weight_factor"] = sample.weight_factor
    if sample.variants:
        data["variants"] = [list(tree) for tree in trees]
        if sample.variant_weights is not None:
            data["variant_weights"] = list(sample.variant_weights)
    else:
        data["annotations"] = list(trees[0])
    if sample.place is not None and film is not None:
        data = early_times(data, film.fps, mended)
    try:
        members["json"] = json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        before = error.object[max(error.start - 20, 0) : error.start]
        raise DataError(f"text is not valid Unicode: half a character after {before!r}") from None
    except (TypeError, ValueError) as error:
        raise DataError(f"not JSON: {error}") from None
    stand_ins = {name: b"file" if isinstance(content, Path) else content for name, content in members.items()}
    record = parse_record(sample.key, stand_ins, max_json_bytes=config.limits.json_bytes)
    if sample.place is None:
        check_names(sample.key, data)
    else:
        mended.update(check_meant(record, data))
        if film is not None and film is not video and "sampling" in data:
            data["sampling"] = _same_rates(data["sampling"], film)
        start = 0.0 if shown is None else shown[0]
        placing = Placing(view_of(images, film, shown), data.get("sampling", {}), start=start, video=config.video)
        placing.write_size = film is not None and video is not None and film.size != video.size
        data = placing.record(data)
        mended |= placing.notes
        members["json"] = stand_ins["json"] = json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
        record = parse_record(sample.key, stand_ins, max_json_bytes=config.limits.json_bytes)
    view = view_of(images, video, clip)
    lost = check_record(record, view, config)
    if sample.place is not None:
        check_places(data, view, clip, math.inf if video is None else video.duration, config.video)
    check_fits(record, view, config)
    lost -= {kind for text, kind in SAID_BY_PLACING.items() if text in mended}
    entry = measure(data, images, video)
    of_film = () if film is None or video is None else tuple(n for n in film.notes if n not in video.notes)
    seen = (*of_film, *media_notes(entry, kept, video), *noticed(record, data, view, lost, config))
    notes = (*seen, *sample.notes, *sorted(mended))
    return Built(member_key(sample.key), members, entry, notes)


def _same_rates(sampling: Mapping[str, Any], film: Video) -> dict[str, Any]:
    """A record's `sampling` that takes the rates of the film as it was given, when it is stored with another rate."""
    sampler = TimeSampler.of(VideoConfig(), sampling, film.fps)
    if sampler.mode != "fps":
        return dict(sampling)
    kept = {name: value for name, value in sampling.items() if name != "sampling_fps"}
    return kept | {"candidate_sampling_fps": list(sampler.candidate_fps)}


def view_of(images: Sequence[StillImage], video: Video | None, clip: Sequence[float] | None) -> View:
    """What is known of probed media."""
    if video is None:
        return View(tuple((image.width, image.height) for image in images))
    start, end = clip or (0.0, video.duration)
    lost = video.lost if end >= video.duration else 0.0
    return View((), video.size, min(end, video.duration) - start, video.fps, lost)


def outside(clip: Sequence[float], video: Video) -> MediaError:
    """The error about a clip that begins after its film."""
    hint = in_lost_part(clip[0], video.duration, video.lost)
    return MediaError("clip outside the video", f"{clip[0]} - {clip[1]} s of {video.duration:.3f} s{hint}", "clip")


class Asked(Enum):
    """What is asked of a record, each including what stands before it."""

    USABLE = auto()  # training can use it
    NAMES = auto()  # its fields are known
    MEANT = auto()  # nothing in it is what nobody can have meant; of published data only their publishers can say

    @classmethod
    def of(cls, head: Mapping[str, Any]) -> Asked:
        """What is asked of the records of a data set with that manifest head."""
        return cls.MEANT if head.get("kind", OWN) == OWN else cls.NAMES


def check_usable(
    record: Record,
    data: Mapping[str, Any],
    view: View,
    asked: Asked,
    config: DataConfig | None = None,
    film: float = math.inf,
    lost: float = 0.0,
) -> list[str]:
    """Check a stored record whose media were probed.

    Args:
        config: settings of the training that it is for.
        film: seconds of its whole film; `lost`: further ones that the film's header states.

    Returns:
        What that training will leave out or cut; see `noticed`.
    Raises:
        BadRecord: `fault` names the field.
    """
    if asked is Asked.MEANT:
        check_meant(record, data)
    elif asked is Asked.NAMES:
        check_names(record.key, data)
    config = config or DataConfig()
    met = check_record(record, view, config)
    if asked is Asked.MEANT:
        try:
            check_places(data, view, record.clip, film, config.video, lost=lost)
        except FieldError as error:
            raise BadRecord(record.key, "bad annotation", str(error), error.fault) from None
    check_fits(record, view, config)
    return noticed(record, data, view, met, config)


def media_notes(entry: Entry, images: Sequence[StillImage], video: Video | None) -> Iterator[str]:
    """What the summaries say of a record's media."""
    yield from sorted({f"an image {note}" for image in images for note in image.notes})
    yield from video.notes if video is not None else ()
    if video is not None and decoded_per_sample(entry, video) > LONG_GOP:
        yield SLOW_TO_READ


def decoded_per_sample(entry: Entry, video: Video) -> float:
    """Frames that a reader decodes, about, for each that training samples: half a GOP, or all up to the next sample."""
    return min(video.fps * (entry.duration or 0.0) / max(entry.crops or 1, 1), video.gop / 2)


def _images(sample: Sample, resolver: Resolver) -> list[StillImage]:
    """All images; of several, an error says which one cannot be used."""
    images: list[StillImage] = []
    for media in sample.images:
        try:
            images.append(resolver.image(media))
        except MediaError as error:
            one, field = len(sample.images) == 1, f"images[{len(images)}]"
            where = "" if one else f"image {len(images) + 1} of {len(sample.images)}, "
            raise MediaError(error.reason, f"{where}{error.detail}", field) from None
    return images


def _video(sample: Sample, resolver: Resolver) -> Video | None:
    try:
        return resolver.video(sample.video) if sample.video is not None else None
    except MediaError as error:
        raise MediaError(error.reason, error.detail, "video") from None


def _same_image(images: Sequence[StillImage], i: int) -> str | None:
    """The name of an earlier image with the same bytes: media are stored once."""
    for j in range(i):
        if images[j].data == images[i].data:
            return f"{j}.{images[j].suffix}"
    return None


def _subtitles(
    sample: Sample, resolver: Resolver, film: Video | None, clip: tuple[float, float] | None, notes: set[str]
) -> list[dict[str, Any]] | str:
    """As stored; of a user's own data, `notes` says what was mended."""
    if isinstance(sample.subtitles, str):
        return sample.subtitles
    if not sample.subtitles:
        return []
    from data_prep.subtitles import as_record, cut, supervisions

    lines = sample.subtitles
    if isinstance(lines, (File, Url)):
        lines = _subtitle_file(lines, resolver)
    if sample.place is not None and film is not None:
        lines = place_subtitles(lines, view_of((), film, None), clip, notes)
    segments = supervisions(sample.key, lines)
    if sample.clip is not None:
        segments = cut(segments, *sample.clip)
    return as_record(segments)


def _subtitle_file(media: File | Url, resolver: Resolver) -> list[tuple[float, float, str]]:
    from molmo2_nemo.data.subtitle_files import parse

    try:
        path, name = resolver.file(media)
        return parse(name, path.read_bytes())
    except MediaError as error:
        raise MediaError(error.reason, error.detail, "subtitles") from None
    except DataError as error:
        name = media.url if isinstance(media, Url) else media.paths[0]
        raise MediaError("subtitles cannot be read", f"{name} {error}", "subtitles") from None


def _stored(
    video: Video, clip: tuple[float, float] | None, options: BuildOptions, config: DataConfig
) -> tuple[Video, tuple[float, float] | None]:
    try:
        return _transcoded(video, clip, options, config)
    except MediaError as error:
        name = "" if isinstance(video.data, bytes) else f"{video.data}: "
        raise MediaError(error.reason, f"{name}{error.detail}", "video") from None


def _transcoded(
    video: Video, clip: tuple[float, float] | None, options: BuildOptions, config: DataConfig
) -> tuple[Video, tuple[float, float] | None]:
    if options.video_height or options.video_fps or options.gop:
        from data_prep.transcode import Wanted, reencode

        wanted = Wanted(options.video_height, options.video_fps, options.gop)
        video, clip = reencode(video, clip, wanted, cut=options.cut_clips, config=config)
    elif options.cut_clips and clip is not None:
        from data_prep.transcode import cut_packets

        video, clip = cut_packets(video, clip, config)
    return video, clip


def measure(data: dict[str, Any], images: Sequence[StillImage], video: Video | None) -> Entry:
    """Sizes, durations and estimated costs of a record, from its JSON and its probed media."""
    from data_prep.estimate import image_cost, text_cost, video_cost

    trees = data.get("variants") or [data["annotations"]]
    entry = Entry("", images=len(images), annotations=max(len(tree) for tree in trees))
    visual, shown = 0, None
    if images:
        visual, entry.crops = image_cost([(p.width, p.height) for p in images])
    if video is not None:
        start, end = data.get("clip") or (0.0, video.duration)
        entry.duration = round(min(end, video.duration) - start, 6)
        entry.frames = video.frames
        visual, entry.crops = video_cost(entry.duration, video.fps, data.get("sampling", {}))
        shown = TimeSampler.of(VideoConfig(), data.get("sampling", {}), video.fps)(entry.duration)
    entry.tokens = visual + text_cost(trees, data.get("subtitles", ()), shown)
    entry.crops = entry.crops or 0
    return entry
