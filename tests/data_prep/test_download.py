"""Downloads from a real https server on this machine: retries, resumption, caps, checksums, no plain http."""

from __future__ import annotations

import hashlib

import pytest

from data_prep.download import Downloader, DownloadError
from data_prep.media import Resolver
from data_prep.media_kinds import MediaError
from data_prep.sources.base import Table, Url
from data_prep.tables import Tables
from tests.support.servers import Answering, serve

CONTENT = bytes(range(256)) * 400  # 102,400 bytes


class Handler(Answering):
    """What a path does: /ok, /flaky (503 twice), /cut (closes half way, once), /missing, /big, /plain (to http)."""

    def do_GET(self):
        seen = self.server.seen
        seen.append((self.path, self.headers.get("Range")))
        times = sum(path == self.path for path, _ in seen)
        if self.path == "/missing":
            self._answer(404, b"gone")
        elif self.path == "/flaky" and times <= 2:
            self._answer(503, b"busy", {"Retry-After": "0"})
        elif self.path == "/plain":
            self._answer(302, b"", {"Location": f"http://127.0.0.1:{self.server.server_address[1]}/ok"})
        elif self.path == "/moved":
            self._answer(302, b"", {"Location": "/ok"})
        elif self.path == "/big":
            self.send_response(200)
            self.send_header("Content-Length", str(10**9))
            self.end_headers()
            self.close_connection = True
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(CONTENT)
            self.close_connection = True
        elif self.path == "/cut" and times == 1:
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:40_000])
            self.close_connection = True
        elif self.path == "/rows.jsonl":
            self._answer(200, b'{"a": 1}\n{"a": 2}\n')
        else:
            begin = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            self._answer(206 if begin else 200, CONTENT[begin:])


@pytest.fixture
def server(certificate):
    httpd = serve(certificate, Handler)
    yield httpd
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def get(tmp_path, certificate):
    return Downloader(tmp_path / "cache", backoff=0.01, verify=str(certificate))


def test_fetched_once(server, get):
    path = get.fetch(server.url + "/ok", hashlib.sha256(CONTENT).hexdigest().upper())
    assert path.read_bytes() == CONTENT and get.fetch(server.url + "/ok") == path
    assert len(server.seen) == 1
    assert get.fetch(server.url + "/moved").read_bytes() == CONTENT, "a redirect to https is followed"
    assert not list(get.cache.rglob("*.part"))


def test_retries_until_the_server_can(server, get):
    assert get.fetch(server.url + "/flaky").read_bytes() == CONTENT
    assert len(server.seen) == 3
    server.seen.clear()
    impatient = Downloader(get.cache / "other", backoff=0.01, retries=2, verify=get.verify)
    with pytest.raises(DownloadError, match="download failed.*2 tries.*status 503"):
        impatient.fetch(server.url + "/flaky")


def test_a_cut_transfer_goes_on_where_it_stopped(server, get):
    assert get.fetch(server.url + "/cut").read_bytes() == CONTENT
    assert [wanted for _, wanted in server.seen] == [None, "bytes=40000-"]


def test_a_later_run_goes_on_too(server, get):
    get.retries = 1
    with pytest.raises(DownloadError, match="cut off after 40000 of 102400 bytes|IncompleteRead"):
        get.fetch(server.url + "/cut")
    again = Downloader(get.cache, verify=get.verify)
    assert again.fetch(server.url + "/cut").read_bytes() == CONTENT and server.seen[-1][1] == "bytes=40000-"


def test_gone_is_remembered(server, get):
    for _ in range(2):
        with pytest.raises(DownloadError, match="gone.*404"):
            get.fetch(server.url + "/missing")
    assert len(server.seen) == 1


@pytest.mark.parametrize("path, reason", [("/big", "too large"), ("/endless", "too large"), ("/plain", "not https")])
def test_refusals(server, get, path, reason):
    get.max_bytes = 200_000
    with pytest.raises(DownloadError) as caught:
        get.fetch(server.url + path)
    assert caught.value.reason == reason
    assert not [p for p in get.cache.rglob("*") if p.is_file()], "nothing of it is kept"


def test_plain_http_and_other_schemes_are_never_asked(get):
    for url in ("http://127.0.0.1/x", "file:///etc/passwd", "ftp://host/x", "//host/x"):
        with pytest.raises(DownloadError, match="not https"):
            get.fetch(url)


def test_wrong_checksum_is_thrown_away(server, get):
    with pytest.raises(DownloadError, match="wrong checksum"):
        get.fetch(server.url + "/ok", "0" * 64)
    assert not [p for p in get.cache.rglob("*") if p.is_file()]


def test_untrusted_certificate(server, tmp_path):
    with pytest.raises(DownloadError, match="download failed.*SSL"):
        Downloader(tmp_path / "cache", backoff=0.01, retries=2).fetch(server.url + "/ok")


def test_rate_limit_spaces_the_beginnings(tmp_path, monkeypatch):
    """Five files at 10 per second wait 0.4 seconds in all, by the clock that is asked."""
    now = [100.0]
    slept = []
    monkeypatch.setattr("data_prep.download.time.monotonic", lambda: now[0])
    monkeypatch.setattr("data_prep.download.time.sleep", lambda s: (slept.append(s), now.__setitem__(0, now[0] + s)))
    get = Downloader(tmp_path, rate=10)
    for _ in range(5):
        get._pace()
    assert sum(slept) == pytest.approx(0.4)


def test_resolver_and_tables_use_it(server, get, tmp_path):
    resolver = Resolver((), tmp_path / "cache", get)
    media = [Url(f"{server.url}/ok?{i}") for i in range(20)] + [Url(f"{server.url}/missing")]
    resolver.prefetch(media)
    asked = len(server.seen)
    assert resolver.read(media[7])[0] == CONTENT
    with pytest.raises(MediaError, match="gone"):
        resolver.read(media[-1])
    assert asked == 21 and len(server.seen) == 21, "everything was fetched before it was read"
    assert [row["a"] for row in Tables((), get).rows(Table("rows.jsonl", url=f"{server.url}/rows.jsonl"))] == [1, 2]
