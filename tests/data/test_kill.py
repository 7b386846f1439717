"""A loader process killed with SIGKILL: from its last state on, the next 100 packs are the unbroken run's, bit by bit.

The process is a real one with real decoding and real workers, and writes a line for every pack: a hash of every array,
the keys, and the state, as a trainer would keep them. It is killed while it and its workers read ahead.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.data.workers import planners
from tests.support.thorough import thorough

ROOT = Path(__file__).parents[2]
NEXT = 100

CHILD = """
import hashlib, json, os, sys
from dataclasses import fields
import torch
torch.set_num_threads(1)
from molmo2_nemo.data.balance import CostModel
from molmo2_nemo.data.config import DataConfig, ImageConfig, PackingConfig, SourceConfig
from molmo2_nemo.data.loader import PackStream
from molmo2_nemo.data.ordering import CostOrder

def main(folder, log, workers, window, count):
    config = DataConfig(
        sources={name: SourceConfig(os.path.join(folder, name), rate) for name, rate in (("one", 0.7), ("two", 0.3))},
        image=ImageConfig(crop_size=126, margin=2, max_crops=4, p_high_res=0.3, high_res_max_crops=6),
        packing=PackingConfig(sequence_length=768, max_crops=16, buffer_size=12),
        num_workers=workers,
    )
    stream = PackStream(config, micro_batch_size=1, dp_rank=0, dp_size=1)
    if window:
        stream = CostOrder(stream, window, CostModel())
    lines = open(log).read().split("\\n")[:-1] if os.path.exists(log) else []  # the last may be cut off
    if lines:
        stream.load_states([json.loads(lines[-1])["state"]])
    batches = iter(stream)
    with open(log, "w") as out:
        out.writelines(line + "\\n" for line in lines)
        for _, batch in zip(range(count - len(lines)), batches):
            digest = hashlib.sha256()
            for f in fields(batch):
                value = getattr(batch, f.name)
                if hasattr(value, "tobytes"):
                    digest.update(f"{f.name} {value.dtype} {value.shape}".encode() + value.tobytes())
            out.write(json.dumps({"digest": digest.hexdigest(), "keys": batch.keys, "state": batch.state}) + "\\n")
            out.flush()
    batches.close()
    assert not {"nemo", "megatron"} & set(sys.modules), "the loader needs neither"

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
"""


def picture(rng):
    file = io.BytesIO()
    size = int(rng.integers(40, 300)), int(rng.integers(40, 300))
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("kill")
    for name, count in (("one", 60), ("two", 25)):
        records = []
        for i in range(count):
            questions = [
                {"style": "pointing", "label": "cars", "points": [[i, 50]], "point_scale": 100},
                {"style": "a_okvqa_mc", "question": f"Which {i}?", "options": ["a", "b", "c"], "answer_idx": i % 3},
                {"style": "long_caption", "text": "words " * int(rng.integers(3, 60))},
            ]
            content = {"images": ["jpg"], "annotations": questions[: 1 + i % 3]}
            broken = b"no picture" if i % 19 == 7 else picture(rng)  # skipped ones are part of the stream
            records.append((f"{i:04d}", {"json": json.dumps(content).encode(), "jpg": broken}))
        write_shards(folder / name, records, records_per_shard=16)
    (folder / "child.py").write_text(CHILD)
    return folder


def start(data, log, workers, window, count):
    command = [sys.executable, str(data / "child.py"), str(data), str(log), str(workers), str(window), str(count)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def complete_lines(log):
    return log.read_text().split("\n")[:-1] if log.exists() else []


def workers_of(pid):
    """Processes that a process has started."""
    tasks = Path(f"/proc/{pid}/task")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def run_and_kill(data, log, workers, window, after):
    """SIGKILL as soon as `after` packs were written; how many were. Its decoding processes end by themselves."""
    child = start(data, log, workers, window, 10**6)
    try:
        deadline = time.monotonic() + 300
        while len(complete_lines(log)) < after:
            assert child.poll() is None and time.monotonic() < deadline, "the loader ended by itself, or hangs"
            time.sleep(0.005)
        decoders = workers_of(child.pid)
    finally:
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert len(decoders) == workers + planners(workers)
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in decoders):
        assert time.monotonic() < deadline, "a decoding process outlived the one that read from it"
        time.sleep(0.1)
    return len(complete_lines(log))


@pytest.mark.parametrize("num_workers, window", [thorough(1, 0), (2, 5)])
def test_the_next_hundred_packs_after_a_kill(data, tmp_path, num_workers, window):
    log = tmp_path / "log"
    first = run_and_kill(data, log, num_workers, window, after=13)
    last = run_and_kill(data, log, num_workers, window, after=first + 9)  # and once more, from a resumed run
    assert start(data, log, num_workers, window, last + NEXT).wait() == 0
    assert start(data, tmp_path / "whole", 0, window, last + NEXT).wait() == 0
    got, whole = ([json.loads(line) for line in complete_lines(path)] for path in (log, tmp_path / "whole"))
    assert len(got) == len(whole) == last + NEXT
    for number, (a, b) in enumerate(zip(got, whole, strict=True)):
        assert a == b, f"pack {number}"
    assert whole[-1]["state"]["skipped"] and len({line["digest"] for line in whole}) == len(whole)
