"""A prepared run on a GPU: its parts in the order of their value, within 590 seconds, and one page of results.

    python -m benchmarks.gpu.run                    all parts, in this project's environment (make gpu-check)
    python -m benchmarks.gpu.run train_sft probe    these parts, in their own order
    python -m benchmarks.gpu.run --list             what there is
    python -m benchmarks.gpu.run --tiny             the same at small sizes on a CPU; what needs a card is skipped

Every part is a process with its own time limit and log; one that fails leaves the others alone. --out gets at most
eight files: page.md (what passed, figures beside their targets), results.json, logs.txt, the profiles' traces. They are
written anew after every part, so that a run that is cut off leaves what it had. Exit code: 1 where a part failed, or
one asked for by name was not begun; 2 where torch sees no card: that is looked at first, and then nothing is begun.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.page import HEADING, page
from benchmarks.gpu.parts import NAMES, ON_CPU, PARTS, SECONDS, Budget, Part, chosen
from benchmarks.report import COMMIT, commit

ROOT = Path(__file__).parents[2]
FILES = 8  # most that may come back from a machine
TRACE_BYTES = 15 * 2**20  # of a trace, packed; larger ones stay behind
LOG_BYTES = 500_000  # kept of a part's log: its end
SETTINGS = {  # environment variables of every part, where they are not set otherwise
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "USE_TF": "0",
    "USE_FLAX": "0",
    "USE_JAX": "0",
    "MPLBACKEND": "Agg",
    "NEMO_LOG_MEMORY_USAGE": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "CUDA_DEVICE_MAX_CONNECTIONS": "8",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}


@dataclass
class Result:
    """What became of a part."""

    name: str
    state: str  # passed, failed, stopped, skipped, not run
    seconds: float = 0.0
    why: str = ""  # where it did not pass: the reason; where it did, its last line
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """A run at work."""

    out: Path
    work: Path
    data: Path
    tiny: bool
    budget: Budget
    clock: Callable[[], float]  # seconds since the run began
    results: list[Result] = field(default_factory=list)
    child: subprocess.Popen | None = None

    def all(self, parts: Sequence[Part]) -> None:
        for part in parts:
            self.budget.used = begin = self.clock()
            try:
                result = self.one(part)
            except (KeyboardInterrupt, SystemExit):
                self.results.append(Result(part.name, "stopped", self.clock() - begin, "by a signal to the whole run"))
                raise
            self.results.append(result)
            print(f"[{self.clock():4.0f} s] {part.name}: {result.state}  {result.why[:150]}", flush=True)
            self.save()

    def one(self, part: Part) -> Result:
        """Runs a part, or says why not."""
        if (why := part.missing()) is not None:
            return Result(part.name, "skipped", why=why)
        if self.tiny and part.tiny is None:
            return Result(part.name, "skipped", why="needs a card")
        limit = self.budget.limit(part)
        if isinstance(limit, str):
            return Result(part.name, "not run", why=limit)
        return self.started(part, limit)

    def started(self, part: Part, limit: float) -> Result:
        words = (part.tiny if self.tiny else part.command) or ()
        command = [sys.executable, *(w.format(work=self.work, data=self.data) for w in words)]
        begin, log = time.monotonic(), self.work / f"{part.name}.log"
        with log.open("w") as file:
            self.child = subprocess.Popen(
                command, cwd=ROOT, env=self.variables(), stdout=file, stderr=file, start_new_session=True
            )
            try:
                code: int | None = self.child.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            self.end_child()
        seconds = time.monotonic() - begin
        data = read_json(self.work / f"{part.name}.json")
        if code is None:
            return Result(part.name, "stopped", seconds, f"after {limit:.0f} s; {last_line(log)}", data)
        if code:
            return Result(part.name, "failed", seconds, f"exit code {code}; {last_line(log)}", data)
        said = last_line(log)
        nothing = re.fullmatch(r"\d+ skipped in .*", said)  # pytest's words where no test could run
        return Result(part.name, "skipped" if nothing else "passed", seconds, said, data)

    def variables(self) -> dict[str, str]:
        caches = {"TORCHINDUCTOR_CACHE_DIR": self.work / "inductor", "TRITON_CACHE_DIR": self.work / "triton"}
        return {**SETTINGS, **os.environ, **{name: str(path) for name, path in caches.items()}}

    def end_child(self) -> None:
        """Ends the part that is at work, with all that it started."""
        if self.child is None:
            return
        for number, wait in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0)):
            try:
                os.killpg(self.child.pid, number)
                self.child.wait(wait)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        self.child = None

    def save(self) -> None:
        """What there is so far: never more than eight files."""
        named = [asdict(result) for result in self.results]
        head = {"commit": commit(), "tiny": self.tiny, "seconds": self.clock(), "parts": named}
        (self.out / "results.json").write_text(json.dumps(head, indent=1) + "\n")
        (self.out / "page.md").write_text(page(head, {p.name: p.title for p in PARTS}))
        logs = [(r.name, self.work / f"{r.name}.log") for r in self.results]
        joined = "".join(f"===== {name}\n{end_of(log)}\n" for name, log in logs if log.is_file())
        (self.out / "logs.txt").write_text(joined)
        self.keep_traces()

    def keep_traces(self) -> None:
        """The profiles' traces, packed, as far as they fit into the number and size of files that come back."""
        for trace in sorted(self.work.rglob("*.trace.json.gz"))[: FILES - 3]:
            kept = self.out / f"{trace.parent.name}.{trace.name}"
            if trace.stat().st_size <= TRACE_BYTES:
                shutil.copy(trace, kept)
            else:
                print(f"{kept.name}: over {TRACE_BYTES >> 20} MiB, stays behind", flush=True)
                trace.unlink()


def without_card() -> str | None:
    """Why nothing is begun: what this Python's torch says, asked in a process of its own; None where it sees a card."""
    code = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    tiny = "--tiny runs the parts at small sizes on the CPU"
    try:
        asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return f"no answer from torch in 120 s whether there is a card; a driver that hangs? {tiny}"
    if asked.returncode:
        why = (asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"])[-1]
        return f"{sys.executable} cannot ask torch for a card: {why}"
    version, cuda, there = asked.stdout.split()[-3:]
    if there == "True":
        return None
    reason = "is a build without CUDA" if cuda == "None" else f"(for CUDA {cuda}) sees no device"
    return f"no card: torch {version} of {sys.executable} {reason}; nothing was begun. {tiny}"


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def end_of(log: Path, most: int = LOG_BYTES) -> str:
    text = log.read_bytes()
    cut = f"... {len(text) - most} bytes cut\n" if len(text) > most else ""
    return cut + text[-most:].decode(errors="replace")


def last_line(log: Path) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in end_of(log, 20_000).splitlines() if line.strip("=-─━ \t")]
    return lines[-1] if lines else "it said nothing"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.run", description=__doc__, formatter_class=form)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(NAMES))
    parser.add_argument("--list", action="store_true", help="name the parts and end")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for the results")
    parser.add_argument(
        "--data", type=Path, help="folder with shards in pretrain/; default: made from the demo's images"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    parser.add_argument("--begun", type=float, help="seconds since 1970 when the command began; default: now")
    parser.add_argument("--kit", type=Path, help="the kit that this runs from, for its commit")
    args = parser.parse_args(argv)
    if not 0 < args.seconds < math.inf:
        parser.error(f"--seconds {args.seconds:g}: expected seconds above 0")
    try:
        args.chosen = chosen(args.parts)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if args.list:
        for part in PARTS:
            print(f"{part.name:12} {part.expected:4} s, at most {part.limit:4}  {part.title}")
        total = sum(part.expected for part in PARTS)
        print(f"together {total} s by estimate; a run has {args.seconds:g} s, so that the last may not fit")
        return 0
    if args.kit:
        os.environ[COMMIT] = read_json(args.kit / "manifest.json").get("commit", "unknown")
    begun = args.begun or time.time()
    if not args.tiny and (refusal := without_card()) is not None:
        print(refusal, file=sys.stderr)
        return 2
    try:
        prepare_out(args.out)
    except OSError as error:
        print(f"--out {args.out}: no folder for results: {error.strerror or error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="molmo2-gpu-", ignore_cleanup_errors=True) as scratch:
        data = args.data or demo_shards(Path(scratch) / "data")
        run = Run(
            args.out.absolute(),
            Path(scratch),
            data.absolute(),
            args.tiny,
            Budget(args.seconds, patience=ON_CPU if args.tiny else 1.0),
            lambda: time.time() - begun,
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit("ended by a signal"))
        try:
            run.all(args.chosen)
        finally:
            run.end_child()
            run.save()
    print(f"{args.out / 'page.md'}\n")
    print((args.out / "page.md").read_text())
    bad = ("failed", "stopped", "not run") if args.parts else ("failed", "stopped")
    return int(any(result.state in bad for result in run.results))


def prepare_out(out: Path) -> None:
    """Makes the folder for results; what an earlier run left there may be written over.

    Raises:
        OSError: it cannot be written, or has a page.md of another kind.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "page.md"
    if path.exists() and path.stat().st_size and not path.read_text(errors="replace").startswith(HEADING):
        raise FileExistsError("page.md is there, and is not a page of these checks")
    path.touch()


def demo_shards(folder: Path) -> Path:
    from data_prep.demo import build_demo

    build_demo(folder)
    return folder


if __name__ == "__main__":
    sys.exit(main())
