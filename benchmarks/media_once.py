"""Media written once per data set against media written with every record: disk, time, and the map's memory.

    python -m benchmarks.media_once [--rounds 5] [--media 1000000] [--out benchmarks/results/media_once-DATE.json]

Photographs of camera sizes as JPEG, and films of 10 seconds at 1280 x 720 (those of `benchmarks.prepare`), prepared by
`prepare_own` in one process, once as by default and once with `repeat_media`, in turn, in rounds:

ten questions  10 records a picture, the pictures in turn, so that every record's medium lies far before it
films          the same for films
no repeats     every picture in one record: what hashing costs where nothing is saved

Every record is then read from both, in one random order; the bytes are compared. Times are processor time, medians over
rounds, ratios those of paired rounds. The map: resident memory that a million random digests add to a process, in the
table used and in a dictionary digest -> (tar, offset), each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.prepare import PICTURE_SIZES, make_video
from benchmarks.report import machine, write_result
from data_prep.demo import MEDIA
from data_prep.prepare import Options, prepare_own
from molmo2_nemo.data.manifest import MANIFEST, SHARED, read_head
from molmo2_nemo.data.media_once import Places
from molmo2_nemo.data.shards import ShardDataset

QUESTIONS = 10
WAYS = ("once", "repeated")


def make_raw(folder: Path, pictures: int, films: int) -> dict[str, Path]:
    """A JSONL file for each set, with the media beside them."""
    photos = sorted(MEDIA.glob("*.jpg"))
    for i in range(pictures):
        size = PICTURE_SIZES[i % len(PICTURE_SIZES)]
        picture = Image.open(photos[i % len(photos)]).convert("RGB").resize(size)
        picture.putpixel((0, 0), (i % 256, i // 256, 0))  # all different
        picture.save(folder / f"p{i}.jpg", quality=90, comment=str(i).encode())
    film = make_video()
    for i in range(films):  # a free box with a number, so that all are different
        (folder / f"v{i}.mp4").write_bytes(film + b"\x00\x00\x00\x10free" + b"%08d" % i)
    asked = {
        "ten questions": [{"image": f"p{n % pictures}.jpg"} for n in range(pictures * QUESTIONS)],
        "films": [{"video": f"v{n % films}.mp4"} for n in range(films * QUESTIONS)],
        "no repeats": [{"image": f"p{n}.jpg"} for n in range(pictures)],
    }
    made = {}
    for name, rows in asked.items():
        lines = [json.dumps({**row, "question": f"Question {n}?", "answer": "yes " * 9}) for n, row in enumerate(rows)]
        made[name] = folder / f"{name.replace(' ', '_')}.jsonl"
        made[name].write_text("\n".join(lines))
    return made


def prepare_seconds(jsonl: Path, out: Path, way: str) -> float:
    began = time.process_time()
    prepare_own(jsonl, out, Options(cache=out.parent / "cache", strict=True, repeat_media=way == "repeated"))
    return time.process_time() - began


def read_seconds(folder: Path) -> tuple[float, list[dict[str, bytes]]]:
    """Of reading every record in a random order; and the media."""
    data = ShardDataset(folder)
    order = random.Random(0).sample(range(len(data)), len(data))
    began = time.process_time()
    found = [data.read(i)[1] for i in order]
    spent = time.process_time() - began
    return spent, [{suffix: content for suffix, content in one.items() if suffix != "json"} for one in found]


def compare(jsonl: Path, scratch: Path, rounds: int) -> dict[str, Any]:
    prepared: dict[str, list[float]] = {way: [] for way in WAYS}
    read: dict[str, list[float]] = {way: [] for way in WAYS}
    result: dict[str, Any] = {}
    for number in range(rounds + 1):  # the first warms caches and imports
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            media = {}
            for way in WAYS if number % 2 else WAYS[::-1]:
                out = Path(folder) / way
                spent = prepare_seconds(jsonl, out, way)
                reading, media[way] = read_seconds(out)
                if number:
                    prepared[way].append(spent)
                    read[way].append(reading)
                head = read_head(out / MANIFEST)
                result[f"mb_{way}"] = round(sum(path.stat().st_size for path in out.iterdir()) / 1e6, 2)
                result |= {"records": head["records"]} | ({"shared": head[SHARED]} if SHARED in head else {})
            assert media["once"] == media["repeated"]
    result["mb_once_to_repeated"] = round(result["mb_once"] / result["mb_repeated"], 4)
    for name, seconds in (("prepare", prepared), ("read", read)):
        result[f"{name}_seconds"] = {way: round(statistics.median(seconds[way]), 4) for way in WAYS}
        ratios = [once / repeated for once, repeated in zip(seconds["once"], seconds["repeated"], strict=True)]
        result[f"{name}_once_to_repeated"] = round(statistics.median(ratios), 3)
        result[f"{name}_ratios"] = [round(ratio, 3) for ratio in ratios]
    return result


# --- the map ---------------------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process in memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


def fill(kind: str, count: int) -> None:
    """In a process of its own: prints what a map of so many media holds and takes."""
    rng, table, plain = random.Random(0), Places(), dict[bytes, tuple[int, int]]()
    before, began = resident(), time.process_time()
    for n in range(count):
        key = rng.randbytes(16)
        if kind == "table":
            table.add(key, n + 1)
        else:
            plain[key] = (n // 1000, 512 * n)
    added, grown = time.process_time() - began, resident() - before
    figures: dict[str, Any] = {"resident_bytes_a_medium": round(grown / count, 1), "seconds": round(added, 2)}
    if kind == "table":
        figures["table_bytes_a_medium"] = round(table.nbytes / len(table), 1)
        began = time.process_time()
        for _ in range(100_000):
            table.get(rng.randbytes(16))
        figures["microseconds_a_look_up"] = round((time.process_time() - began) / 0.1, 2)
    print(json.dumps(figures))


def filled(kind: str, count: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.media_once", "--fill", kind, "--media", str(count)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return dict(json.loads(out.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--films", type=int, default=3)
    parser.add_argument("--media", type=int, default=1_000_000, help="in the map")
    parser.add_argument("--fill", choices=("table", "dictionary"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/media_once-<date>.json")
    args = parser.parse_args()
    if args.fill:
        fill(args.fill, args.media)
        return
    result: dict[str, Any] = {"machine": machine(), "rounds": args.rounds, "questions": QUESTIONS}
    with tempfile.TemporaryDirectory() as folder:
        for name, jsonl in make_raw(Path(folder), args.pictures, args.films).items():
            result[name] = compare(jsonl, Path(folder), args.rounds)
    result["map"] = {kind: filled(kind, args.media) for kind in ("table", "dictionary")} | {"media": args.media}
    print(json.dumps(result, indent=1))
    write_result("media_once", result, args.out)


if __name__ == "__main__":
    main()
