"""Stages as Slurm jobs: submit what is missing, recognise what waits or runs, and keep the jobs' ids.

`<output_dir>/slurm/` holds jobs.json (the last job of each stage), the stages' resolved configurations, and a folder
per stage with its sbatch script, logs and attempts. A job's state comes from squeue; accounting (sacct), which not
every cluster has, only adds how an old job ended.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import UserError
from molmo2_nemo.launch.slurm.login import Login
from molmo2_nemo.launch.slurm.script import StageJob, script
from molmo2_nemo.launch.start import say_start, start_problems
from molmo2_nemo.rundir.jobs import Job, jobs_text, read_jobs
from molmo2_nemo.rundir.lock import only_run
from molmo2_nemo.rundir.paths import JOBS, slurm_dir, stage_dir
from molmo2_nemo.rundir.resume import FREE, changed_settings, refuse_other_run
from molmo2_nemo.settings import checks
from molmo2_nemo.settings.run import RunConfig
from molmo2_nemo.settings.schema import to_yaml
from molmo2_nemo.settings.sizes import wanted_processes

GONE = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "OUT_OF_MEMORY",
    "NODE_FAIL",
    "PREEMPTED",
    "DEADLINE",
    "BOOT_FAIL",
)
HOPELESS = "DependencyNeverSatisfied"


@contextmanager
def login_of(configs: Sequence[RunConfig]) -> Iterator[Login]:
    """The login node of a run, and the run's paths made absolute for it.

    Raises:
        UserError: stages on different kinds of clusters, or a relative path where there is nothing to be relative to.
    """
    slurm = configs[0].cluster.slurm
    if any(c.cluster.kind != "slurm" or c.cluster.slurm.ssh != slurm.ssh for c in configs):
        raise UserError("all stages of a pipeline go to one cluster; set cluster=... without a stage's name before it")
    for cfg in configs:
        if slurm.ssh.host is None:
            cfg.output_dir = str(Path(cfg.output_dir).absolute())
            cfg.cluster.slurm.workdir = str(Path(cfg.cluster.slurm.workdir or ".").absolute())
        elif not cfg.output_dir.startswith("/") or not (cfg.cluster.slurm.workdir or "").startswith("/"):
            raise UserError(
                "over ssh, output_dir and cluster.slurm.workdir must be absolute paths of the cluster's file system"
            )
    login = Login(slurm, slurm_dir(configs[0]))
    try:
        yield login
    finally:
        login.close()


def submit(
    configs: Sequence[RunConfig], done: Sequence[dict[str, Any] | None], login: Login, *, dry_run: bool = False
) -> int:
    """Submits every stage that is neither finished nor already submitted, each after the one before.

    Args:
        configs: in order; `init_from` of a stage after the first is set here.
        done: the finished stages' summaries, None for the others.
        dry_run: only print the scripts, and what would have to be there before they are submitted.

    Raises:
        UserError: something about the settings that can be known now, or Slurm refuses.
    """
    to_run = [cfg for cfg, result in zip(configs, done, strict=True) if result is None]
    for cfg in to_run:
        files = _sees_files(cfg) and not dry_run
        checks.check(cfg, files=files, more=start_problems(cfg) if files else ())
    folder = slurm_dir(configs[0])
    if dry_run:
        lacking = _lacking(to_run)  # now: the later stages' starts are filled in next
        code = _submit(configs, done, login, dry_run=True)
        for cfg in to_run:
            say_start(cfg)
        for problem, stages in lacking.items():
            print(f"before submitting {', '.join(stages)}: {problem}", file=sys.stderr)
        return code
    login.make_folder(folder)
    lock = folder if login.is_local else Path.home() / ".cache" / "molmo2" / _digest(str(folder))
    with only_run(lock):
        code = _submit(configs, done, login, dry_run=False)
    for cfg in to_run:
        say_start(cfg)
    return code


def _submit(configs: Sequence[RunConfig], done: Sequence[Any], login: Login, *, dry_run: bool) -> int:
    folder = slurm_dir(configs[0])
    jobs = read_jobs(login.path(folder))
    waits_for: str | None = None
    for number, cfg in enumerate(configs):
        place = f"stage {number + 1} of {len(configs)}, {cfg.stage.name}"
        if done[number] is not None:
            print(f"{place}: already finished, skipped ({stage_dir(cfg)})", flush=True)
            waits_for = None
            continue
        if number:
            cfg.init_from = str(stage_dir(configs[number - 1]))  # its checkpoint is looked up when the job starts
        known = jobs.get(cfg.stage.name)
        state, reason = job_state(login, known) if known else ("", "")
        if known and waits_or_runs(state) and _still_good(known, state, reason, waits_for):
            _refuse_changes(cfg, known, login)
            print(f"{place}: job {known.id} is {state.lower()}{_because(reason)}", flush=True)
            waits_for = known.id
            continue
        if known and waits_or_runs(state) and not dry_run:
            login.run("scancel", known.id)
            print(f"{place}: job {known.id} waited for a job that is gone, cancelled", flush=True)
        if login.is_local:  # elsewhere the job itself checks
            refuse_other_run(cfg)
        job = stage_job(cfg)
        if dry_run:
            print(f"# {place}\n{script(job, login, waits_for or _placeholder(configs, done, number))}\n", flush=True)
            continue
        known = jobs[cfg.stage.name] = _sbatch(job, cfg, login, waits_for)
        login.write(folder / JOBS, jobs_text(jobs))
        after = f", after job {waits_for}" if waits_for else ""
        print(f"{place}: job {known.id} submitted{after}; log {known.log.replace('%j', known.id)}", flush=True)
        waits_for = known.id
    return 0


def _placeholder(configs: Sequence[RunConfig], done: Sequence[Any], number: int) -> str | None:
    """What stands for the id of a job that a dry run has not submitted."""
    return f"<job of {configs[number - 1].stage.name}>" if number and done[number - 1] is None else None


def _sbatch(job: StageJob, cfg: RunConfig, login: Login, after: str | None) -> Job:
    """Writes configuration and script, and submits."""
    path = job.folder / f"{cfg.stage.name}.sbatch"
    text = script(job, login, after)
    login.make_folder(job.folder / "code")  # NeMo-Run's srun line starts there
    login.write(job.config, to_yaml(cfg))
    login.write(path, text)
    id_ = login.run("sbatch", "--parsable", str(path)).strip().split(";")[0]
    log = str(job.folder / f"log-{job.name}_%j_*.out")
    return Job(id_, job.name, after, time.time(), log)


def stage_job(cfg: RunConfig) -> StageJob:
    """What the script of this stage is made of."""
    folder = slurm_dir(cfg)
    assert cfg.cluster.slurm.workdir is not None
    count, nodes = wanted_processes(cfg), cfg.cluster.nodes
    if count % nodes:
        raise UserError(f"{count} processes cannot be spread evenly over cluster.nodes={nodes}; set cluster.devices")
    run = Path(cfg.output_dir)
    of_sweep = f"{run.parent.name}-" if run.name.isdigit() else ""
    return StageJob(
        name=f"{of_sweep}{run.name}.{cfg.stage.name}",
        stage=stage_dir(cfg),
        steps=cfg.stage.max_steps,
        folder=folder / cfg.stage.name,
        config=folder / f"{cfg.stage.name}.yaml",
        cluster=cfg.cluster,
        tasks_per_node=count // nodes,
        workdir=Path(cfg.cluster.slurm.workdir),
    )


def _sees_files(cfg: RunConfig) -> bool:
    """Whether shards and checkpoints lie here where the job will see them."""
    slurm = cfg.cluster.slurm
    moved = any(m.split(":")[0] != m.split(":")[1] for m in slurm.mounts if ":" in m)
    return slurm.ssh.host is None and not (slurm.container and moved)


def _lacking(configs: Sequence[RunConfig]) -> dict[str, list[str]]:
    """Problems for which a job could not start, each with the stages that have it."""
    found: dict[str, list[str]] = {}
    for cfg in configs:
        for problem in (*checks.file_problems(cfg), *start_problems(cfg)) if _sees_files(cfg) else ():
            found.setdefault(problem, []).append(cfg.stage.name)
    return found


def job_state(login: Login, job: Job) -> tuple[str, str]:
    """State and reason of a job, ("", "") when Slurm has forgotten it; waits while it is being cleaned up."""
    for _ in range(30):
        state, reason = _job_state(login, job)
        if state != "COMPLETING":
            break
        time.sleep(1)
    return state, reason


def _job_state(login: Login, job: Job) -> tuple[str, str]:
    """State and reason from squeue, else the state from accounting where there is one."""
    code, out, err = login.try_run("squeue", "--noheader", "--states=all", f"--jobs={job.id}", "--format=%T|%r|%j")
    if code == 127:
        login.run("squeue")  # raises with the advice
    if code and "Invalid job id" not in err:
        raise UserError(f"squeue on {login.name} failed: {' '.join(err.split())}")
    for line in out.splitlines():
        state, reason, name = line.split("|", 2)
        if name == job.name:  # ids start again from 1 when a cluster is set up anew
            return state, reason
    code, out, _ = login.try_run("sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job.id}", "-oState")
    words = out.split() if code == 0 else []
    return (words[0], "") if words else ("", "")


def waits_or_runs(state: str) -> bool:
    """Whether a job in this state waits or runs."""
    return bool(state) and state not in GONE and not state.startswith("CANCELLED")


def _still_good(job: Job, state: str, reason: str, waits_for: str | None) -> bool:
    """False for a job that waits for one that is gone, or for another one than it should."""
    if state != "PENDING":
        return True
    return reason != HOPELESS and (waits_for is None or job.after == waits_for)


def _refuse_changes(cfg: RunConfig, job: Job, login: Login) -> None:
    path = login.path(slurm_dir(cfg) / f"{cfg.stage.name}.yaml")
    changes = changed_settings(cfg, path, FREE)
    if changes:
        raise UserError(
            f"job {job.id} of {cfg.stage.name} waits or runs with other settings: {'; '.join(changes[:3])}. "
            f"Use its settings, or `scancel {job.id}` first"
        )


def _because(reason: str) -> str:
    return f" ({reason})" if reason not in ("", "None") else ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
