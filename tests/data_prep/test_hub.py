"""Rows from the Hub: `datasets` and `huggingface_hub` against a server on this machine that speaks their protocol."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

REVISION = "c0ffee" + "0" * 34
CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
---
"""


def files():
    rows = io.BytesIO()
    pq.write_table(pa.table({"n": [1, 2, 3]}), rows)
    return {
        "README.md": CARD.encode(),
        "data/train-00000-of-00001.parquet": rows.getvalue(),
        "extra/cat.jpg": b"a cat",
    }


class Handler(BaseHTTPRequestHandler):
    """Just what the two libraries ask for."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.partition("?")[0]
        name = next((name for name in self.server.repos if f"/allenai/{name}" in path), None)
        if name is None:
            return self._answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        there = self.server.repos[name]
        if "/resolve/" in path:
            file = path.split("/resolve/")[1].split("/", 1)[1]
            if file not in there:
                return self._answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
            tag = hashlib.sha1(there[file]).hexdigest()
            return self._answer(there[file], 200, {"ETag": f'"{tag}"', "X-Repo-Commit": REVISION})
        if "/tree/" in path:
            below = path.split("/tree/")[1].partition("/")[2]
            listed = [self._entry(name, there) for name in there if name.startswith(f"{below}/" if below else "")]
            if "recursive=False" in self.path:
                listed = [entry for entry in listed if "/" not in entry["path"]]
                listed += [{"type": "directory", "path": "data", "oid": "0" * 40}]
            return self._answer(json.dumps(listed).encode())
        if path.startswith("/api/datasets/"):
            siblings = [{"rfilename": file} for file in there]
            about = {"id": f"allenai/{name}", "sha": REVISION, "private": False, "gated": False, "siblings": siblings}
            return self._answer(
                json.dumps({**about, "disabled": False, "tags": [], "downloads": 0, "likes": 0}).encode()
            )
        return self._answer(b"{}", 404)

    do_HEAD = do_GET

    def _entry(self, name, there):
        content = there[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _answer(self, body, status=200, headers=None):
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    script = f"open({str(tmp_path / 'ran')!r}, 'w')"  # what older versions of `datasets` would have run
    server.repos = {"pets": files(), "scripted": {"scripted.py": script.encode()}}
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


CODE = """
import json
from data_prep.hub import download_file
from data_prep.sources.base import Hub, SourceError
from data_prep.tables import Tables

tables, errors = Tables(), []
rows = list(tables.rows(Hub("allenai/pets"), ("n",)))
cat = download_file("allenai/pets", "extra/cat.jpg", None).read_text()
for ask in (
    lambda: list(tables.rows(Hub("allenai/pets", split="val"))),
    lambda: list(tables.rows(Hub("allenai/none"))),
    lambda: download_file("allenai/pets", "extra/dog.jpg", None),
    lambda: list(tables.rows(Hub("allenai/scripted"))),
):
    try:
        ask()
    except SourceError as error:
        errors.append(str(error))
print(json.dumps([rows, tables.revisions, cat, errors]))
"""


def test_rows_and_files_of_a_repository(hub, tmp_path):
    """In a process of its own: the libraries read their addresses when they are imported."""
    addresses = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=os.environ | addresses, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows, revisions, cat, errors = json.loads(done.stdout)
    assert rows == [{"n": n, "__config__": ""} for n in (1, 2, 3)] and cat == "a cat"
    assert revisions == {"allenai/pets": REVISION}, "the manifest names what was fetched"
    assert "scripts are no longer supported" in errors[3]
    assert not (tmp_path / "ran").exists(), "no code of a data set runs"
    assert "no split 'val' (there are: train)" in errors[0]
    assert "allenai/none" in errors[1] and "extra/dog.jpg cannot be fetched" in errors[2]
