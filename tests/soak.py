"""Runs that are disturbed at random, against one that is not: `python -m tests.soak --minutes 60 --seed 1`.

A run of the tiny recipe is killed (all of its processes at once, or one), stopped by a signal, denied room on its disk,
and has checkpoints damaged, in an order that is drawn from the seed; every attempt resumes under a layout that is
drawn, too. When it is finished, every step is compared with that of a run of one process that nobody touched: the
tokens and crops are the same, loss and gradient norms equal to the last bit where all attempts had its layout, else
within 0.01 %, as layouts differ by rounding. Every attempt must end with the exit code and the words that its event
asks for, without a traceback of Python, and leave no process behind. Then the next run begins, until the time is up.
Ends with 1 if something was wrong; the folders of runs with faults are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo2_nemo.rundir import checkpoint_manifest

STEPS = 10
SAVE_EVERY = 2
TRACED = ("loss", "grad_norm_vit", "grad_norm_connector", "grad_norm_llm")
EXACT = ("tokens", "crops")  # of a step: what is trained does not depend on the layout
LAYOUTS = ("single", "tp2sp", "cp2", "pp2")  # one replica each: the same packs
WITHIN = 1e-4  # of the reference, where layouts changed
LIMITS = (30_000, 500_000, 5_000_000)  # bytes that a file may have on a full disk; a checkpoint has files of 19 MB
PATIENCE = 1800.0  # seconds that an attempt may take
LEAVE = 60.0  # seconds after an attempt until its last process must be gone
LATER = 2.0  # seconds after a step's line in the log in which it is killed: in the save, or in the next step


MARK = "unfinished mark"  # what a kill while saving leaves; such a checkpoint is passed over without a word
DAMAGES = ("changed byte", "cut file", "missing file", "no manifest", MARK)


@dataclass(frozen=True)
class End:
    """How an attempt is made to end."""

    weight: int  # how often it is drawn
    codes: tuple[int, ...]
    words: str = ""  # in what it says, unless it ended with 0


ENDS = {
    "undisturbed": End(2, (0,)),
    "kill of all": End(4, (-signal.SIGKILL,)),
    "kill of one": End(3, (128 + signal.SIGKILL,), "was ended by SIGKILL"),
    "signal": End(3, (75,), "stopped by a signal"),
    "full disk": End(3, (2,), "could not be written"),
}


@dataclass(frozen=True)
class Attempt:
    """One call of molmo2 train."""

    name: str  # of the run
    layout: str
    end: str = "undisturbed"
    at: int = 0  # step after which it is killed or sent a signal
    later: float = 0.0  # seconds after that
    limit: int = 0  # bytes of a file, where the disk is full
    victim: float = 0.0  # of the ranks, where one is killed: a number below 1


class Soak:
    """One undisturbed run and any number of disturbed ones.

    Args:
        folder: that they work in.
        data: shards of the demo's stage sft.
        until: `time.monotonic()` after which nothing is disturbed any more.
    """

    def __init__(self, folder: Path, data: Path, seed: int, until: float) -> None:
        self.folder, self.data, self.random, self.until = folder, data, random.Random(seed), until
        self.ends: Counter[str] = Counter()
        self.damages: Counter[str] = Counter()
        self.layouts: Counter[str] = Counter()
        self.runs = self.compared = self.equal = self.attempts = self.again = 0
        self.worst = 0.0
        self.spoiled = False  # a checkpoint of the run at work
        self.wrong: list[str] = []
        self.reference: dict[int, dict[str, Any]] = {}

    def refer(self) -> None:
        """The undisturbed run."""
        code, said = self.attempt(Attempt("whole", "single"))
        if code != 0:
            raise SystemExit(f"the undisturbed run ended with {code}:\n{said}")
        self.reference = self.figures("whole")

    def disturb(self, name: str) -> bool:
        """One run to its end, and the comparison; whether all was well."""
        before, layouts, self.spoiled = len(self.wrong), set(), False
        while len(self.wrong) == before and not (self.folder / name / "sft" / "summary.json").is_file():
            damage = self.random.choice(DAMAGES) if self.random.random() < 0.4 else ""
            attempt = self.draw(name)
            layouts.add(attempt.layout)
            damaged = self.damage(name, damage) if damage else ""
            code, said = self.attempt(attempt)
            what = attempt.end + (f" at {attempt.at} + {attempt.later:.1f} s" if attempt.at else "")
            print(f"{name}: {damaged or 'as it was'}; {attempt.layout}, {what}: {code}", flush=True)
            self.judge(attempt, damaged, code, said)
        if len(self.wrong) == before:
            self.runs += 1
            self.compare(name, layouts == {"single"})
        return len(self.wrong) == before

    def draw(self, name: str) -> Attempt:
        """What comes next."""
        whole = checkpoint_manifest.newest_whole(self.checkpoints(name))
        done = 0 if whole is None else checkpoint_manifest.step_of(whole)
        end = self.random.choices(list(ENDS), [end.weight for end in ENDS.values()])[0]
        layout, victim = self.random.choice(LAYOUTS), self.random.random()
        at, later = self.random.randrange(1, STEPS + 1), LATER * self.random.random()
        limit = self.random.choice(LIMITS)
        if time.monotonic() > self.until:
            end = "undisturbed"
        if end == "full disk":
            return Attempt(name, layout, end, limit=limit)
        if end == "undisturbed" or done >= STEPS:
            return Attempt(name, layout)
        return Attempt(name, layout, end, max(at, done + 1), later, victim=victim)

    def judge(self, attempt: Attempt, damaged: str, code: int, said: str) -> None:
        """Whether an attempt ended as it should have."""
        self.ends[attempt.end] += 1
        self.layouts[attempt.layout] += 1
        end, checkpoints = ENDS[attempt.end], self.checkpoints(attempt.name)
        fault = ""
        if code == 2 and "is whole (" in said and "Remove the folder" in said:
            if not self.spoiled:
                fault = "says that every checkpoint is damaged, and none is"
            self.again += 1
            self.spoiled = False
            shutil.rmtree(checkpoints)  # as the message says
        elif code == 0:  # finished before it could be disturbed: by its log, or there was nothing left to do
            if not (checkpoints.parent / "summary.json").is_file():
                fault = "ended with 0, but is not finished"
        elif code not in end.codes:
            fault = f"exit code {code}"
        elif end.words not in said:
            fault = f"does not say {end.words!r}"
        if "Traceback (most recent call last)" in said:
            fault = fault or "a traceback"
        noticed = "going back to the one before" in said or not damaged or damaged.startswith(MARK)
        if code == 0 and not noticed:
            fault = fault or "does not say that a checkpoint is damaged"
        if left := self.left(attempt.name):
            fault = fault or f"left processes behind: {left}"
        if fault:
            self.wrong.append(f"{attempt} after {damaged or 'nothing'}: {fault}; it said:\n{said[-3000:]}")

    def attempt(self, attempt: Attempt) -> tuple[int, str]:
        """Its exit code and what it said."""
        self.attempts += 1
        words = ["recipe=tiny", "stage=sft", f"parallel={attempt.layout}", f"data.sources.demo.path={self.data}"]
        words += [f"output_dir={self.folder / attempt.name}", f"stage.max_steps={STEPS}", f"save_every={SAVE_EVERY}"]
        words += ["stage.global_batch_size=2", "stage.micro_batch_size=1", "log.tensorboard=false"]
        log = self.folder / f"{attempt.name}.log"
        with log.open("w+") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "molmo2_nemo.cli.main", "train", *words],
                start_new_session=True,
                stdout=out,
                stderr=subprocess.STDOUT,
                preexec_fn=(lambda: fill_disk(attempt.limit)) if attempt.limit else None,
            )
            if attempt.at:
                self.strike(process, attempt)
            self.wait(process, lambda: False)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            out.seek(0)
            return process.returncode, out.read()

    def strike(self, process: subprocess.Popen[bytes], attempt: Attempt) -> None:
        """Kill it, or send it a signal, when it has done the step."""
        begun = self.began(attempt.name)
        self.wait(process, lambda: self.began(attempt.name) != begun and attempt.at in self.figures(attempt.name))
        later = time.monotonic() + attempt.later
        self.wait(process, lambda: time.monotonic() > later)
        if process.poll() is not None:
            return
        if attempt.end == "kill of all":
            os.killpg(process.pid, signal.SIGKILL)
        elif attempt.end == "signal":
            process.send_signal(signal.SIGTERM)
        elif ranks := [pid for pid in below(process.pid) if is_rank(pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(sorted(ranks)[int(attempt.victim * len(ranks))], signal.SIGKILL)

    def began(self, name: str) -> float:
        """When the last attempt wrote down that it begins; 0 before the first."""
        path = self.folder / name / "sft" / "attempt.json"
        return path.stat().st_mtime if path.is_file() else 0.0

    def wait(self, process: subprocess.Popen[bytes], until: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and process.poll() is None and not until():
            time.sleep(0.02)

    def left(self, name: str) -> list[str]:
        """Processes of a run that go on after it has ended."""
        end = time.monotonic() + LEAVE
        while found := [pid for pid in processes() if str(self.folder / name / "sft").encode() in command(pid)]:
            if time.monotonic() > end:
                return [f"{pid}: {command(pid)!r}" for pid in found]
            time.sleep(0.1)
        return []

    def checkpoints(self, name: str) -> Path:
        return self.folder / name / "sft" / "checkpoints"

    def damage(self, name: str, how: str) -> str:
        """Spoil the newest whole checkpoint; what was done, "" where there is none."""
        whole = checkpoint_manifest.newest_whole(self.checkpoints(name))
        if whole is None:
            return ""
        file = self.random.choice(sorted(path for path in (whole / "weights").iterdir() if path.stat().st_size))
        if how == "no manifest":
            (whole / checkpoint_manifest.MANIFEST).unlink()
        elif how == MARK:
            whole.with_name(whole.name + checkpoint_manifest.UNFINISHED).touch()
        elif how == "missing file":
            file.unlink()
        elif how == "cut file":
            os.truncate(file, self.random.randrange(file.stat().st_size))
        else:
            data = bytearray(file.read_bytes())
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
            file.write_bytes(data)
        self.damages[how] += 1
        self.spoiled = True
        where = "" if how in ("no manifest", MARK) else f" {file.name}"
        return f"{how}{where} of {whole.name}"

    def figures(self, name: str) -> dict[int, dict[str, Any]]:
        """Step -> its line of the log, as far as the run has come; a line that is being written does not count."""
        path, found = self.folder / name / "sft" / "metrics.jsonl", {}
        for text in path.read_text().splitlines() if path.is_file() else []:
            with contextlib.suppress(json.JSONDecodeError):
                line = json.loads(text)
                found[line["step"]] = line
        return found

    def compare(self, name: str, exact: bool) -> None:
        """Every step of a finished run with the undisturbed one's."""
        found = self.figures(name)
        if sorted(found) != sorted(self.reference):
            self.wrong.append(f"{name}: has the steps {sorted(found)}")
        for step in sorted(set(found) & set(self.reference)):
            self.compared += 1
            seen, expected = found[step], self.reference[step]
            pairs = [(seen[key] or 0.0, expected[key] or 0.0) for key in TRACED]
            apart = max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)
            self.equal += apart == 0
            self.worst = max(self.worst, apart)
            same = all(seen[key] == expected[key] for key in EXACT)
            if not same or apart > (0 if exact else WITHIN):
                self.wrong.append(f"{name}, step {step}: {seen}, expected {expected}")

    def summary(self) -> dict[str, Any]:
        """All figures."""
        return {
            "runs": self.runs,
            "attempts": self.attempts,
            "ends": dict(self.ends),
            "damages": dict(self.damages),
            "started_again": self.again,
            "layouts": dict(self.layouts),
            "steps_compared": self.compared,
            "equal_to_the_last_bit": self.equal,
            "largest_relative_difference": self.worst,
            "wrong": len(self.wrong),
        }

    def words(self) -> str:
        """The same as a line."""
        counts = [", ".join(f"{n} {what}" for what, n in sorted(c.items())) for c in (self.ends, self.damages)]
        return (
            f"{self.attempts} attempts ({counts[0]}; damage: {counts[1] or 'none'}); {self.compared} steps compared, "
            f"{self.equal} equal to the last bit, largest difference {self.worst:.1e}; {len(self.wrong)} wrong"
        )


def fill_disk(limit: int) -> None:
    """In a process that begins: no file may grow beyond `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def processes() -> list[int]:
    """All but this one."""
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and int(p.name) != os.getpid()]


def command(pid: int) -> bytes:
    """Its command line; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def below(pid: int) -> list[int]:
    """Every process that `pid` has started, and those that they have."""
    return [each for child in processes() if parent(child) == pid for each in (child, *below(child))]


def is_rank(pid: int) -> bool:
    """Whether it trains: neither the launcher, which has the worker's name among its words, nor what a rank forks to
    read its data, whose words are the rank's."""

    def worker(words: bytes) -> bool:
        return b"launch.worker" in words and b"launch.elastic" not in words

    return worker(command(pid)) and not worker(command(parent(pid)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="nothing is disturbed after them (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")
    parser.add_argument("--dir", type=Path, help="folder to work in, which is kept (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures, written after every run")
    args = parser.parse_args()
    from tests.support.shards import RUN, demo_shards

    folder = args.dir or Path(tempfile.mkdtemp(prefix="molmo2-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault(RUN, str(folder))
    began = time.monotonic()
    soak = Soak(folder.resolve(), demo_shards() / "sft", args.seed, began + 60 * args.minutes)
    soak.refer()
    number = 0
    while time.monotonic() < soak.until:
        number += 1
        if soak.disturb(f"run{number}"):
            shutil.rmtree(folder / f"run{number}")
        minutes = (time.monotonic() - began) / 60
        print(f"seed {args.seed}, {minutes:.0f} min, run {number}: {soak.words()}", flush=True)
        if args.out is not None:
            figures = {"seed": args.seed, "minutes": round(minutes, 1), "steps_of_a_run": STEPS, **soak.summary()}
            args.out.write_text(json.dumps(figures, indent=1) + "\n")
    for fault in soak.wrong:
        print(fault)
    if soak.wrong:
        print(f"the runs are in {folder}")
    elif args.dir is None:
        shutil.rmtree(folder)
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
