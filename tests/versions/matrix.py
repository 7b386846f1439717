"""`make test-matrix`: the tests of STACK_TESTS under every stack, then runs that change from one stack to another.

    python -m tests.versions.matrix [--out FOLDER] [--only TEXT] [--without-tests] [--tests FILE ...]

Prints a line when a part is done, and the tables of docs/install.md at the end; they stay in FOLDER with every log.
Exit code 1 if anything failed. Environments are kept in .venv-matrix (10 GB with all of torch's versions).
"""

from __future__ import annotations

import argparse
import datetime
import re
import shutil
import sys
import time
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path

from tests.versions import across
from tests.versions.stacks import ROOT, Installed, Stack, install

STACKS = (
    Stack("3.11", core="0.16.1", torch="2.13.0", numpy="1.26.4"),
    Stack("3.12", core="0.16.1", torch="2.13.0", numpy="1.26.4"),
    Stack("3.12", core="0.17.1", torch="2.13.0", numpy="2.4.6"),
    Stack("3.12", core="0.18.2", torch="2.13.0", numpy="2.4.6"),
    Stack("3.12", core="0.19.2", torch="2.13.0", numpy="2.4.6"),
    Stack("3.12", core="0.16.1", torch="2.6.0", numpy="1.26.4"),
    Stack("3.12", core="0.19.2", torch="2.11.0", numpy="2.4.6"),
    Stack("3.12", core="0.19.2", torch="2.15.0", numpy="2.4.6"),
)
EQUAL = 1e-6  # largest relative difference between two curves that count as one
TORCH = STACKS[0].torch
MARK = ".made-by-test-matrix"


@dataclass
class Result:
    """What came of one stack."""

    installed: Installed
    tests: str = "-"
    curves: dict[str, float | str] = field(default_factory=dict)  # layout -> difference from the first stack's
    export: str = "-"
    good: bool = True

    @property
    def stack(self) -> Stack:
        return self.installed.stack


def run_tests(result: Result, files: list[str], log: Path) -> None:
    """pytest on two processes, and its closing line."""
    words = ["-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", *files]
    code = result.installed.run(*words, log=log)
    last = log.read_text().strip().splitlines()[-1]
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", last)
    result.tests, result.good = ", ".join(counts) or last[:60], result.good and code == 0


def run_curves(result: Result, first: Path, data: Path, folder: Path) -> None:
    """20 steps in every layout, against those of the first stack."""
    for layout in across.LAYOUTS:
        wrong = across.train(result.installed, layout, data, folder / layout)
        result.curves[layout] = wrong or across.compare(first / layout, folder / layout)
        if layout == across.PLAIN or result.stack.torch == TORCH:  # another torch may draw other masks
            result.good &= isinstance(result.curves[layout], float) and float(result.curves[layout]) <= EQUAL


def run_export(result: Result, first: Installed, folder: Path) -> None:
    """The weights of this stack's model, exported by it and by the first stack: the same bytes?"""
    begun = folder / "single"
    ours, theirs = (across.export(i, begun, folder / f"hf-{n}") for n, i in enumerate((result.installed, first)))
    same = isinstance(ours, bytes) and ours == theirs
    result.export, result.good = "same bytes" if same else f"{ours!r:.60}", result.good and same


def run_resumes(results: list[Result], data: Path, folder: Path) -> dict[tuple[str, str], float | str]:
    """From each Megatron-core to each other, on the Python that all of them run on."""
    per_core = {r.stack.core: r for r in results if r.stack.python != "3.11" and r.stack.torch == TORCH}
    found = {}
    for one, other in permutations(per_core, 2):
        begun = folder / f"{results.index(per_core[one])}" / across.RESUMED
        found[one, other] = across.resume(per_core[other].installed, begun, data, folder / f"{one}-{other}")
        say(f"{one} resumed by {other}: {shown(found[one, other])}")
    return found


def shown(value: float | str) -> str:
    """A difference as people read it."""
    if isinstance(value, str):
        return value
    return "equal" if value == 0 else f"{value:.0e}"


def tables(results: list[Result], resumes: dict[tuple[str, str], float | str]) -> str:
    """Two tables in Markdown, 80 columns at most."""
    lines = ["| Python | core | torch | numpy | tests | 20 steps | export |", "|---|---|---|---|---|---|---|"]
    for r in results:
        s, curves = r.stack, ", ".join(dict.fromkeys(map(shown, r.curves.values()))) or "-"
        lines.append(f"| {s.python} | {s.core} | {s.torch} | {s.numpy} | {r.tests} | {curves} | {r.export} |")
    cores = list(dict.fromkeys(one for one, _ in resumes))
    lines += ["", f"| begun \\ resumed by | {' | '.join(cores)} |", "|---" * (len(cores) + 1) + "|"]
    for one in cores:
        row = [shown(resumes[one, other]) if one != other else "" for other in cores]
        lines.append(f"| {one} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:5.0f} s] {text}", flush=True)


START = time.monotonic()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "matrix", help="logs, runs and tables")
    parser.add_argument("--only", default="", help="stacks with this in their name")
    parser.add_argument("--tests", nargs="*", default=["tests"], metavar="FILE", help="what pytest is given")
    parser.add_argument("--without-tests", action="store_true", help="only the runs between versions")
    args = parser.parse_args()
    chosen = [stack for stack in STACKS if args.only in str(stack)]
    if not chosen:
        parser.error(f"--only {args.only!r} fits none of: {'; '.join(map(str, STACKS))}")
    if args.out.exists() and not (args.out / MARK).exists():
        parser.error(f"--out {args.out} exists, and no matrix was made there; name another folder")
    shutil.rmtree(args.out, ignore_errors=True)
    data = args.out / "data"
    data.mkdir(parents=True)
    (args.out / MARK).touch()
    from data_prep.demo import build_demo

    build_demo(data)
    results: list[Result] = []
    for number, stack in enumerate(chosen):
        result = Result(install(stack, ROOT / ".venv-matrix"))
        results.append(result)
        folder = args.out / f"{number}"
        run_curves(result, args.out / "0", data, folder)
        run_export(result, results[0].installed, folder)
        say(f"{stack}: 20 steps {', '.join(map(shown, result.curves.values()))}; export {result.export}")
        if not args.without_tests:
            run_tests(result, args.tests, folder / "tests.txt")
            say(f"{stack}: {result.tests}")
    resumes = run_resumes(results, data, args.out)
    text = tables(results, resumes)
    (args.out / "tables.md").write_text(f"{datetime.date.today()}\n\n{text}")
    print(text)
    good = all(r.good for r in results) and all(isinstance(v, float) and v <= EQUAL for v in resumes.values())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
