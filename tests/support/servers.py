"""An https server that the tests start on this machine: ranges, versions, and everything that goes wrong."""

from __future__ import annotations

import hashlib
import io
import ssl
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def tarred(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


class Answering(BaseHTTPRequestHandler):
    """Whole answers, and no log."""

    protocol_version = "HTTP/1.1"

    def _answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Handler(Answering):
    """Serves `server.files` with ranges and ETags; the next of `server.plans[path]` changes one answer."""

    def do_GET(self):
        path = self.path.partition("?")[0]
        with self.server.lock:
            self.server.seen.append((path, self.headers.get("Range"), self.headers.get("Authorization")))
            plans = self.server.plans.get(path, [])
            plan = plans.pop(0) if len(plans) > 1 else (plans[0] if plans else "")
            self.server.open += 1
            self.server.most = max(self.server.most, self.server.open)
        try:
            self._act(path, plan)
        except (BrokenPipeError, ConnectionResetError, ssl.SSLError):
            self.close_connection = True
        finally:
            with self.server.lock:
                self.server.open -= 1

    def _act(self, path, plan):
        kind, _, value = plan.partition(":")
        content = self.server.files.get(path)
        if kind.isdigit():
            self._answer(int(kind), b"no", {"Retry-After": value} if value else {})
        elif kind == "to":
            self._answer(302, b"", {"Location": value})
        elif content is None:
            self._answer(404, b"none")
        elif kind == "plain":  # knows no ranges, says nothing of its version
            self._answer(200, content)
        elif kind == "cut":
            self._part(content, int(value))
            self.close_connection = True
        elif kind == "slow":
            self._part(content, None, pause=float(value))
        else:
            self._part(content, None)

    def _part(self, content, stop, pause=0.0):
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        wanted = self.headers.get("Range")
        same = self.headers.get("If-Range") in (None, tag)
        begin = int(wanted[6:-1]) if wanted and same else 0
        self.send_response(206 if begin else 200)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(content) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        body = content[begin:][: stop if stop is not None else None]
        step = 20_000 if pause else max(len(body), 1)
        for at in range(0, len(body), step):
            self.wfile.write(body[at : at + step])
            self.wfile.flush()
            time.sleep(pause)


def serve(certificate: Path, handler: type[Answering] = Handler) -> ThreadingHTTPServer:
    """A running server with `url`, `files` and `plans` to fill, `seen` requests and the `most` open at once."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
    httpd.seen, httpd.files, httpd.plans, httpd.lock = [], {}, {}, threading.Lock()
    httpd.open = httpd.most = 0
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    httpd.url = f"https://127.0.0.1:{httpd.server_address[1]}"
    return httpd
