"""Settings of Slurm jobs: `cluster.slurm.*`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SshConfig:
    """How to reach the login node from elsewhere. Authentication is ssh's own: an agent or a key."""

    host: str | None = None  # null: this machine is a login node
    user: str | None = None  # default: the user who calls
    port: int | None = None
    identity: str | None = None  # file of a private key


@dataclass
class SlurmConfig:
    """What a job asks of Slurm, and what it runs in. A setting that is null is left to the cluster's own default."""

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    time: str = "04:00:00"  # of one job; a stage that needs longer is requeued and resumes
    gpus_per_node: int | None = None  # default: one per process; 0 asks for none
    cpus_per_task: int | None = None
    mem: str | None = None  # per node, such as 900G; 0 is all of it
    exclusive: bool = False
    options: dict[str, str] = field(default_factory=dict)  # any other option of sbatch, by its long name
    container: str | None = None  # image for pyxis: a registry's reference or a .sqsh file; null: no container
    mounts: list[str] = field(default_factory=list)  # FROM:TO[:ro]; the run's folder and workdir come by themselves
    command: str | None = None  # what starts molmo2; default: this Python here, `molmo2` in a container or over ssh
    workdir: str | None = None  # relative paths are seen from here; default: where the command was called
    setup: list[str] = field(default_factory=list)  # shell lines before the start, such as `module load cuda`
    env: dict[str, str] = field(default_factory=dict)
    grace: int = 300  # seconds before the time limit at which USR1 asks the run to save and leave; 0: never
    requeue: bool = True  # resume by itself after preemption, the time limit or a fault
    retries: int = 2  # how many faults of one job are followed by another try
    ssh: SshConfig = field(default_factory=SshConfig)
