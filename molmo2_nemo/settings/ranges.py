"""Numbers out of range and impossible names: settings that are wrong by themselves, whatever files or model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from molmo2_nemo.data.config import SourceConfig
from molmo2_nemo.data.length_rates import rate_problems
from molmo2_nemo.model.config import MemoryConfig
from molmo2_nemo.settings.run import BESIDE_ADAPTERS, OPTIMIZER_GROUPS, RunConfig
from molmo2_nemo.settings.schema import by_dotted_key, to_dict

INT32 = 2**31 - 1  # more than any tensor here has rows
UINT32 = 2**32 - 1  # largest seed that numpy's older generators take
GROUPS = (*OPTIMIZER_GROUPS, BESIDE_ADAPTERS)

# The least value allowed, with the greatest where there is one. A setting that may be null may also be left so.
CLOSED: dict[str, tuple[float, float | None]] = {
    **dict.fromkeys(("seed", "data.seed"), (0, UINT32)),
    **dict.fromkeys(("parallel.tensor", "parallel.context", "parallel.pipeline", "parallel.data"), (1, None)),
    "parallel.context_tokens": (1, None),
    **{f"memory.{f.name}": (f.metadata["at_least"], INT32) for f in fields(MemoryConfig) if "at_least" in f.metadata},
    **dict.fromkeys(("stage.max_steps", "stage.global_batch_size", "stage.micro_batch_size"), (1, None)),
    **dict.fromkeys((f"stage.optim.{group}.lr" for group in GROUPS), (0, None)),
    **dict.fromkeys((f"stage.optim.{group}.warmup_steps" for group in GROUPS), (0, None)),
    **dict.fromkeys(("stage.optim.weight_decay", "stage.optim.clip_grad", "stage.z_loss"), (0, None)),
    "stage.optim.final_lr_fraction": (0, 1),
    "faults.hang_seconds": (0, INT32),
    **dict.fromkeys(("data.image.crop_size", "data.image.patch_size", "data.image.pool"), (1, None)),
    **dict.fromkeys(("data.image.max_crops", "data.image.high_res_max_crops"), (1, None)),
    **dict.fromkeys(("data.image.max_images", "data.image.max_multi_image_crops"), (1, None)),
    **dict.fromkeys(("data.image.p_high_res", "data.max_bad_share"), (0, 1)),
    **dict.fromkeys(("data.video.max_frames", "data.video.pool"), (1, None)),
    **dict.fromkeys(("data.image.margin", "data.video.max_subtitle_tokens", "data.num_workers"), (0, None)),
    **dict.fromkeys(("data.packing.sequence_length", "data.packing.max_crops"), (1, None)),
    **dict.fromkeys(("data.packing.buffer_size", "data.packing.balance_window"), (1, None)),
    **dict.fromkeys(("data.packing.crop_value", "data.packing.max_wait"), (0, None)),
    **dict.fromkeys(("data.vocab_size", "data.prefetch", "data.ahead_mib", "data.max_bad_in_a_row"), (1, None)),
    **dict.fromkeys(("data.limits.json_bytes", "data.limits.record_bytes", "data.limits.pixels"), (1, None)),
    "data.text.shuffle_chunks": (2, INT32),
    "data.feature_cache.keep_free_gib": (0, None),
    "data.feature_cache.verify": (0, 1),
    "data.feature_cache.together": (1, INT32),
    **dict.fromkeys(("data.limits.video_frames", "data.limits.text_chars", "data.limits.annotations"), (1, None)),
    **dict.fromkeys(("data.store.cache_gib", "data.store.retries"), (0, None)),
    **dict.fromkeys(("cluster.nodes", "cluster.devices", "cluster.threads", "cluster.slurm.cpus_per_task"), (1, None)),
    **dict.fromkeys(("cluster.slurm.gpus_per_node", "cluster.slurm.grace", "cluster.slurm.retries"), (0, None)),
    "cluster.slurm.ssh.port": (1, 65535),
    **dict.fromkeys(("save_every", "log_every", "validation.every", "validation.examples"), (1, None)),
    **dict.fromkeys(("evaluation.every", "evaluation.limit", "evaluation.frames", "evaluation.depths"), (1, None)),
    **dict.fromkeys(("evaluation.max_new_tokens", "evaluation.batch_tokens"), (1, None)),
}
UNBOUNDED = tuple(f"data.limits.{name}_seconds" for name in ("video", "decode", "image"))  # infinity is no limit
ABOVE_0 = (
    *("data.video.max_fps", "data.store.timeout", "data.text.weight_scale", "stage.optim.eps", *UNBOUNDED),
    *("data.feature_cache.max_gib", "data.feature_cache.disk_gbs"),
)
BELOW_1 = ("stage.optim.beta1", "stage.optim.beta2", "stage.residual_dropout", "stage.response_residual_dropout")
SOURCE: dict[str, tuple[float, float | None]] = {  # of one data set; null where it is allowed
    "rate": (0, None),
    "size_factor": (0, None),
    "weight": (0, None),
    "p_high_res": (0, 1),
}
SLURM = "slurm"  # the folder of a run's jobs, beside those of its stages (rundir/paths.py)
TAKEN = (".", "..", SLURM)  # names of other folders in a run's


def out_of_range(cfg: RunConfig) -> Iterator[str]:
    """Every setting whose value cannot work whatever the others are; names it, its value and what is expected."""
    values = by_dotted_key(to_dict(cfg))
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value) and name not in UNBOUNDED:
            yield f"{name}={value}: must be a finite number"
        elif name in CLOSED:
            yield from _closed(name, value, CLOSED[name])
        elif name in ABOVE_0 and not value > 0:
            yield f"{name}={value}: must be above 0"
        elif name in BELOW_1 and not 0 <= value < 1:
            yield f"{name}={value}: must be at least 0 and below 1"
    for group, sources in (("data", cfg.data.sources), ("validation", cfg.validation.sources)):
        for name, source in sources.items():
            yield from _source(f"{group}.sources.{name}", source)
    for name, rate in cfg.data.groups.items():
        yield from _closed(f"data.groups.{name}", rate, (0, None))
    yield from _names(cfg)


def _closed(name: str, value: Any, bounds: tuple[float, float | None]) -> Iterator[str]:
    low, high = bounds
    if value is not None and not (low <= value and (high is None or value <= high)):
        yield f"{name}={value}: must be at least {low}{'' if high is None else f' and at most {high}'}"


def _source(name: str, source: SourceConfig) -> Iterator[str]:
    for key, bounds in SOURCE.items():
        value = getattr(source, key)
        if value is None or math.isfinite(value):  # others are reported above
            yield from _closed(f"{name}.{key}", value, bounds)
    yield from rate_problems(f"{name}.length_rates", source.length_rates)


def _names(cfg: RunConfig) -> Iterator[str]:
    if not cfg.output_dir.strip():
        yield f"output_dir={cfg.output_dir!r}: names the folder that the run writes to; it may not be empty"
    name = cfg.stage.name
    if not name.strip() or "/" in name:
        yield f"stage.name={name!r}: names the run's folder, so it may not be empty or hold a slash"
    elif name in TAKEN:
        yield f"stage.name={name}: names the stage's folder in the run's, and another folder there has that name"
    if cfg.data.video.decoder == "nvdec" and cfg.data.num_workers:
        yield (
            f"data.video.decoder=nvdec with data.num_workers={cfg.data.num_workers}: decoding workers cannot use the "
            "GPU; set data.num_workers=0, or data.video.decoder=torchcodec"
        )
    if not re.fullmatch(r"frame(_\d+(\.\d+)?)?|truncate_\d+|all|ignore", cfg.data.video.subtitle_mode):
        yield f"data.video.subtitle_mode={cfg.data.video.subtitle_mode}: known are frame_N, truncate_N, all and ignore"
