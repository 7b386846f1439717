"""What a run starts from and with: the checkpoint, whether it fits the model, the tasks that it evaluates."""

from __future__ import annotations

import fcntl
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import UserError
from molmo2_nemo.processes import this_rank
from molmo2_nemo.rundir import checkpoint_manifest
from molmo2_nemo.rundir.config_file import read_config, run_of_checkpoint
from molmo2_nemo.rundir.paths import CHECKPOINTS, CONFIG, MERGED, stage_dir
from molmo2_nemo.rundir.summary import figures_missing, not_a_checkpoint, read_summary, resolve_checkpoint
from molmo2_nemo.settings.ranges import out_of_range
from molmo2_nemo.settings.remarks import remarks
from molmo2_nemo.settings.run import RunConfig


def start_problems(cfg: RunConfig) -> Iterator[str]:
    """Problems of `init_from` that its folder and its run's config.yaml show: something that is no checkpoint and will
    have none, such as a model in Hugging Face format; another model, or damaged settings.

    A folder that is empty or does not exist has none: settings/checks.py reports those.
    """
    if cfg.init_from is None:
        return
    start = Path(cfg.init_from)
    run = run_of_checkpoint(start)
    if not start.is_dir():
        return
    if (wrong := not_a_checkpoint(start)) is not None and any(start.iterdir()):
        yield f"init_from: {wrong}"
    if run is None:
        return
    try:
        saved = read_config(run / CONFIG)
    except UserError as error:
        yield f"init_from={cfg.init_from}: {error}"
        return
    if saved is not None and saved.model.preset != cfg.model.preset:
        yield (
            f"init_from={cfg.init_from} is a checkpoint of model {saved.model.preset!r}, but model.preset="
            f"{cfg.model.preset}; use model={saved.model.preset} or another checkpoint"
        )


def resolve_start(cfg: RunConfig) -> None:
    """Replaces an `init_from` that names the folder of a stage or run by its last checkpoint, and says so where it is
    not finished; a checkpoint with adapters, where the stage has none, by a copy that has them merged.

    Raises:
        UserError: there is no whole checkpoint, it is a stage of this very run that is not finished, or a checkpoint
            with adapters cannot be read.
    """
    if cfg.init_from is None:
        return
    remarks: list[str] = []
    own = Path(cfg.init_from).resolve().parent == Path(cfg.output_dir).resolve()
    checkpoint = resolve_checkpoint(cfg.init_from, remarks, finished=own)
    if this_rank() == 0:
        print("".join(f"init_from: {line}\n" for line in remarks), end="", flush=True)
    run = run_of_checkpoint(checkpoint)
    saved = read_config(run / CONFIG) if run is not None else None
    if run is not None and saved is not None and saved.stage.lora.rank and not cfg.stage.lora.rank:
        checkpoint = _merged(checkpoint, run)
    cfg.init_from = str(checkpoint)


def say_start(cfg: RunConfig) -> None:
    """Says on stderr what is to be known of a stage that is about to start: that it starts from random weights, unless
    it has a checkpoint to start or resume from, and what of its settings will not come to bear."""
    name, host = cfg.stage.name, cfg.cluster.slurm.ssh.host if cfg.cluster.kind == "slurm" else None
    said = [f"{name}: {line}" for line in remarks(cfg)]
    if cfg.init_from is None and not checkpoint_manifest.finished(stage_dir(cfg) / CHECKPOINTS):
        unless = "" if host is None else f" (or resumes, if it has a checkpoint on {host})"
        said.append(
            f"{name} starts from random weights{unless}: init_from is not set; init_from=CHECKPOINT, in a pipeline "
            f"{name}:init_from=CHECKPOINT, starts from others"
        )
    print("".join(f"{line}\n" for line in said), end="", file=sys.stderr, flush=True)


def _merged(checkpoint: Path, run: Path) -> Path:
    """A checkpoint with its adapters merged into the weights, beside it in its run; made by the first process to ask.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    folder = run / MERGED
    target = folder / checkpoint.name
    if checkpoint.parent == folder:
        return checkpoint
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            from molmo2_nemo.convert import export_checkpoint, import_checkpoint

            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                whole = export_checkpoint(checkpoint, Path(scratch) / "hf")
                import_checkpoint(whole, Path(scratch) / "checkpoint").rename(target)
            print(f"the adapters of {checkpoint} are merged in {target}, from where this stage starts", flush=True)
    return target


def finished_before(cfg: RunConfig) -> dict[str, Any] | None:
    """The summary of a stage that has nothing left to do; None where processes must start to find out: it is not
    finished, its last checkpoint is not whole, or figures of its last step are missing."""
    done = read_summary(stage_dir(cfg), cfg.stage.max_steps)
    if done is None or "steps" not in done or figures_missing(cfg):
        return None
    newest = checkpoint_manifest.newest_whole(stage_dir(cfg) / CHECKPOINTS)
    return done if newest is not None and str(newest) == done["checkpoint"] else None


def evaluation_problems(cfg: RunConfig) -> Iterator[str]:
    """Problems of `evaluation`: unknown tasks, data that are not there, a layout that cannot answer."""
    if not cfg.evaluation.tasks:
        if cfg.evaluation.data is not None:
            yield f"evaluation.data={cfg.evaluation.data} without evaluation.tasks=[auto], which is what reads it"
        return
    from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
    from molmo2_nemo.evaluation.suite import check_passes, passes_of_run
    from molmo2_nemo.inference.limits import Room
    from molmo2_nemo.inference.prompt import Shown
    from molmo2_nemo.plan.words import model_of

    if cfg.parallel.pipeline > 1:
        yield (
            "evaluation.tasks: pipeline stages cannot generate answers; leave it out and run molmo2 evaluate on a "
            "checkpoint, which loads under any layout, or set parallel.pipeline=1"
        )
    try:
        passes = passes_of_run(cfg.evaluation, cfg.data.root)
    except (UserError, OSError) as error:
        yield f"evaluation: {error}"
        return
    try:
        if any(out_of_range(cfg)):
            return
        text = model_of(cfg).text
        room = Room(cfg.data, Molmo2Tokenizer.load(cfg.data.tokenizer, vocab_size=text.vocab_size), text.max_position)
        shown = Shown(frames=cfg.evaluation.frames)
        found = list(room.problems(shown, longest=cfg.evaluation.max_new_tokens, training=True))
    except UserError:  # settings that settings/checks.py names
        return
    yield from found
    try:
        if not found:
            check_passes(passes, cfg.data)
    except UserError as error:
        yield f"evaluation: {error}"
