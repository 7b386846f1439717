"""One stage of training: a RunConfig in, checkpoints, metrics and a summary out.

The trainer is NeMo's: `nemo.lightning.Trainer` with `MegatronStrategy`, `NeMoLogger` and `AutoResume`, put together in
recipes.py. `train` is called in every process of the run, with torchrun's (or Slurm's) environment when
there are several.
"""

from __future__ import annotations

import time
from typing import Any

from molmo2_nemo import compat, cpu
from molmo2_nemo.nemo.start import start_nemo
from molmo2_nemo.processes import quiet, this_rank
from molmo2_nemo.rundir import paths
from molmo2_nemo.rundir.summary import write_summary
from molmo2_nemo.settings.run import RunConfig
from molmo2_nemo.training import memory_history, signals, watchdog
from molmo2_nemo.training.stage import Attempt, is_first_process, layout_name, summary_of


def train(cfg: RunConfig) -> dict[str, Any]:
    """Run, or resume, the stage that `cfg` describes.

    The folder is `<output_dir>/<stage name>`: checkpoints/, tb/, metrics.jsonl, validation.jsonl, faults.jsonl,
    attempt.json (when and where the last attempt began), and summary.json when done. If a whole checkpoint is there,
    training resumes from it, exactly; otherwise it starts from `cfg.init_from`'s weights, or fresh.

    Returns:
        The summary: stage, layout, steps, first and last loss, tokens, fill, checkpoint.

    Raises:
        UserError, OSError: something the user can fix, most of it found before the first step.
        Preempted: SIGTERM or SIGUSR1 ended the run early, after a checkpoint.
    """
    quiet()
    compat.check()
    if is_first_process():
        print(f"stack: {compat.stack()}", flush=True)
    from molmo2_nemo.training.precision import check_precision

    check_precision(cfg.cluster.precision)  # before a folder is made
    with signals.watched(), watchdog.watching(cfg.faults.hang_seconds, paths.stage_dir(cfg)):
        return _train(cfg)


def _train(cfg: RunConfig) -> dict[str, Any]:
    cpu.enable(cfg.cluster.threads)
    began = time.monotonic()
    start_nemo()
    if is_first_process():
        print(f"{cfg.stage.name}: libraries loaded in {time.monotonic() - began:.0f} s; building the model", flush=True)
    import fiddle
    from torch.distributed.checkpoint.api import CheckpointException

    from molmo2_nemo.nemo.callbacks import StopOnSignal
    from molmo2_nemo.nemo.recipes import fit, stage_recipe
    from molmo2_nemo.nemo.step_log import StepLog
    from molmo2_nemo.training.checkpoints import not_written

    folder = paths.stage_dir(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    attempt = Attempt(folder, layout_name(cfg))
    history = memory_history.history.watching(folder, this_rank(), record=cfg.log.record_memory_history)
    with attempt.running(), history:
        run_stage = fiddle.build(stage_recipe(cfg, train=fit))
        trainer = run_stage.keywords["trainer"]
        try:
            run_stage()
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            if (reported := not_written(error, folder)) is not None:
                raise reported from error
            raise
    stop = next(c for c in trainer.callbacks if isinstance(c, StopOnSignal))
    if stop.stopped and trainer.global_step < cfg.stage.max_steps:
        raise attempt.left(stop.stopped, trainer.global_step)
    log = next(c for c in trainer.callbacks if isinstance(c, StepLog))
    if attempt.first and not log.data:
        print(f"{cfg.stage.name}: nothing left to train, steps done: {trainer.global_step:,}", flush=True)
    packs = run_stage.keywords["data"].packs
    totals = log.data or packs.totals()  # the latter where there was nothing left to train
    summary = summary_of(folder, cfg.stage.name, attempt.layout, trainer.global_step, totals, packs.identity())
    if attempt.first:
        write_summary(folder, summary)
    return summary
