"""A judge on this machine, which speaks OpenAI's chat-completions protocol and answers by rule."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """A judge whose statements are sentences; `faults` are served first, one a request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.faults: list[Any] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.busy, self.busiest, self.lock = 0, 0, threading.Lock()


def judged(question: str) -> str:
    """What a judge replies that takes sentences for statements, and statements for told that stand word for word."""
    _, text, *rest = re.split(r"^={10}$", question, flags=re.M)
    if "verdicts" in question:
        asked = [line.split(". ", 1)[1] for line in rest[0].strip().splitlines()]
        return "Here it is:\n```json\n" + json.dumps({"verdicts": [one in text for one in asked]}) + "\n```"
    return json.dumps({"statements": [part.strip() for part in text.split(".") if part.strip()]})


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body | {"path": self.path})
            self.server.headers.append(dict(self.headers))
            fault = self.server.faults.pop(0) if self.server.faults else None
            self.server.busy += 1
            self.server.busiest = max(self.server.busiest, self.server.busy)
        try:
            if callable(fault):
                fault(self)
            elif fault is not None:
                self.reply(*fault)
            else:
                time.sleep(0.01)
                self.say(judged(body["messages"][-1]["content"]))
        except BrokenPipeError:
            pass
        finally:
            with self.server.lock:
                self.server.busy -= 1

    def say(self, text: str) -> None:
        self.reply(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}))

    def reply(self, status: int, body: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def judge_server() -> Iterator[Server]:
    """A server that answers while the block runs."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
