"""A page in headless Chromium, driven by chromedriver's own protocol (WebDriver) on this machine."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
PATIENCE = 300.0  # seconds for Chromium to start or to load a page on a busy machine


def missing() -> str:
    """Why no browser can be started here; "" where one can."""
    gone = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(gone)} not installed (Debian: chromium, chromium-driver)" if gone else ""


class Page:
    """A session of chromedriver."""

    def __init__(self, address: str) -> None:
        self.address = address

    def call(self, path: str, values: dict[str, Any] | None = None, method: str = "POST") -> Any:
        data = None if values is None else json.dumps(values).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
                return json.loads(reply.read())["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None

    def open(self, file: Path) -> None:
        self.call("/url", {"url": file.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """What a script returns in the page."""
        return self.call("/execute/sync", {"script": script, "args": []})

    def picture(self, file: Path) -> None:
        """Writes a screenshot of the whole page, as high as it is."""
        shot = self.call(
            "/goog/cdp/execute",
            {"cmd": "Page.captureScreenshot", "params": {"captureBeyondViewport": True, "format": "png"}},
        )
        file.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser(width: int, height: int = 844) -> Iterator[Page]:
    """A page `width` pixels wide; below 500 as a phone shows it."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="chromium-") as profile:
        driver = subprocess.Popen(
            ["chromedriver", f"--port={port}", "--allowed-ips=127.0.0.1"], stdout=subprocess.DEVNULL
        )
        try:
            page = Page(f"http://127.0.0.1:{port}")
            _wait(page)
            options: dict[str, Any] = {
                "args": [*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
            }
            if width < 500:
                options["mobileEmulation"] = {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 2}}
            asked = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}}
            session = page.call("/session", asked)
            page.address += f"/session/{session['sessionId']}"
            try:
                yield page
            finally:  # chromedriver leaves its browser running
                page.call("", method="DELETE")
        finally:
            driver.terminate()
            driver.wait()


def _wait(page: Page) -> None:
    """Until chromedriver answers."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            page.call("/status", method="GET")
            return
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
