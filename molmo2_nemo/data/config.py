"""Typed settings of the data path. Defaults are those published for stages 2 and 3 unless a comment says otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ImageConfig:
    """Tiling of still images (published: 378-pixel crops of 27 x 27 patches, 4 patches of overlap margin)."""

    crop_size: int = 378  # pixels; must equal the vision encoder's image size
    patch_size: int = 14
    margin: int = 4  # patches cut from each inner edge of a tile
    max_crops: int = 8  # tiles of an image, the global view not counted
    high_res_max_crops: int = 24
    p_high_res: float = 0.0  # chance that a single image may use high_res_max_crops
    max_images: int = 5
    max_multi_image_crops: int = 8
    pool: int = 2  # pooling window side, patches
    truncated: Literal["load", "skip"] = "load"  # a picture cut off or damaged inside; load: as the published code


@dataclass
class VideoConfig:
    """Frame sampling, layout and timestamps of videos."""

    max_frames: int = 128  # 384 in the long-context stage
    max_fps: float = 2.0
    pool: int = 3
    time_mode: Literal["per-frame-compact", "per-frame", "numbered-frames", "none"] = "per-frame-compact"
    per_frame_markers: bool = True  # a start and end token round each frame, as in the published checkpoints
    frame_tokens: bool = False  # <frame_start>/<frame_end> instead of <im_start>/<im_end>
    subtitle_mode: str = "frame_1"  # frame_N, all, truncate_N, ignore
    max_subtitle_tokens: int | None = None
    decoder: Literal["pyav", "torchcodec", "nvdec"] = "pyav"  # the same frames; data/video/decoders.py


@dataclass
class TextFormatConfig:
    """How annotations become prompts and answers, and how the loss of answers is weighted."""

    prompt_templates: Literal["none", "uber_model_v2"] = "uber_model_v2"  # stage 1: none
    system_prompt: Literal["style_and_length_v2", "demo_or_style_v2"] = "demo_or_style_v2"
    point_format: Literal["html-v1", "html-v2"] = "html-v2"  # stage 1: html-v1
    root_length_weight: bool = True  # multiply by weight_scale / sqrt(loss tokens of the branch); stage 1: False
    root_branches_weight: bool = True  # divide by sqrt(branches kept); stage 1: False
    weight_scale: float = 2.0  # the released code's 2; the paper writes 4
    document_mask: bool = True  # documents of raw text in a pack do not see each other; False: one causal sequence
    shuffle_chunks: int | None = None  # most chunks of a document, interleaved in a pack; needs document_mask=False
    templates: str | None = None  # a file of `molmo2 templates import`; default: this project's own wordings
    templates_sha256: str | None = None  # fingerprint of that file's wordings; filled in, and compared on resuming


@dataclass
class LengthRateConfig:
    """How often a document of raw text comes, relative to others of its data set; data/length_rates.py."""

    tokens: int = 0  # of documents with at least as many, up to the next entry
    rate: float = 1.0  # below the first entry: 1


@dataclass
class SourceConfig:
    """One data set of the mixture: a folder of shards with a manifest (or its address), its rate, and its overrides.

    Without a group, `rate` is the source's share before all shares are normalised. In a group it multiplies the
    source's size when the group's rate is divided among its members; data/sampling.py has the rule.
    """

    path: str = ""
    rate: float = 1.0
    group: str | None = None  # a name in data.groups
    size_factor: float | None = None  # None: sqrt(records); 0: 1; below 1: sqrt(factor * records); else sqrt(factor)
    weight: float | None = None  # flat loss weight that replaces the generic one
    p_high_res: float | None = None
    length_rates: list[LengthRateConfig] = field(default_factory=list)  # raw text: documents' rates by their tokens


PackingMode = Literal["balanced", "knapsack"]


@dataclass
class PackingConfig:
    """Two budgets at once: tokens and crops."""

    sequence_length: int = 16384
    max_crops: int = 128  # per pack
    buffer_size: int = 48
    crop_value: float = 30.0  # worth of one crop in tokens when the knapsack chooses
    mode: PackingMode = "balanced"  # knapsack: as published, without an age rule
    balance: bool = True  # swap a step's micro-batches so that data-parallel ranks have equal work (with share_packs)
    balance_window: int = 8  # one micro-batch per rank and step: micro-batches sorted by cost together; 1: as packed
    max_wait: int | None = None  # packs after which an example is forced into the next one; default: buffer_size


@dataclass
class LimitsConfig:
    """Upper limits for one record. A record beyond a limit is skipped and counted like any other bad record."""

    json_bytes: int = 16 * 2**20  # of the .json member
    record_bytes: int = 4 * 2**30  # of all its members together, as stored
    pixels: int = 64_000_000  # of an image or video frame, about 16 bytes each; Pillow's own limit is 178 million
    video_seconds: float = 6 * 3600.0
    video_frames: int = 3_000_000  # in the file, not those sampled
    decode_seconds: float = 600.0  # processor time that reading one video may take
    image_seconds: float = 60.0  # processor time that decoding one image may take; large ones take about 3
    text_chars: int = 1_000_000  # of one message; several times what the longest sequence holds
    annotations: int = 4096


@dataclass
class StoreConfig:
    """How shards at object stores are read (a path such as s3://bucket/set); those in folders need none of it."""

    cache: str | None = None  # folder on a disk of this machine; default: molmo2-objects-UID where temporary files go
    cache_gib: float = 20.0  # most that all its files take, GiB; 0: manifests only, and records are fetched twice
    retries: int = 8  # further tries of a request, with growing pauses: 2 minutes in all
    timeout: float = 60.0  # seconds that a store may be silent; a request may take this, and a second for each MiB


@dataclass
class PhaseConfig:
    """An early part of a stage with shorter packs and fewer frames; see `DataConfig.progression`."""

    until_step: int = 0  # the first optimizer step after it
    sequence_length: int = 16384
    max_crops: int | None = None  # default: packing.max_crops
    max_frames: int | None = None  # default: video.max_frames
    rope_factor: float | None = None  # default: model.rope_factor; may only grow


@dataclass
class LengthConfig:
    """One of several pack lengths of a run; see `DataConfig.lengths`."""

    sequence_length: int = 16384
    share: float = 1.0  # of the steps, relative to the other lengths
    max_crops: int | None = None  # default: packing.max_crops


@dataclass
class FeatureCacheConfig:
    """Features of a frozen vision encoder (stage.train_vit=false), computed once and kept on disk."""

    path: str | None = None  # folder that processes and runs may share; null: nothing is kept
    max_gib: float = 100.0  # of all its files; at the limit it stops growing
    keep_free_gib: float = 20.0  # it also stops before less than this is free on its disk
    verify: float = 0.0  # share of the features read that are computed again and compared
    together: int | None = None  # crops encoded at a time; null: 1 with a path (exact), all of a pack without
    disk_gbs: float = 5.0  # GB/s that a node reads from the folder; `molmo2 plan` alone asks for it


@dataclass
class DataConfig:
    """Everything between shards on disk and a batch."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    groups: dict[str, float] = field(default_factory=dict)  # sampling rate of each group that sources name
    root: str = "shards"  # folder, or s3://bucket/folder, that the paths of the published mixtures are relative to
    missing: Literal["error", "skip"] = "error"  # a source without shards; skip: the other rates fill the gap
    vocab_size: int | None = None  # base rows of the model's embedding: the first visual id; set by the trainer
    tokenizer: str = "tiny"  # "tiny" (shipped) or a folder with tokenizer.json
    image: ImageConfig = field(default_factory=ImageConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    text: TextFormatConfig = field(default_factory=TextFormatConfig)
    packing: PackingConfig = field(default_factory=PackingConfig)
    progression: list[PhaseConfig] = field(default_factory=list)  # phases before the full packs; sizes may only grow
    lengths: list[LengthConfig] = field(default_factory=list)  # ascending; a step has packs of one, tokens as before
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    num_workers: int = 0  # worker processes that decode packs; the batches do not depend on it
    prefetch: int = 4  # examples that each planning worker keeps ready, and at most packs that each decoding one does
    ahead_mib: int = 768  # MiB of crops that all decoding workers together hold before their turn; one pack, if larger
    seed: int = 50189
    feature_cache: FeatureCacheConfig = field(default_factory=FeatureCacheConfig)
    share_packs: bool = True  # one rank of a model-parallel group reads and decodes for all of it
    max_bad_in_a_row: int = 100  # unusable records after which the run stops
    max_bad_share: float = 0.1  # of a rank's records since the start, checked once it has read 1000; 1: no limit
    quarantine: str | None = None  # JSON Lines file for the shard, key and cause of every skipped record
