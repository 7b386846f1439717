"""A second call of `molmo2 prepare`: its time and memory by the number of records, against preparing all anew.

    python -m benchmarks.second_call [--repeats 3] [--records 20000] [--out benchmarks/results/second_call-DATE.json]

Every record has a small picture of its own (a file each, made of random pixels) and a question. In processes of their
own, one after the other, with no worker processes:

first       prepare the data set; the alternative to a second call, as `--overwrite` does it
nothing     call again: nothing has changed
one more    call again after one line was appended

once with a tenth of the records, once with all of them. Figures: milliseconds of processor time a record, peak resident
memory in MiB, bytes of the file that remembers media a record. Medians over repeats.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.report import machine, write_result
from data_prep.ledger import LEDGER
from data_prep.prepare import Options, prepare_own

SHARE = 10


def make_raw(folder: Path, records: int) -> None:
    """A picture for each record, and one more."""
    generator = np.random.default_rng(0)
    for n in range(records + 1):
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "PNG")
        (folder / f"{n:07d}.png").write_bytes(content.getvalue())


def write_rows(path: Path, records: int) -> None:
    lines = ({"image": f"{n:07d}.png", "question": f"What is {n}?", "answer": "Noise."} for n in range(records))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def call(path: Path, out: Path) -> None:
    """In a process of its own: prepare, and print what it took."""
    start = time.process_time()
    summary = prepare_own(path, out, Options(cache=out.parent / "cache"))
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mib": peak, "records": summary.head["records"]}))


def measured(path: Path, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.second_call", "--call", str(path), str(out)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))


def one_size(folder: Path, records: int, repeat: int) -> dict[str, Any]:
    """The three calls on a data set of that size."""
    path, out = folder / "rows.jsonl", folder / f"out-{records}-{repeat}" / "rows"
    write_rows(path, records)
    found = {"first": measured(path, out), "nothing": measured(path, out)}
    size = (out / LEDGER).stat().st_size
    write_rows(path, records + 1)
    found["one more"] = measured(path, out)
    assert [f["records"] for f in found.values()] == [records, records, records + 1]
    figures = {
        name: {"ms_a_record": 1e3 * f["seconds"] / records, "peak_mib": f["peak_mib"]} for name, f in found.items()
    }
    return figures | {"ledger_bytes_a_record": size / records}


def median(results: list[Any]) -> Any:
    """The medians of equal structures of numbers."""
    if isinstance(results[0], dict):
        return {name: median([result[name] for result in results]) for name in results[0]}
    return round(statistics.median(results), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--call", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.call:
        call(*args.call)
        return
    about = machine()
    sizes = (args.records // SHARE, args.records)
    with tempfile.TemporaryDirectory() as scratch:
        make_raw(Path(scratch), args.records)
        runs = {n: [one_size(Path(scratch), n, repeat) for repeat in range(args.repeats)] for n in sizes}
    result = {str(n): median(found) for n, found in runs.items()}
    print(json.dumps(result, indent=1))
    write_result("second_call", {"machine": about, "repeats": args.repeats, "records": result}, args.out)


if __name__ == "__main__":
    main()
