"""Ends a run that hangs, and says which rank the others wait for.

A thread in every process looks at where its rank is (whereabouts.py). Nothing is written while there is progress, but
for one small file of each rank at the start. A rank without progress for half the time that it may take writes down
where it is; after all of it, and when all others are without progress too, every rank writes the stacks of its
threads, what it holds, and NCCL's record of its last collectives, and the processes end. The rank that did not come
reports the error (hang_cause.py).

Time counts only while this process runs and nobody of the run is held up on purpose: what passes while a process is
stopped (SIGSTOP, a machine that sleeps) is one look of the thread, whatever the clock says, and while any process of
the run on any machine is stopped or in a debugger (pdb, debugpy, gdb), it stands still for all.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from molmo2_nemo.errors import show_error
from molmo2_nemo.files import write_json
from molmo2_nemo.processes import process_start, this_rank
from molmo2_nemo.rundir.paths import HANG
from molmo2_nemo.training.hang_cause import Place, begun_collectives, who_did_not_come
from molmo2_nemo.training.whereabouts import here

SILENT = 3  # times its allowance after which a rank no longer waits for others that write down nothing
COLLECTIVES = 2000  # last ones of each process that NCCL's flight recorder keeps
LOOK = 5.0  # seconds between two looks, with up to 100 ranks; each reads the files of all when there is no progress
LATELY = 3  # looks of its own in which a rank expects another that writes to have looked, too
LEAVE = 20.0  # seconds that ranks wait for each other's stacks at most
DEBUGGERS = re.compile(r"(^|/)(pdb|bdb)\.py$|/(debugpy|pydevd|_pydevd_bundle)/")
WAITING = re.compile(r"/torch/distributed/|training/step_clock\.py$")  # files on the stack of a collective that waits
# files that say nothing of who called torch
BETWEEN = re.compile(r"/torch/|/(contextlib|typing_extensions)\.py$|step_clock\.py$|molmo2_nemo/cpu\.py$")

# Called by the rank that reports, with one line and the stacks; then the process ends.
Report = Callable[[str, str], None]


class Watchdog:
    """The thread of one rank.

    Args:
        limit: faults.hang_seconds.
        folder: of this attempt, the same on all ranks; each rank has a file there, and in a hang its stacks.
        ranks: of the run.
        report: see `Report`.
        leave: ends the process.
    """

    def __init__(
        self,
        limit: float,
        folder: Path,
        rank: int,
        ranks: int,
        report: Report,
        *,
        gpu: int | None = None,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        self.limit, self.folder, self.ranks, self.report, self.leave = limit, folder, ranks, report, leave
        pid = os.getpid()
        self.own = Place(rank, socket.gethostname(), pid, process_start(pid), gpu)
        self.look = min(LOOK * max(1.0, ranks / 100), limit / 20)
        self.main = threading.main_thread().ident
        self._over = threading.Event()
        self._seen: dict[int, tuple[int, int]] = {}  # of other ranks: their last number of looks, and ours when it came
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The run is inside."""
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join(timeout=LEAVE)
            with suppress(OSError):
                self._file(self.own.rank).unlink(missing_ok=True)
                self.folder.rmdir()  # where all have left, and nothing was written
                self.folder.parent.rmdir()

    def _run(self) -> None:
        stuck, moves, last = 0.0, here.moves, time.monotonic()
        while not self._over.wait(self.look):
            now = time.monotonic()
            passed, last = min(now - last, 2 * self.look), now
            self.own.looks += 1
            if here.moves != moves:
                moves, stuck = here.moves, 0.0
                if self.own.stuck:
                    self.own.stuck, self.own.stopped = 0.0, []
                    self._write()
                continue
            allowed = self.limit * here.allowance
            before, self.own.held = self.own.held, self._held()
            if stuck < allowed / 2:
                stuck += 0.0 if self.own.held else passed
                if self.own.held or before:
                    self._write()  # at every look: that is what tells the others that this thread goes on
                continue
            others = self._read()
            self.own.stopped = [place.rank for place in others.values() if self._is_stopped(place)]
            stuck += 0.0 if self._excused(others) else passed
            self.own.stuck = stuck
            self._where()
            self._write()
            if self._all_stuck(others) if stuck >= allowed else any(place.alarm for place in others.values()):
                self._alarm(allowed)
            elif stuck >= SILENT * allowed:
                self._alarm(SILENT * allowed)

    def _excused(self, others: dict[int, Place]) -> bool:
        """Whether somebody is held up on purpose."""
        alive = [place for place in others.values() if self._looks_on(place)]
        return self.own.held or bool(self.own.stopped) or any(place.held or place.stopped for place in alive)

    def _looks_on(self, place: Place) -> bool:
        """Whether the thread of another rank goes on: the number of its looks has changed lately."""
        looks, when = self._seen.get(place.rank, (None, 0))
        if looks != place.looks:
            when = self.own.looks
            self._seen[place.rank] = place.looks, when
        return self.own.looks - when < LATELY

    def _all_stuck(self, others: dict[int, Place]) -> bool:
        return len(others) == self.ranks - 1 and all(place.stuck for place in others.values())

    def _where(self) -> None:
        """Where this rank is, into its own entry."""
        self.own.words, self.own.order = here.words(), here.order
        stack = list(frames(self.main))
        self.own.stack = [(f"{f.f_code.co_filename} {f.f_code.co_name}", f.f_lineno) for f in reversed(stack)]
        with suppress(Exception):  # groups that are made or taken apart meanwhile, or torch that does not count
            self.own.collectives = begun_collectives()
        waits = any(WAITING.search(frame.f_code.co_filename) for frame in stack)
        self.own.waits = waits or here.waits_for_readers
        outside = next((f for f in stack if not BETWEEN.search(f.f_code.co_filename)), None)
        if outside is not None:
            file = "/".join(outside.f_code.co_filename.split("/")[-2:])
            self.own.line = f"{file}:{outside.f_lineno} {outside.f_code.co_name}"

    def _held(self) -> bool:
        """Whether this process is in a debugger."""
        known = [threading.main_thread().ident, *(t.ident for t in threading.enumerate())]
        files = {frame.f_code.co_filename for thread in set(known) for frame in frames(thread)}
        return any(DEBUGGERS.search(file) for file in files) or traced()

    def _is_stopped(self, place: Place) -> bool:
        """Whether a rank of this host is a process that was stopped, or that a debugger holds."""
        if place.host != self.own.host or process_start(place.pid) != place.began:
            return False
        try:
            return Path(f"/proc/{place.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
        except (OSError, IndexError):
            return False

    def _alarm(self, after: float) -> None:
        """Write everything down, wait until the others have, let one report, and leave."""
        stacks = self._write_stacks()
        with suppress(Exception):  # a record that torch cannot give must not keep the run from ending
            self._write_collectives()
        self.own.alarm = True
        self._write()
        end = time.monotonic() + LEAVE
        while True:
            others = self._read()
            if all(p.alarm for p in others.values() if p.stuck) or time.monotonic() > end:
                break
            time.sleep(self.look / 5)
        places = sorted([self.own, *others.values()], key=lambda place: place.rank)
        who, words = who_did_not_come(places, self.ranks)
        there = [place.rank for place in places if place.alarm]
        reporter = next((rank for rank in who if rank in there), there[0])
        if reporter == self.own.rank:
            message = (
                f"no progress for {after:g} s (faults.hang_seconds={self.limit:g}): {words}. The stacks of all ranks, "
                f"and the records that they held, are in {self.folder}"
            )
            with suppress(Exception):  # whatever happens to the report, the run must end
                self.report(message, stacks)
        else:
            time.sleep(min(1.0, self.limit / 4))  # a scheduler that ends the rest must find the report
        self.leave(1)

    def _write_stacks(self) -> str:
        """`rank<N>.txt`: what this rank does and holds, and the stacks of its threads, which are also returned."""
        path = self.folder / f"rank{self.own.rank:05}.txt"
        self._where()
        records = "".join(f"  {key}\n" for key in here.records) or "  none\n"
        head = f"{self.own.name}, process {self.own.pid}: {self.own.at}\nrecords of its micro-batch:\n{records}\n"
        try:
            with path.open("w", encoding="utf-8") as file:
                file.write(head)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            return path.read_text(encoding="utf-8")
        except OSError:  # a full disk or a mount that is gone: perhaps why the run hangs
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            return head

    def _write_collectives(self) -> None:
        """`rank<N>.collectives.json`: the last COLLECTIVES of this process, as NCCL's flight recorder has them. None on
        a CPU, where they are gloo's and the recorder is empty; cpu.py answers for a GPU there."""
        torch = sys.modules.get("torch")
        if self.own.gpu is None or torch is None or not torch.cuda.is_initialized():
            return
        c10d = torch._C._distributed_c10d
        dump = getattr(c10d, "_dump_fr_trace_json", None) or getattr(c10d, "_dump_nccl_trace_json", None)
        if dump is not None:
            text = dump()
            name = f"rank{self.own.rank:05}.collectives.json"
            (self.folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank{rank:05}.json"

    def _write(self) -> None:
        with suppress(OSError):  # what is wrong there, the run itself will meet, or has
            write_json(self._file(self.own.rank), asdict(self.own), indent=None)

    def _read(self) -> dict[int, Place]:
        """The other ranks' files; ones that cannot be read are left out."""
        found: dict[int, Place] = {}
        for rank in range(self.ranks):
            if rank != self.own.rank:
                with suppress(OSError, ValueError, TypeError):
                    place = Place(**json.loads(self._file(rank).read_text(encoding="utf-8")))
                    place.stack = [(function, line) for function, line in place.stack]  # JSON has lists
                    found[rank] = place
        return found


def frames(thread: int | None) -> Iterator[FrameType]:
    """The stack of a thread of this process, the innermost frame first."""
    frame = sys._current_frames().get(thread) if thread is not None else None
    while frame is not None:
        yield frame
        frame = frame.f_back


def traced() -> bool:
    """Whether another process (gdb, strace) holds this one by ptrace; False where Linux's /proc is missing."""
    with suppress(OSError):
        found = re.search(r"^TracerPid:\s*(\d+)", Path("/proc/self/status").read_text(), re.M)
        return found is not None and found[1] != "0"
    return False


_report: Report | None = None  # what `reporting` was told


@contextmanager
def reporting(report: Report) -> Iterator[None]:
    """Inside the block, a hang of this process's run is reported to `report`; else it is printed to stderr."""
    global _report
    before, _report = _report, report
    try:
        yield
    finally:
        _report = before


@contextmanager
def watching(limit: float, stage: Path) -> Iterator[None]:
    """The run inside the block ends when it hangs.

    Args:
        limit: faults.hang_seconds; 0: nothing is watched.
        stage: the stage's folder.
    """
    here.reset()
    if not limit:
        yield
        return
    from molmo2_nemo.cpu import is_cpu_only

    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(COLLECTIVES))  # read when process groups are made
    dog = Watchdog(
        limit,
        attempt_folder(stage),
        this_rank(),
        int(os.environ.get("WORLD_SIZE", "1")),
        _report or (lambda message, stacks: show_error(message)),
        gpu=None if is_cpu_only() else int(os.environ.get("LOCAL_RANK", "0")),
    )
    with dog.running():
        yield


def attempt_folder(stage: Path, environment: Any = os.environ) -> Path:
    """The folder of this attempt, the same on all its ranks, by what their launcher tells them."""
    slurm = [environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")]
    meeting = [environment.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")]
    alone = [str(os.getpid())] if "RANK" not in environment else []
    name = "-".join(part for part in (*slurm, *meeting, *alone) if part)
    return stage / HANG / re.sub(r"[^\w.-]", "_", name)
