"""Pictures decoded in a process of their own, for decoders that nothing in this process could interrupt.

One such process serves each process that needs it. The system ends it when a picture takes more processor time than
allowed (RLIMIT_CPU, whole seconds), and refuses it memory beyond what the largest picture needs; the next picture gets
a new one. A decoder that crashes costs a picture, not the run. Requests and answers are a line of JSON and plain bytes.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from molmo2_nemo.data.config import LimitsConfig
from molmo2_nemo.data.picture_decoder import Picture, Truncated, decode_here, describe, too_slow
from molmo2_nemo.errors import DataError

START = "import sys; sys.path.insert(0, sys.argv[1]); from molmo2_nemo.data.picture_process import serve; serve()"
ROOT = str(Path(__file__).parents[2])
SPARE = 2**30  # bytes beyond the pixels: libraries and the file
PER_PIXEL = 40  # bytes; an RGBA of 16 bits and its copies

_lock = threading.Lock()
_process: subprocess.Popen[bytes] | None = None


def decode_apart(data: bytes, *, limits: LimitsConfig, truncated: Truncated, probe: bool = False) -> Picture:
    """`picture_decoder.decode_here` in the other process.

    Raises:
        DataError: as there; or it took too much processor time or memory, or its decoder crashed.
    """
    request = {"bytes": len(data), "limits": asdict(limits), "truncated": truncated, "probe": probe}
    with _lock:
        process = _running()
        try:
            assert process.stdin is not None and process.stdout is not None
            _send(process.stdin, request, data)
            answer, content = _receive(process.stdout)
        except (EOFError, BrokenPipeError):
            raise DataError(_ending(process.wait(), limits)) from None
        except BaseException:  # half an answer is left in the pipe
            process.kill()
            raise
    if "error" in answer:
        raise DataError(answer["error"])
    shape = answer.pop("shape")
    return Picture(np.frombuffer(bytearray(content), np.uint8).reshape(shape), **answer)


def serve() -> None:
    """Answer requests from the standard input until it ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the process that is served
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, answers = open(0, "rb", buffering=0), open(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # a library that prints must not print into the answers
    while True:
        try:
            request, data = _receive(source)
        except EOFError:
            return
        limits = LimitsConfig(**request["limits"])
        _limit(limits)
        try:
            picture = decode_here(data, limits=limits, truncated=request["truncated"], probe=request["probe"])
        except Exception as error:
            _send(answers, {"bytes": 0, "error": describe(data, error, limits)}, b"")
            continue
        values = {name: getattr(picture, name) for name in ("width", "height", "format", "notes")}
        content = picture.pixels.tobytes()
        _send(answers, {"bytes": len(content), "shape": picture.pixels.shape, **values}, content)


def _limit(limits: LimitsConfig) -> None:
    """Bound the processor time and the memory of what comes next."""
    seconds, soft = limits.image_seconds, resource.RLIM_INFINITY
    if math.isfinite(seconds):
        soft = math.ceil(time.process_time()) + max(math.ceil(seconds), 1)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
    allowed = _address_space() + SPARE + PER_PIXEL * limits.pixels
    resource.setrlimit(resource.RLIMIT_AS, (allowed, resource.RLIM_INFINITY))


def _address_space() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        return 2**33


def _running() -> subprocess.Popen[bytes]:
    """The process that decodes for this one, started if there is none."""
    global _process
    if _process is None or _process.poll() is not None:
        quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a thread's stack would count as memory
        command = [sys.executable, "-c", START, ROOT]
        pipe = subprocess.PIPE
        _process = subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0, env={**os.environ, **quiet})
    return _process


def _ending(status: int, limits: LimitsConfig) -> str:
    if status == -signal.SIGXCPU:
        return too_slow(limits.image_seconds)
    name = signal.Signals(-status).name if status < 0 else f"exit code {status}"
    return f"the decoder of this image ended with {name}; convert it to JPEG or PNG"


def _send(file: IO[bytes], head: dict[str, Any], content: bytes) -> None:
    for part in (json.dumps(head).encode() + b"\n", content):
        rest = memoryview(part)
        while rest:
            rest = rest[file.write(rest) :]


def _receive(file: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """One request or answer.

    Raises:
        EOFError: the other side is gone.
    """
    line = file.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    head = json.loads(line)
    size, content = head.pop("bytes"), bytearray()
    while len(content) < size:
        part = file.read(size - len(content))
        if not part:
            raise EOFError
        content += part
    return head, bytes(content)


def _forget() -> None:
    """In a forked process: the parent's process is not for its child, nor is a lock that another thread held."""
    global _lock, _process
    _lock = threading.Lock()
    if _process is not None:
        for file in (_process.stdin, _process.stdout):
            if file is not None:
                file.close()
        _process.returncode = 0  # not this process's child: nobody waits for it here
        _process = None


def _close() -> None:
    if _process is not None and _process.stdin is not None:
        _process.stdin.close()
        _process.wait()


os.register_at_fork(after_in_child=_forget)
atexit.register(_close)
