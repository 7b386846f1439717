"""A real Slurm on this machine, private to a test: munged, slurmctld and two slurmd in a folder, on ports of its own.

Nothing of a system's Slurm is touched; `Cluster.stop` ends the processes it started and no others. Needs root, as
slurmd does to start jobs, and the programs of Debian's slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
NODES, GPUS = 2, 2

HAS = f"CPUs=16 RealMemory=10000 Gres=gpu:{GPUS}"  # of a node

SLURM_CONF = """\
ClusterName=molmo2test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,nohold_on_prolog_fail
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=10
MinJobAge=300
JobRequeue=1
PlugStackConfig={folder}/plugstack.conf
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] {has}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """The reason why no Slurm can be started here, None when one can."""
    missing = [name for name in PROGRAMS if find(name) is None]
    if missing:
        return f"no Slurm here: {', '.join(missing)} missing (Debian: slurmctld slurmd slurm-client munge)"
    return None if os.geteuid() == 0 else "slurmd needs root"


def find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """Starts in `folder`; `env` makes Slurm's commands speak to it."""

    def __init__(self, folder: Path, plugin: Path | None = None) -> None:
        self.folder = folder
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.processes: list[subprocess.Popen[bytes]] = []
        (folder / "state").mkdir(parents=True)
        (folder / "plugstack.conf").write_text(f"required {plugin}\n" if plugin else "")
        self._devices()
        ports = free_ports(1 + NODES)
        host = socket.gethostname().split(".")[0]
        settings = SLURM_CONF.format(host=host, folder=folder, ports=[ports[0], *ports[1:]], nodes=NODES, has=HAS)
        (folder / "slurm.conf").write_text(settings)

    def _devices(self) -> None:
        """Character devices that stand for GPUs: Slurm counts them, nothing opens them."""
        for number in range(GPUS):
            os.mknod(self.folder / f"gpu{number}", 0o600 | 0o020000, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n")

    def start(self) -> None:
        """Starts the daemons and waits until both nodes are idle."""
        f = self.folder
        (f / "munge.key").write_bytes(os.urandom(128))
        (f / "munge.key").chmod(0o400)
        options = ["key-file", "socket", "pid-file", "log-file", "seed-file"]
        paths = [f"--{o}={f}/munge.{o.split('-')[0]}" for o in options]
        self._spawn("munged", "--foreground", "--force", *paths)
        wait_for(lambda: (f / "munge.socket").exists(), 20, "munged's socket", self.logs)
        self._spawn("slurmctld", "-D", "-i", "-f", f"{f}/slurm.conf")
        for number in range(1, NODES + 1):
            self._spawn("slurmd", "-D", "-f", f"{f}/slurm.conf", "-N", f"n{number}")
        wait_for(lambda: self.idle() == NODES, 60, "the nodes to become idle", self.logs)

    def start_sshd(self) -> tuple[int, Path] | None:
        """A login node's sshd on a port of the loopback; the port and a private key, None without the program."""
        f, (port,) = self.folder, free_ports(1)
        if find("sshd") is None or shutil.which("ssh-keygen") is None:
            return None
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(f / name)], check=True)
        Path("/run/sshd").mkdir(exist_ok=True)
        settings = [f"Port {port}", "ListenAddress 127.0.0.1", f"HostKey {f}/host", f"AuthorizedKeysFile {f}/user.pub"]
        settings += ["StrictModes no", "UsePAM no", f"PidFile {f}/sshd.pid", f"SetEnv SLURM_CONF={f}/slurm.conf"]
        settings += ["Subsystem sftp internal-sftp"]
        (f / "sshd_config").write_text("\n".join(settings) + "\n")
        self._spawn("sshd", "-D", "-e", "-f", f"{f}/sshd_config")
        wait_for(lambda: not _free(port), 20, "sshd", self.logs)
        return port, f / "user"

    def idle(self) -> int:
        done = self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False)
        return done.stdout.split().count("idle")

    def _spawn(self, name: str, *arguments: str) -> None:
        program = find(name)
        assert program is not None
        log = open(self.folder / f"{name}-{len(self.processes)}.log", "wb")  # noqa: SIM115 - the process keeps it
        self.processes.append(subprocess.Popen([program, *arguments], stdout=log, stderr=log, env=self.env))
        log.close()

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs one of Slurm's commands, or any other, against this cluster."""
        return subprocess.run(command, capture_output=True, text=True, env=self.env, check=check)

    def state(self, job: str | int) -> str:
        """Such as PENDING, RUNNING, COMPLETED; "" when the job is unknown."""
        done = self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T", check=False)
        return done.stdout.strip()

    def logs(self) -> str:
        """The daemons' last lines, for the message of a test that waits in vain."""
        texts = [(p.name, p.read_text(errors="replace")[-1500:]) for p in sorted(self.folder.glob("*.log"))]
        return "\n".join(f"--- {name}\n{text}" for name, text in texts)

    def stop(self) -> None:
        """Cancels what runs, ends the daemons in reverse order."""
        self.run("scancel", "--full", "--signal=KILL", "--state=RUNNING", check=False)
        self.run("scancel", "--user=root", check=False)
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(met: Callable[[], Any], seconds: float, what: str, explain: Callable[[], str] = str) -> Any:
    """Polls until `met()` is true and returns its value.

    Raises:
        AssertionError: it is not after `seconds`; with the text of `explain`.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = met()
        if value:
            return value
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds:.0f} s in vain for {what}\n{explain()}")


def build_plugin(folder: Path) -> Path | None:
    """The SPANK plugin of container_flags.c, compiled; None without a compiler or Slurm's headers."""
    header, compiler = Path("/usr/include/slurm/spank.h"), shutil.which("gcc")
    if compiler is None or not header.is_file():
        return None
    source, target = Path(__file__).with_name("container_flags.c"), folder / "container_flags.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(target), str(source)], check=True)
    return target


def task_process(job: str, rank: int) -> int | None:
    """Process id of a job's task on this machine; None while there is none."""
    wanted = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}"}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = set((folder / "environ").read_text(errors="replace").split("\0"))
            words = (folder / "cmdline").read_text(errors="replace").split("\0")
        except OSError:
            continue
        is_step = any(v.startswith("SLURM_STEP_ID=") and len(v) < 20 for v in variables)
        if wanted <= variables and is_step and "--config" in words:
            return int(folder.name)
    return None


def _free(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) != 0


def free_ports(count: int) -> list[int]:
    """`count` consecutive ports that nothing listens on."""
    for first in range(17001, 60000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for number, s in enumerate(sockets):
                s.bind(("127.0.0.1", first + number))
            return list(range(first, first + count))
        except OSError:
            continue
        finally:
            for s in sockets:
                s.close()
    raise AssertionError("no free ports")
