"""The login node, through one of NeMo-Run's tunnels: commands and small files, here or over ssh."""

from __future__ import annotations

import getpass
import shlex
from functools import cached_property
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import UserError
from molmo2_nemo.files import write_text
from molmo2_nemo.settings.slurm import SlurmConfig


class Login:
    """Where sbatch is called. `folder` is the run's folder for jobs on the cluster's file system."""

    def __init__(self, slurm: SlurmConfig, folder: Path) -> None:
        self.ssh, self.folder = slurm.ssh, folder
        self.is_local = self.ssh.host is None
        self.name = "this machine" if self.ssh.host is None else self.ssh.host

    @cached_property
    def tunnel(self) -> Any:
        """NeMo-Run's, made when it is first needed: its library takes seconds to load, which a run that is refused
        for its settings does not wait for."""
        from nemo_run.core.tunnel.client import LocalTunnel, SSHTunnel

        ssh = self.ssh
        if ssh.host is None:
            return LocalTunnel(job_dir=str(self.folder))
        user = ssh.user or getpass.getuser()
        return SSHTunnel(job_dir=str(self.folder), host=ssh.host, user=user, port=ssh.port, identity=ssh.identity)

    def try_run(self, *command: str) -> tuple[int, str, str]:
        """Runs the command there; exit code, standard output, standard error.

        Raises:
            UserError: the login node cannot be reached.
        """
        from paramiko.ssh_exception import SSHException

        line = " ".join(shlex.quote(part) for part in command)
        try:
            done = self.tunnel.run(line, hide=True, warn=True, in_stream=False)
        except SystemExit:  # NeMo-Run's, when the login is refused
            raise UserError(
                f"{self.name} refused the login; make `ssh {self.name}` work, then set cluster.slurm.ssh.*"
            ) from None
        except (OSError, EOFError, SSHException) as error:
            raise UserError(f"cannot reach {self.name}: {error}; see cluster.slurm.ssh.*") from None
        return int(done.return_code), done.stdout, done.stderr

    def run(self, *command: str) -> str:
        """Runs a command that has to succeed; its standard output.

        Raises:
            UserError: the command fails; the message has its output.
        """
        code, out, err = self.try_run(*command)
        if code == 127:
            raise UserError(
                f"{self.name} has no {command[0]}: it is not a login node of a Slurm cluster; run this on one, "
                "name one with cluster.slurm.ssh.host=..., or use cluster=local"
            )
        if code:
            raise UserError(f"{command[0]} on {self.name} failed: {' '.join((err or out).split())}")
        return out

    def path(self, path: str | Path) -> Any:
        """The file or folder there, with the few methods of `pathlib.Path` that reading a run's folder needs."""
        return Path(path) if self.is_local else RemotePath(self, str(path))

    def make_folder(self, path: Path) -> None:
        self.run("mkdir", "-p", str(path))

    def write(self, path: Path, text: str) -> None:
        """Writes a small file, whole or not at all."""
        if self.is_local:
            write_text(path, text)
            return
        part = f"{path}.part"
        self._upload(part, text)
        self.run("mv", part, str(path))

    def _upload(self, path: str, text: str) -> None:
        import io

        from paramiko.ssh_exception import SSHException

        self.run("true")  # connects
        try:
            self.tunnel.session.put(io.StringIO(text), path)
        except (OSError, SSHException) as error:
            raise UserError(f"cannot write {path} on {self.name} (over sftp): {error}") from None

    def close(self) -> None:
        if "tunnel" in self.__dict__:
            self.tunnel.cleanup()


class RemotePath:
    """A path on the login node."""

    def __init__(self, login: Login, path: str) -> None:
        self.login, self.text = login, path

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.login, f"{self.text}/{name}")

    def __str__(self) -> str:
        return self.text

    def is_file(self) -> bool:
        return self.login.try_run("test", "-f", self.text)[0] == 0

    def is_dir(self) -> bool:
        return self.login.try_run("test", "-d", self.text)[0] == 0

    def read_text(self) -> str:
        return self.login.run("cat", self.text)
