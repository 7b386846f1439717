"""One stage as an sbatch script, written by NeMo-Run's `SlurmExecutor`.

NeMo-Run writes the options, the container's flags and the srun line (which ends all tasks when one fails). What it does
not know is added in `setup_lines`: a trap that looks at how the attempt ended and has Slurm start the job again where
that helps. Tasks report how it ended in a file, not by their exit code: srun kills the others when one leaves with a
code, and then its own code is theirs. training/signals.py has the whole story of a signal to a job.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from molmo2_nemo.errors import PREEMPTED, USER_ERROR, UserError
from molmo2_nemo.launch.overlay import find_overlay
from molmo2_nemo.launch.reports import ATTEMPT_DIR
from molmo2_nemo.launch.slurm.login import Login
from molmo2_nemo.rundir.paths import ATTEMPTS, OUTCOME, SUMMARY, VERDICT
from molmo2_nemo.rundir.summary import STEPS_LINE
from molmo2_nemo.rundir.verdicts import Ending
from molmo2_nemo.settings.run import ClusterConfig
from molmo2_nemo.settings.slurm import SlurmConfig

# What gloo, NCCL and torch.distributed's store say when another process is gone: its end is the cause, not this.
LOST = "|".join(
    (
        *("Connection (was |was likely )?(reset|closed)( by (remote )?peer)?", "Broken pipe", "Socket Timeout"),
        *("remote process exited", "ncclRemoteError", "NCCL communicator was aborted"),
        *("Watchdog caught collective operation timeout", "Timed out waiting", "failed to recv, got 0 bytes"),
    )
)

# Runs on the node of the batch script, outside the container, where there may be no Python. `outcome` is described in
# launch/reports.py.
TRAP = f"""
unset SLURM_UNBUFFEREDIO  # NeMo-Run's: it gives tasks a terminal, and logs are then full of progress bars
export {ATTEMPT_DIR}="$molmo2_folder/{ATTEMPTS}$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"
molmo2_finished() {{  # as `read_summary` in rundir/summary.py has it: as many steps are done as were asked for
    local steps
    steps=$(sed -n 's/{STEPS_LINE}/\\1/p' "$molmo2_stage/{SUMMARY}" 2> /dev/null)
    [ "${{steps:-0}}" -ge "$molmo2_steps" ]
}}
if molmo2_finished; then echo "molmo2: the stage is finished"; exit 0; fi
molmo2_begin=$(($(wc -c < "$molmo2_log") + 1))
mkdir -p "${ATTEMPT_DIR}" || exit {USER_ERROR}
molmo2_note() {{  # for molmo2 status (rundir/verdicts.py): the cause of whatever the tasks have reported
    {{ date +%s.%N; echo "$how"; tail -n +2 "$outcome"; }} > "${ATTEMPT_DIR}/{VERDICT}.part" &&
        mv "${ATTEMPT_DIR}/{VERDICT}.part" "${ATTEMPT_DIR}/{VERDICT}"
}}
molmo2_srun() {{  # the first line in which srun reports a task that ended so
    tail -c "+$molmo2_begin" "$molmo2_log" | grep -m 1 -E "^srun: error: .*: tasks? [-0-9,]+: $1"
}}
molmo2_end() {{
    local code=$? outcome="${ATTEMPT_DIR}/{OUTCOME}" how=none
    set +evx
    if molmo2_finished; then echo "molmo2: the stage is finished"; exit 0; fi
    if [ -z "$molmo2_cancelled" ]; then
        local first
        first=$(molmo2_srun "")
        [ -f "$outcome" ] && how=$(head -n 1 "$outcome")
        # one that lost another may be the first to end; the one that a signal ended is then the cause
        if [ "$how" = {Ending.FAILED} ] && grep -qiE '{LOST}' "$outcome"; then
            local killed watchdog=""
            grep -q 'Watchdog caught' "$outcome" && watchdog=1  # NCCL's: aborts those that waited too long
            killed=$(molmo2_srun "[KOSB]")  # Killed, Out Of Memory, Segmentation fault, Bus error
            [ -z "$killed$watchdog" ] && killed=$(molmo2_srun Aborted)
            if [ -n "$killed$watchdog" ]; then first=$killed; fi
        fi
        case "$how/$first" in
            {Ending.USER_ERROR}/* | {Ending.PREEMPTED}/* | {Ending.FAILED}/*": Exited "* | {Ending.FAILED}/) ;;
            *)  # killed, so it could not report; what the others report is that they lost it
                printf '{Ending.FAILED}\\n%s\\n' "${{first:-srun ended with code $code}}" > "$outcome"
                case $first in *": Killed" | *"Out Of Memory") echo "perhaps memory ran out" >> "$outcome" ;; esac
                how={Ending.FAILED} ;;
        esac
        tail -n +2 "$outcome" | sed 's/^/molmo2: /'
        case $how in {Ending.FAILED} | {Ending.USER_ERROR}) molmo2_note ;; esac
    fi
    case $how in
        none) echo "molmo2: cancelled, or ended by Slurm"; exit $((code > 0 ? code : {PREEMPTED})) ;;
        {Ending.USER_ERROR}) exit {USER_ERROR} ;;
        {Ending.PREEMPTED}) code={PREEMPTED} ;;
        *) [ "$code" -eq 0 ] && code=1
           if [ "$(cat "$molmo2_folder"/{ATTEMPTS}"$SLURM_JOB_ID"-*/{OUTCOME} | grep -c '^{Ending.FAILED}$')" \\
               -gt "$molmo2_retries" ]
           then echo "molmo2: giving up after $molmo2_retries retries; the same command resumes"; exit "$code"; fi ;;
    esac
    if [ "$molmo2_requeue" = 1 ] && scontrol requeue "$SLURM_JOB_ID"; then
        echo "molmo2: requeued"
        trap - TERM EXIT
        sleep 600 & wait  # for Slurm to end this script: leaving before would count as the end of the job
    fi
    exit "$code"
}}
trap molmo2_end EXIT
trap 'molmo2_cancelled=1' TERM
"""


@dataclass
class StageJob:
    """What a script is made of. Paths are absolute and those of the cluster."""

    name: str  # of the job
    stage: Path  # the stage's folder
    steps: int  # of the whole stage
    folder: Path  # scripts, logs and attempts of the stage's jobs
    config: Path  # resolved configuration
    cluster: ClusterConfig
    tasks_per_node: int
    workdir: Path


def script(job: StageJob, login: Login, after: str | None = None) -> str:
    """The text of the sbatch script.

    Args:
        after: id of a job that has to end well first.

    Raises:
        UserError: a setting that cannot be written into a script.
    """
    from nemo_run.core.execution.slurm import SlurmBatchRequest, SlurmExecutor, SlurmJobDetails

    slurm = job.cluster.slurm
    executor = SlurmExecutor(
        account=slurm.account,  # may be None, whatever NeMo-Run's annotation says
        partition=slurm.partition,
        qos=slurm.qos,
        constraint=slurm.constraint,
        time=slurm.time,
        nodes=job.cluster.nodes,
        ntasks_per_node=job.tasks_per_node,
        gpus_per_node=job.tasks_per_node if slurm.gpus_per_node is None else slurm.gpus_per_node or None,
        cpus_per_task=slurm.cpus_per_task,
        mem=slurm.mem,
        exclusive=True if slurm.exclusive else None,
        signal=f"USR1@{slurm.grace}" if slurm.grace else None,
        container_image=slurm.container,
        container_mounts=mounts(job) if slurm.container else [],
        tunnel=login.tunnel,
        job_name_prefix="molmo2.",
        additional_parameters=options(slurm, after),
        job_details=SlurmJobDetails(job_name=job.name, folder=str(job.folder)),
        setup_lines=setup(job),
    )
    executor.job_dir = str(job.folder)
    request = SlurmBatchRequest(
        launch_cmd=["sbatch", "--parsable"],
        jobs=[job.name],
        command_groups=[[command(job)]],
        executor=executor,
        max_retries=0,
        extra_env={},
    )
    text = request.materialize()
    if slurm.container is None and "/nemo_run" in f"{job.folder}{job.stage}{job.config}{command(job)}":
        raise UserError(
            "NeMo-Run replaces '/nemo_run' in job scripts that use no container; "
            f"choose paths without it (output_dir, cluster.slurm.command or workdir): {job.folder}"
        )
    return text


def options(slurm: SlurmConfig, after: str | None) -> dict[str, str | bool]:
    """Options of sbatch that NeMo-Run's executor has no field for."""
    found: dict[str, str | bool] = {"requeue" if slurm.requeue else "no_requeue": True}
    if slurm.reservation:
        found["reservation"] = slurm.reservation
    if after:
        found["dependency"] = f"afterok:{after}"
        found["kill_on_invalid_dep"] = "yes"
    return {**found, **slurm.options}


def setup(job: StageJob) -> str:
    """Shell lines between the options and srun."""
    slurm = job.cluster.slurm
    for name in slurm.env:
        if not name.isidentifier():
            raise UserError(f"cluster.slurm.env.{name}: not a valid name of an environment variable")
    values = {
        "molmo2_stage": str(job.stage),
        "molmo2_folder": str(job.folder),
        "molmo2_steps": str(job.steps),
        "molmo2_retries": str(slurm.retries),
        "molmo2_requeue": str(int(slurm.requeue)),
    }
    lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    lines.append(f"molmo2_log={shlex.quote(f'{job.folder}/sbatch_{job.name}_')}$SLURM_JOB_ID.out")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in slurm.env.items()]
    lines += [f"export OMP_NUM_THREADS={job.cluster.threads}"] if "OMP_NUM_THREADS" not in slurm.env else []
    return "\n".join([*lines, *slurm.setup]) + TRAP


def command(job: StageJob) -> str:
    """What every task runs."""
    slurm = job.cluster.slurm
    own = slurm.container is None and slurm.ssh.host is None
    start = slurm.command or (own_command() if own else "molmo2")
    return f"env --chdir={shlex.quote(str(job.workdir))} {start} train --config {shlex.quote(str(job.config))}"


def own_command() -> str:
    """How a job's `env` starts what runs here."""
    overlay = find_overlay()
    if overlay is not None:
        return f"MOLMO2_PYTHON={shlex.quote(sys.executable)} {shlex.quote(str(overlay.command))}"
    return f"{shlex.quote(sys.executable)} -m molmo2_nemo.cli.main"


def mounts(job: StageJob) -> list[str]:
    """The user's mounts, and the run's folder and the working folder unless they are among them.

    Raises:
        UserError: a mount that is not FROM:TO, or has a comma.
    """
    found = list(job.cluster.slurm.mounts)
    for mount in found:
        if "," in mount or len(mount.split(":")) not in (2, 3):
            raise UserError(f"cluster.slurm.mounts: {mount!r} is not FROM:TO or FROM:TO:ro")
    for needed in (job.stage.parent, job.workdir):
        inside = [Path(m.split(":")[1]) for m in found]
        if not any(needed == folder or folder in needed.parents for folder in inside):
            found.append(f"{needed}:{needed}")
    return found
