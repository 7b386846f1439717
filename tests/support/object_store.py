"""Object stores that the tests start on this machine: moto's S3, and a plain server of ranges that misbehaves."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from tests.support.servers import Answering

MISSING = [name for name in ("s3fs", "moto", "flask", "flask_cors") if importlib.util.find_spec(name) is None]
needs_s3 = pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}: make venv installs them")


@contextmanager
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A running S3 with the bucket `bucket`, and the environment that leads there; gives moto's server."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        use_s3_at(f"http://{host}:{port}", monkeypatch)
        urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()  # what it had is the process's
        filesystem().mkdir("bucket")
        yield server
    finally:
        server.stop()


def use_s3_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment under which s3:// leads to a server."""
    from molmo2_nemo.data.objects import store

    monkeypatch.setattr(store, "_open", {})  # as a new process
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "made-up",
        "AWS_SECRET_ACCESS_KEY": "made-up",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)


def filesystem() -> Any:
    import fsspec

    return fsspec.filesystem("s3", skip_instance_cache=True)


def upload(folder: Path, address: str) -> None:
    """Every file of a folder, by the library alone."""
    files = filesystem()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files.pipe_file(f"{address}/{path.relative_to(folder)}", path.read_bytes())


DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class Ranges(Answering):
    """Serves `server.files`; the next of `server.plans[path]` changes one answer to a GET."""

    def do_HEAD(self):
        content = self.server.files.get(self.path)
        self.server.seen.append(("HEAD", self.path, None))
        if plans := self.server.plans.get("HEAD " + self.path):
            self.send_response(int(plans.pop(0)))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.send_header("ETag", _tag(content or b""))
        self.end_headers()

    def do_GET(self):
        content, wanted = self.server.files.get(self.path), self.headers.get("Range")
        self.server.seen.append(("GET", self.path, wanted))
        plans = self.server.plans.get(self.path)
        kind, _, value = (plans.pop(0) if plans else "").partition(":")
        if "?list-type" in self.path and self.path.startswith("/bucket"):  # as S3 does, to those who may only read
            return self._answer(403, DENIED)
        if kind.isdigit():
            return self._answer(int(kind), b"no", {"Retry-After": value} if value else {})
        if content is None:
            return self._answer(404, b"none")
        if wanted is None or kind == "plain":
            return self._answer(200, content)
        start, _, stop = wanted.removeprefix("bytes=").partition("-")
        part = content[int(start) : int(stop) + 1]
        if kind == "damage":
            part = part[:-1] + bytes([part[-1] ^ 1])
        if kind == "slow":
            time.sleep(float(value))
        headers = {"Content-Range": f"bytes {start}-{stop}/{len(content)}", "ETag": _tag(content)}
        if kind != "cut":
            return self._answer(206, part, headers)
        self.send_response(206)
        for name, text in {**headers, "Content-Length": str(len(part))}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(part[: len(part) // 2])
        self.close_connection = True
        return None


def _tag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:16]}"'


@contextmanager
def range_server(folder: Path | None = None) -> Iterator[Any]:
    """A running server with `url`, `files` (path -> bytes), `plans` to fill, and the requests `seen`.

    Args:
        folder: its files are served below /set, and below /bucket/set as an S3 does that refuses listings.
    """
    httpd: Any = ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
    httpd.daemon_threads = True
    httpd.handle_error = lambda *_: None  # who asked went away
    httpd.seen, httpd.plans = [], {}
    files = {path.name: path.read_bytes() for path in folder.iterdir()} if folder else {}
    httpd.files = {f"{at}/{name}": content for name, content in files.items() for at in ("/set", "/bucket/set")}
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    httpd.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    try:
        yield httpd
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
