"""Problems of a run that can be found before any process starts. No torch here, and all are listed at once."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from molmo2_nemo.data.lengths import length_problems
from molmo2_nemo.data.objects.files import use as use_store
from molmo2_nemo.data.phases import phase_problems, phases
from molmo2_nemo.data.sampling import is_missing, looked_for, present, weights
from molmo2_nemo.data.shards import ShardDataset
from molmo2_nemo.data.wordings import wordings_of
from molmo2_nemo.errors import DataError, UserError, blocking_file, nearest
from molmo2_nemo.model.config import (
    NOTHING_TRAINS,
    PRESETS,
    Molmo2Config,
    native_positions,
    own_factor,
    preset,
    with_options,
)
from molmo2_nemo.settings.fsdp import fsdp_problems
from molmo2_nemo.settings.layout import context_problems, tensor_problems
from molmo2_nemo.settings.memory import memory_problems
from molmo2_nemo.settings.precision import fp8_problems
from molmo2_nemo.settings.ranges import out_of_range
from molmo2_nemo.settings.run import BESIDE_ADAPTERS, OptimConfig, RunConfig, StageConfig
from molmo2_nemo.settings.sizes import wanted_processes


def check(cfg: RunConfig, processes: int | None = None, files: bool = True, more: Iterable[str] = ()) -> None:
    """Refuses a run that cannot work, with one error that lists every problem.

    Args:
        processes: of the run, where their number is known already (inside a torchrun or Slurm job).
        files: look at shards and checkpoints too; False where the run will see another file system.
        more: further problems, which the caller has found.

    Raises:
        UserError: each line says what was seen, what was expected, what to change.
    """
    _refuse([*find_problems(cfg, processes, files), *more])


def check_stages(stages: Iterable[RunConfig], processes: int | None = None) -> None:
    """Refuses stages that would run one after another when one of them cannot work: before the first starts.

    Args:
        processes: as `check` takes them.

    Raises:
        UserError: names the stage before each problem.
    """
    _refuse([f"{c.stage.name}: {problem}" for c in stages for problem in find_problems(c, processes)])


def _refuse(problems: list[str]) -> None:
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError("\n  - ".join([f"{len(problems)} settings cannot work:", *problems]))


def find_problems(cfg: RunConfig, processes: int | None = None, files: bool = True) -> Iterator[str]:
    """Every problem that the configuration, the shards' manifests and the file system show."""
    model = None
    if cfg.model.preset in PRESETS:
        model = preset(cfg.model.preset)
        chosen = cfg.model
        for options in (
            {"rope_scaling": chosen.rope_scaling, "rope_factor": chosen.rope_factor, "rope_base": chosen.rope_base},
            {"lora": cfg.stage.lora},
        ):
            try:
                model = with_options(model, **options)  # type: ignore[arg-type]
            except UserError as error:
                yield str(error)
    else:
        yield f"model.preset={cfg.model.preset}: no such preset; {nearest(cfg.model.preset, PRESETS)}"
    yield from out_of_range(cfg)
    yield from _running(cfg)
    yield from memory_problems(cfg, model)
    yield from _without_effect(cfg, model)
    if min(cfg.parallel.tensor, cfg.parallel.context, cfg.parallel.pipeline, cfg.parallel.data) >= 1:
        yield from _processes(cfg, processes)
        if model is not None:
            yield from _layout(cfg, model)
        yield from _batch(cfg, processes)
        yield from fsdp_problems(cfg, wanted_processes(cfg) if processes is None else processes)
    if model is not None:
        yield from _sizes(cfg, model)
    yield from _mixture(cfg)
    if files:
        yield from file_problems(cfg)


def file_problems(cfg: RunConfig) -> Iterator[str]:
    """Problems that the file system shows: of shards, tokenizer, the starting checkpoint, and where the run writes."""
    file = blocking_file(Path(cfg.output_dir))
    if file is not None:
        yield f"output_dir={cfg.output_dir}: {file} is a file; name a folder"
    listed = cfg.data.quarantine
    if listed is not None and (Path(listed).is_dir() or not Path(listed).parent.is_dir()):
        what = "it is a folder" if Path(listed).is_dir() else f"there is no folder {Path(listed).parent}"
        yield f"data.quarantine={listed}: {what}; name a file that can be written"
    exported = cfg.log.prometheus
    if exported is not None and (Path(exported).is_dir() or not Path(exported).parent.is_dir()):
        what = "it is a folder" if Path(exported).is_dir() else f"there is no folder {Path(exported).parent}"
        yield f"log.prometheus={exported}: {what}; name a file that can be written"
    kept = cfg.data.feature_cache.path
    if kept is not None and (file := blocking_file(Path(kept))) is not None:
        yield f"data.feature_cache.path={kept}: {file} is a file; name a folder"
    yield from _sources(cfg)
    yield from _validation(cfg)
    yield from _start(cfg)


def _running(cfg: RunConfig) -> Iterator[str]:
    """Checkpoints, faults and logging."""
    keep, faults = cfg.checkpoint, cfg.faults
    if keep.keep_last < 1:
        yield f"checkpoint.keep_last={keep.keep_last}: must be at least 1; a run resumes from its last checkpoint"
    if keep.keep_every is not None and (keep.keep_every < 1 or keep.keep_every % max(1, cfg.save_every)):
        yield (
            f"checkpoint.keep_every={keep.keep_every}: must be a multiple of save_every={cfg.save_every}; no "
            "other step has a checkpoint to keep"
        )
    for name, value in (("max_in_a_row", faults.max_in_a_row), ("max_total", faults.max_total)):
        if value < 0:
            yield f"faults.{name}={value}: must be at least 0, which stops at the first bad step"
    if faults.spike_sigma is not None and not faults.spike_sigma > 0:
        yield f"faults.spike_sigma={faults.spike_sigma}: must be above 0, or null to take every finite step"
    if faults.spike_window < 4:
        yield f"faults.spike_window={faults.spike_window}: a mean and deviation need at least 4 steps"
    if cfg.log.peak_tflops is not None and not cfg.log.peak_tflops > 0:
        yield f"log.peak_tflops={cfg.log.peak_tflops}: must be above 0, or null"
    if cfg.log.prometheus is not None and not cfg.log.prometheus.endswith(".prom"):
        yield f"log.prometheus={cfg.log.prometheus}: the node exporter reads files that end in .prom only; name one"
    yield from profile_problems(cfg)


def profile_problems(cfg: RunConfig) -> Iterator[str]:
    """Which steps are profiled, and on which ranks."""
    steps, last = cfg.log.profile, cfg.stage.max_steps
    if steps is None:
        return
    if len(steps) != 2:
        yield f"log.profile={steps}: expected two step numbers, the first and the last, such as [3,5]; or null"
        return
    if steps[0] < 1:
        yield f"log.profile={steps}: steps are counted from 1, as the log prints them"
    elif steps[0] > steps[1]:
        yield f"log.profile={steps}: the first step is behind the last; did you mean [{steps[1]},{steps[0]}]?"
    elif steps[1] > last:
        yield f"log.profile={steps}: the stage ends after step {last} (stage.max_steps); name steps up to that"
    count = max(1, wanted_processes(cfg))
    wrong = [rank for rank in cfg.log.profile_ranks if not 0 <= rank < count]
    if wrong or not cfg.log.profile_ranks:
        seen = f"there is no rank {wrong[0]}" if wrong else "no rank would write one"
        yield f"log.profile_ranks={cfg.log.profile_ranks}: {seen}; name some of 0 to {count - 1}"


def _beside_adapters(stage: StageConfig) -> Iterator[str]:
    """What is trained whole beside adapters, where there are none."""
    beside = ", ".join(f"stage.lora.{name}" for name in stage.lora.beside)
    if beside and stage.lora.rank < 1:
        yield (
            f"{beside} has no effect with stage.lora.rank={stage.lora.rank}: without adapters stage.train_llm trains "
            "the norms and stage.train_base_embedding the embeddings; set stage.lora.rank=64, or leave it out"
        )
    elif beside and not stage.train_llm:
        yield f"{beside} has no effect with stage.train_llm=false; set stage.train_llm=true, or leave it out"
    elif not beside and stage.optim.beside_adapters != OptimConfig().beside_adapters:
        yield (
            f"stage.optim.{BESIDE_ADAPTERS} has no effect: nothing is trained whole beside adapters; set "
            "stage.lora.norms=true or stage.lora.embeddings=true, or leave it out"
        )


def _without_effect(cfg: RunConfig, model_config: Molmo2Config | None) -> Iterator[str]:
    """Settings that would have no effect, and a run in which nothing would be trained."""
    parallel, stage = cfg.parallel, cfg.stage
    if parallel.context_tokens is not None and not parallel.dynamic_context:
        yield (
            f"parallel.context_tokens={parallel.context_tokens} has no effect without parallel.dynamic_context=true; "
            "set that, or parallel.context_tokens=null"
        )
    if parallel.cp_comm_type != "ring" and parallel.context_ulysses in (None, parallel.context):
        yield (
            f"parallel.cp_comm_type={parallel.cp_comm_type} has no effect where all context ranks (here "
            f"{parallel.context}) are one Ulysses group; leave it at ring, or set parallel.context_ulysses to a lower "
            "number: keys then travel between the groups"
        )
    if parallel.ring_balance != "none" and parallel.context_ulysses in (None, parallel.context):
        yield (
            f"parallel.ring_balance={parallel.ring_balance} has no effect where all context ranks (here "
            f"{parallel.context}) are one Ulysses group, whose work is even; leave it at none, or set "
            "parallel.context_ulysses to a lower number"
        )
    if parallel.overlap_param_gather and not parallel.distributed_optimizer:
        yield (
            "parallel.overlap_param_gather=true has no effect with parallel.distributed_optimizer=false: every rank "
            "updates all parameters and none are gathered; set distributed_optimizer=true, or overlap_param_gather=null"
        )
    if parallel.overlap_grad_reduce and parallel.dynamic_context:
        yield (
            "parallel.overlap_grad_reduce=true with parallel.dynamic_context=true: ranks finish their micro-batches at "
            "different times, and a rank that sends gradients early can block one that still shares a pack; set one of "
            "them to false"
        )
    if parallel.grad_reduce == "bf16" and cfg.cluster.precision == "fp32":
        yield (
            "parallel.grad_reduce=bf16 has no effect with cluster.precision=fp32: gradients are added up in the "
            "parameters' dtype or in fp32; set cluster.precision=bf16, or parallel.grad_reduce=fp32"
        )
    yield from _beside_adapters(stage)
    shortest = min(_lengths(cfg).values())
    if cfg.memory.mlp_tiles > max(1, shortest):
        yield (
            f"memory.mlp_tiles={cfg.memory.mlp_tiles}: a pack has only {shortest} tokens to slice "
            "(data.packing.sequence_length); 8 is much"
        )
    yield from _text(cfg)
    yield from _feature_cache(cfg)
    if model_config is not None and not stage.trainable(model_config).any():
        yield NOTHING_TRAINS


def _text(cfg: RunConfig) -> Iterator[str]:
    chunks = cfg.data.text.shuffle_chunks
    if chunks is not None and cfg.data.text.document_mask:
        yield (
            f"data.text.shuffle_chunks={chunks} with data.text.document_mask=true: a chunk would not see what it "
            "continues; set data.text.document_mask=false, or data.text.shuffle_chunks=null"
        )


def _feature_cache(cfg: RunConfig) -> Iterator[str]:
    cache = cfg.data.feature_cache
    for key, value in (("path", cache.path), ("together", cache.together)):
        if value is not None and cfg.stage.train_vit:
            yield (
                f"data.feature_cache.{key}={value} with stage.train_vit=true: an encoder that is trained makes other "
                f"features of a crop in every step; set stage.train_vit=false, or data.feature_cache.{key}=null"
            )
    if cache.path is None and cache.verify > 0:
        yield (
            f"data.feature_cache.verify={cache.verify:g} has no effect without data.feature_cache.path; set that, or "
            "data.feature_cache.verify=0"
        )


def _processes(cfg: RunConfig, processes: int | None) -> Iterator[str]:
    p, replica = cfg.parallel, cfg.parallel.model_size
    count = wanted_processes(cfg) if processes is None else processes
    layout = f"tensor {p.tensor} * context {p.context} * pipeline {p.pipeline} = {replica}"
    if count < replica:
        yield f"{layout} processes are needed for one replica but there are only {count}; use a smaller layout"
    elif count % replica:
        yield f"{count} processes cannot be divided into replicas of {layout}; change the layout or the process count"
    if p.sequence and p.tensor == 1:
        yield "parallel.sequence=true needs parallel.tensor > 1; turn it off or raise parallel.tensor"


def _lengths(cfg: RunConfig) -> dict[str, int]:
    """Setting -> tokens, of all lengths that packs may have in the run."""
    data = cfg.data
    several = {f"data.progression[{i}]": phase.sequence_length for i, phase in enumerate(data.progression)}
    several |= {f"data.lengths[{i}]": one.sequence_length for i, one in enumerate(data.lengths)}
    return {f"{key}.sequence_length": n for key, n in {**several, "data.packing": data.packing.sequence_length}.items()}


def _layout(cfg: RunConfig, model_config: Molmo2Config) -> Iterator[str]:
    p, text = cfg.parallel, model_config.text
    yield from tensor_problems(p, model_config)
    if text.num_layers % p.pipeline:
        yield (
            f"parallel.pipeline={p.pipeline} does not divide the {text.num_layers} layers of the {model_config.name} "
            "model"
        )
    lengths = _lengths(cfg)
    crops = max(phase.packing.max_crops for phase in phases(cfg.data))
    yield from context_problems(p, model_config, lengths, crops=crops, attention=cfg.model.attention)
    if cfg.cluster.precision == "fp8" and text.ffn_size % p.tensor == 0:
        yield from fp8_problems(model_config, p, cfg.memory, lengths)
    if p.dynamic_context and not cfg.data.share_packs:
        yield (
            "parallel.dynamic_context=true needs data.share_packs=true: the rank that reads for the others assigns "
            "packs to ranks; set both, or neither"
        )


def _batch(cfg: RunConfig, processes: int | None) -> Iterator[str]:
    count = wanted_processes(cfg) if processes is None else processes
    replicas = count // cfg.parallel.model_size
    whole, micro = cfg.stage.global_batch_size, cfg.stage.micro_batch_size
    if replicas >= 1 and micro >= 1 and whole % (micro * replicas):
        yield (
            f"stage.global_batch_size={whole} is not a multiple of stage.micro_batch_size={micro} * {replicas} "
            f"replicas; {-(-whole // (micro * replicas)) * micro * replicas} is"
        )
    elif replicas >= 1 and micro >= 1 and cfg.data.packing.sequence_length >= 1:
        yield from length_problems(cfg.data, whole // (micro * replicas))


def _sizes(cfg: RunConfig, model_config: Molmo2Config) -> Iterator[str]:
    data, vision = cfg.data, model_config.vision
    for key, seen, expected in (
        ("data.image.crop_size", data.image.crop_size, vision.image_size),
        ("data.image.patch_size", data.image.patch_size, vision.patch_size),
    ):
        if seen != expected:
            yield (
                f"{key}={seen}, but the {model_config.name} model's vision encoder takes {expected}; "
                f"set {key}={expected}"
            )
    length, limit = data.packing.sequence_length, model_config.text.max_position
    if length > limit:
        text = preset(model_config.name).text  # as it is before a factor is chosen
        kind = "linear" if cfg.model.rope_scaling == "linear" and text.yarn is None else "yarn"
        yield (
            f"data.packing.sequence_length={length} is more than the {limit} positions of the {model_config.name} "
            f"model; shorten it, or take model.rope_scaling={kind} model.rope_factor="
            f"{math.ceil(length / native_positions(text))}"
        )
    if data.image.patch_size > 0:
        from molmo2_nemo.data.image import TileGeometry  # numpy and Pillow, which --help does without

        try:
            TileGeometry.of(data.image)
        except UserError as error:
            yield str(error)
    yield from phase_problems(data)
    yield from _rope_factors(cfg, model_config)
    for key, crops in (
        ("data.video.max_frames", data.video.max_frames),
        ("data.image.max_crops, with the global view,", data.image.max_crops + 1),
    ):
        if crops > data.packing.max_crops:
            yield (
                f"{key} allows {crops} crops in one example, but a pack holds data.packing.max_crops="
                f"{data.packing.max_crops}; raise that one or lower the other"
            )


def _rope_factors(cfg: RunConfig, model_config: Molmo2Config) -> Iterator[str]:
    """Rotary factors of the phases of `data.progression`: they follow its lengths, and none is beyond the last."""
    chosen, text = cfg.model, model_config.text
    least, before, native = own_factor(preset(model_config.name).text), 0.0, native_positions(text)
    for i, phase in enumerate(cfg.data.progression):
        key, factor = f"data.progression[{i}].rope_factor", phase.rope_factor
        if factor is None:
            factor = chosen.rope_factor
        elif chosen.rope_scaling == "none" or chosen.rope_base is not None:
            choose = "take model.rope_scaling=yarn" if chosen.rope_base is None else "take model.rope_base=null"
            yield f"{key}={factor:g}: model.rope_scaling={chosen.rope_scaling} follows no factor; {choose}, or null"
            return
        elif factor > chosen.rope_factor:
            yield (
                f"{key}={factor:g} is beyond the progression, which ends at model.rope_factor={chosen.rope_factor:g}; "
                f"raise that, or take at most {chosen.rope_factor:g}"
            )
        elif not factor >= max(before, least):
            what = "the phase before it" if before > least else "the model's own"
            yield f"{key}={factor:g}: must be at least {max(before, least):g}, {what}; factors may only grow"
        elif phase.sequence_length > native * factor:
            yield (
                f"{key}={factor:g} is below the progression: packs of {phase.sequence_length} are longer than the "
                f"{native * factor:.0f} positions that it reaches; take {math.ceil(phase.sequence_length / native)}"
            )
        before = factor


def _mixture(cfg: RunConfig) -> Iterator[str]:
    """The data sets' names, paths and rates, whether or not they are there."""
    data = cfg.data
    if not data.sources:
        yield (
            "data.sources is empty: nothing to train on; add folders that data_prep wrote, for example "
            "data.sources.mine.path=/data/shards/mine"
        )
    for kind, sources in (("data", data.sources), ("validation", cfg.validation.sources)):
        for name, source in sources.items():
            if not source.path and (kind == "validation" or source.rate > 0):
                yield f"{kind}.sources.{name}.path is not set; name a folder of shards"
    if data.sources and not any(s.rate > 0 for s in data.sources.values()):
        yield "every data.sources.*.rate is 0: nothing to train on; give at least one source a rate above 0"
    elif all(s.rate >= 0 for s in data.sources.values()) and all(r >= 0 for r in data.groups.values()):
        try:
            weights(data.sources, data.groups, lambda *_: 1)
        except DataError as error:
            yield str(error)


def _sources(cfg: RunConfig) -> Iterator[str]:
    from molmo2_nemo.data.tokenizer import SHIPPED, Molmo2Tokenizer  # with a library that --help does without

    data = cfg.data
    use_store(data.store)
    wanted = {name: source for name, source in data.sources.items() if source.rate > 0 and source.path}
    gone = {name for name, source in wanted.items() if is_missing(source)}
    together = data.missing == "skip" or len(gone) > 3
    if together and gone:
        try:
            present(wanted, data.missing)
        except DataError as error:
            yield f"{error}{looked_for(data.root, wanted)}"
    for name, source in wanted.items():
        if together and name in gone:
            continue
        try:
            ShardDataset(source.path, name).close()
        except (UserError, OSError) as error:
            made = " `molmo2 demo` makes the demo's." if name == "demo" and not Path(source.path).exists() else ""
            yield f"data.sources.{name}: {error}{made}"
    try:
        wordings_of(data.text)
    except (UserError, OSError) as error:
        yield f"data.text.templates: {error}"
    if not Molmo2Tokenizer.exists(data.tokenizer):
        known = ", ".join(f'"{name}"' for name in SHIPPED)
        unset = "; MOLMO2_TOKENIZER, which names it, is not set" if "MOLMO2_TOKENIZER" not in os.environ else ""
        yield f"data.tokenizer={data.tokenizer}: neither {known} nor a folder with a tokenizer.json{unset}"


def _validation(cfg: RunConfig) -> Iterator[str]:
    use_store(cfg.data.store)
    for name, source in cfg.validation.sources.items():
        if not source.path:
            continue
        try:
            ShardDataset(source.path, name, cfg.data.limits)
        except DataError as error:
            yield f"validation.sources.{name}: {error}"


def _start(cfg: RunConfig) -> Iterator[str]:
    if cfg.init_from is None:
        return
    start = Path(cfg.init_from)
    if not start.is_dir():
        yield f"init_from={start}: no such checkpoint folder"
        return
    if not any(start.iterdir()):
        yield f"init_from={start}: the folder is empty, not a checkpoint"
