"""`molmo2 prepare --fetch` against an https server on this machine that does what servers do."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path

import pytest

from data_prep.archive import unpack
from data_prep.bringing.catalogue import load
from data_prep.bringing.fetch import BROUGHT, FAILED, THERE, Fetcher, hub_files
from data_prep.bringing.journal import WORK, Journal, alone
from data_prep.download import Downloader
from molmo2_nemo.errors import UserError
from tests.support.servers import tarred, zipped

PICTURES = {f"val2014/{i}.jpg": os.urandom(10_000) for i in range(10)}
ITEM = "  val: {how: fetch, what: pictures, licence: none, into: images/coco, there: images/coco/val2014, URLS}\n"


@pytest.fixture
def bring(server, certificate, tmp_path):
    """Brings the items of a catalogue with this server's addresses."""

    def bring(items=ITEM, urls="urls: URL/val.zip", wanted=("val",), **options):
        path = tmp_path / f"catalogue-{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text("items:\n" + items.replace("URLS", urls).replace("URL", server.url))
        downloader = Downloader(
            tmp_path / "root" / WORK / "downloads",
            backoff=0.01,
            verify=str(certificate),
            per_host=2,
            dead_after=2,
            remember_gone=False,
            max_bytes=options.pop("max_bytes", 2**40),
        )
        catalogue = load(path)
        made = Fetcher(tmp_path / "root", downloader, catalogue, **options)
        return made.bring([catalogue.items[name] for name in wanted])

    bring.root = tmp_path / "root"
    return bring


def states(results):
    return [result.state for result in results]


def pictures(root: Path) -> dict[str, bytes]:
    folder = root / "images/coco"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_archive_comes_once(server, bring):
    server.files["/val.zip"] = zipped(PICTURES)
    assert states(bring()) == [BROUGHT] and pictures(bring.root) == PICTURES
    assert states(bring()) == [THERE] and len(server.seen) == 1
    left = [p.name for p in (bring.root / WORK).rglob("*") if p.is_file() and not p.name.endswith(".lock")]
    assert left == ["done.jsonl"], "neither the archive nor a copy of it stays"
    for path in (bring.root / "images/coco/val2014").iterdir():
        path.unlink()
    assert states(bring()) == [BROUGHT] and pictures(bring.root) == PICTURES, "what was removed comes again"


def test_what_the_user_put_there_is_left_alone(server, bring):
    mine = bring.root / "images/coco/val2014/mine.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    assert states(bring()) == [THERE] and not server.seen


def test_a_folder_that_two_archives_fill(server, bring):
    second = {"val2014/z.jpg": b"z"}
    server.files |= {"/val.zip": zipped(PICTURES), "/more.tar.gz": tarred(second)}
    more = ITEM.replace("  val:", "  more:").replace("URLS", "urls: URL/more.tar.gz")
    assert states(bring(ITEM + more, wanted=("val", "more"))) == [BROUGHT, BROUGHT]
    assert pictures(bring.root) == PICTURES | second


@pytest.mark.parametrize(
    "plans",
    [
        ["500", "502", ""],
        ["429:0", ""],
        ["503:" + formatdate(time.time() - 5, usegmt=True), ""],
        ["plain"],
        ["to:/there.zip"],
    ],
    ids=["500", "429", "a date", "no ranges", "redirect"],
)
def test_answers_that_end_well(server, bring, plans):
    server.files["/val.zip"] = server.files["/there.zip"] = zipped(PICTURES)
    server.plans["/val.zip"] = plans
    assert states(bring()) == [BROUGHT] and pictures(bring.root) == PICTURES


@pytest.mark.parametrize(
    "plan, seen",
    [("404", "gone .status 404"), ("403", "gone .status 403"), ("500", "5 tries, the last: status 500")],
)
def test_answers_that_do_not(server, bring, plan, seen):
    import re

    server.plans["/val.zip"] = [plan]
    (result,) = bring()
    assert result.state == FAILED and re.search(seen, result.detail)
    server.files["/val.zip"], server.plans["/val.zip"] = zipped(PICTURES), [""]
    assert states(bring()) == [BROUGHT], "a later call asks again"


def test_a_server_that_asks_for_patience_is_left_alone(server, bring):
    server.plans |= {"/val.zip": ["429:3600"]}
    more = ITEM.replace("  val:", "  more:").replace("val2014,", "more,").replace("URLS", "urls: URL/more.zip")
    server.files["/more.zip"] = zipped(PICTURES)
    results = {r.item.name: r for r in bring(ITEM + more, wanted=("val", "more"), parallel=1)}
    assert "asks to wait 3,600 s" in results["val"].detail and len(server.seen) == 1
    assert "not asked again in this run" in results["more"].detail


def test_a_host_that_does_not_answer_is_given_up_and_the_mirror_is_used(server, bring):
    server.files["/val.zip"] = zipped(PICTURES)
    dead = "https://127.0.0.1:1/val.zip"
    assert states(bring(urls=f"urls: ['{dead}', URL/val.zip]")) == [BROUGHT]
    (result,) = bring(
        ITEM.replace("val2014,", "else,").replace("  val:", "  other:"), f"urls: {dead}", wanted=("other",)
    )
    assert result.state == FAILED and "Connection" in result.detail


def test_a_cut_transfer_is_resumed(server, bring):
    content = server.files["/val.zip"] = zipped(PICTURES)
    server.plans["/val.zip"] = ["cut:40000", ""]
    assert states(bring()) == [BROUGHT] and pictures(bring.root) == PICTURES
    assert [wanted for _, wanted, _ in server.seen] == [None, "bytes=40000-"] and len(content) > 40_000


def test_a_file_that_changed_between_two_calls_starts_over(server, bring):
    server.files["/val.zip"] = zipped({"val2014/old.jpg": os.urandom(90_000)})
    server.plans["/val.zip"] = ["cut:40000", "500"]
    assert states(bring()) == [FAILED]
    server.files["/val.zip"], server.plans["/val.zip"] = zipped(PICTURES), [""]
    assert states(bring()) == [BROUGHT] and pictures(bring.root) == PICTURES
    assert server.seen[-1][1] == "bytes=40000-", "the server was asked for the rest of what it no longer has"


def test_wrong_checksums_pages_and_other_files_are_refused(server, bring):
    right = server.files["/val.zip"] = zipped(PICTURES)
    (result,) = bring(urls=f"sha1: '{'0' * 40}', urls: URL/val.zip")
    assert result.state == FAILED and "wrong checksum" in result.detail
    good = hashlib.sha1(right).hexdigest()
    for content, seen in ((b"<!DOCTYPE html><p>Quota", "a web page"), (b"hello", "neither a zip nor a tar")):
        server.files["/val.zip"] = content
        (result,) = bring()
        assert result.state == FAILED and seen in result.detail
    server.files["/val.zip"] = right
    assert states(bring(urls=f"sha1: '{good}', urls: URL/val.zip")) == [BROUGHT]


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "val2014/../../../evil"])
def test_an_archive_that_climbs_is_refused(server, bring, name):
    server.files["/val.zip"] = tarred({"val2014/x.jpg": b"x", name: b"evil"})
    (result,) = bring()
    assert result.state == FAILED and "climbing path" in result.detail
    assert not list(bring.root.parent.rglob("evil")) and not (bring.root / "images").exists()


def test_a_full_disk_is_said_before_the_transfer(server, bring, monkeypatch):
    server.files["/val.zip"] = zipped(PICTURES)
    free = os.statvfs(bring.root.parent)
    monkeypatch.setattr("data_prep.download.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert free.f_bavail * free.f_frsize > 1000
    with pytest.raises(UserError, match="no room .* more bytes, 1,000 are free"):
        bring()
    monkeypatch.undo()
    assert states(bring()) == [BROUGHT]


def test_only_a_folder_of_the_archive_and_single_files(server, bring):
    server.files |= {
        "/repo.zip": zipped({"x-1/data/tab/p.json": b"{}", "x-1/data/tab/t/1.png": b"1", "x-1/README": b"no"}),
        "/q.json": b' {"a": 1}',
        "/flat.tar": tarred({"deep/er/a.mp4": b"a", "deep/b.mp4": b"b", "deep/notes.txt": b"no"}, "w"),
    }
    items = (
        "  repo: {how: fetch, what: a, licence: b, into: tab, inside: data/tab, there: tab/t, urls: URL/repo.zip}\n"
        "  q: {how: fetch, what: a, licence: b, into: tab, file: q.json, there: tab/q.json, urls: URL/q.json}\n"
        "  flat: {how: fetch, what: a, licence: b, into: videos, flat: true, there: videos, urls: URL/flat.tar}\n"
        "  none: {how: fetch, what: a, licence: b, into: n, inside: nowhere, there: n, urls: URL/repo.zip}\n"
    )
    results = {r.item.name: r for r in bring(items, wanted=("repo", "q", "flat", "none"), parallel=1)}
    assert [results[name].state for name in ("repo", "q", "flat", "none")] == [BROUGHT, BROUGHT, BROUGHT, FAILED]
    assert "no folder nowhere in it (there are: x-1)" in results["none"].detail
    found = {str(p.relative_to(bring.root)) for p in bring.root.rglob("*") if p.is_file() and WORK not in p.parts}
    assert found == {"tab/p.json", "tab/t/1.png", "tab/q.json", "videos/a.mp4", "videos/b.mp4"}


def test_archives_in_archives(server, bring):
    inner = tarred({"JPEGImages/a/0.jpg": b"0"}, "w")
    server.files["/outer.zip"] = zipped({"release/train/images.tar": inner})
    item = (
        "  val: {how: fetch, what: a, licence: b, into: M, urls: URL/outer.zip, there: M/release/train/JPEGImages,"
        " nested: {M/release/train/images.tar: M/release/train}}\n"
    )
    assert states(bring(item)) == [BROUGHT]
    assert (bring.root / "M/release/train/JPEGImages/a/0.jpg").read_bytes() == b"0"
    assert not (bring.root / "M/release/train/images.tar").exists() and states(bring(item)) == [THERE]


def test_at_most_so_many_connections_to_a_host(server, bring):
    items = "".join(
        f"  i{n}: {{how: fetch, what: a, licence: b, into: x{n}, there: x{n}, urls: URL/{n}.zip}}\n" for n in range(8)
    )
    server.files |= {f"/{n}.zip": zipped({"a": os.urandom(80_000)}) for n in range(8)}
    server.plans |= {f"/{n}.zip": ["slow:0.02"] for n in range(8)}
    assert states(bring(items, wanted=[f"i{n}" for n in range(8)], parallel=8)) == [BROUGHT] * 8
    assert server.most == 2


def test_killed_while_files_were_moved_to_their_place(server, bring):
    """As a kill leaves it: the archive is there and unpacked, half of its files are at their place."""
    content = server.files["/val.zip"] = zipped(PICTURES)
    url = f"{server.url}/val.zip"
    archive = Downloader(bring.root / WORK / "downloads").place(url)
    archive.parent.mkdir(parents=True)
    archive.write_bytes(content)
    Journal(bring.root).note("val", url, "placing")
    unpacked = unpack(archive, bring.root / WORK / "unpacked" / f"val-{hashlib.sha256(url.encode()).hexdigest()[:12]}")
    place = bring.root / "images/coco/val2014"
    place.mkdir(parents=True)
    for picture in sorted((unpacked / "val2014").iterdir())[:5]:
        picture.rename(place / picture.name)
    assert states(bring()) == [BROUGHT] and pictures(bring.root) == PICTURES and not server.seen


def test_only_one_call_at_a_time_brings_to_a_folder(tmp_path):
    with alone(tmp_path), pytest.raises(UserError, match="another molmo2 prepare --fetch is at work"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


# --- the Hub ---------------------------------------------------------------------------------------------------------


def test_files_of_a_repository(server, bring, hub):
    hub(
        "org/set",
        {
            "0_30_s/v1.tar.gz": tarred({"NextQA/1.mp4": b"1"}),
            "0_30_s/v2.tar.gz": tarred({"NextQA/2.mp4": b"2"}),
            "other/v.tar.gz": tarred({"no": b"no"}),
        },
    )
    item = "  val: {how: hub, what: a, licence: b, repo: org/set, files: '0_30_s/*.tar.gz', into: '{dir}'}\n"
    assert states(bring(item)) == [BROUGHT, BROUGHT]
    assert [(bring.root / f"0_30_s/NextQA/{n}.mp4").read_bytes() for n in (1, 2)] == [b"1", b"2"]
    assert {token for _, _, token in server.seen} == {"Bearer hf_test"}
    server.seen.clear()
    assert states(bring(item)) == [THERE] and not server.seen


def test_one_file_of_a_repository_fails_and_only_that_is_asked_for_again(server, bring, hub):
    hub("org/set", {f"{n}.zip": zipped({f"{n}.jpg": b"x"}) for n in range(3)})
    server.plans["/datasets/org/set/resolve/main/1.zip"] = ["403"]
    item = "  val: {how: hub, what: a, licence: b, repo: org/set, files: '*.zip', into: a}\n"
    results = {r.name: r for r in bring(item)}
    assert results["1.zip"].state == FAILED and "accept the terms of org/set" in results["1.zip"].detail
    server.seen.clear()
    server.plans["/datasets/org/set/resolve/main/1.zip"] = [""]
    assert sorted(states(bring(item))) == [BROUGHT, THERE, THERE]
    assert [path for path, _, _ in server.seen if "resolve" in path] == ["/datasets/org/set/resolve/main/1.zip"]


def test_pieces_of_one_archive_are_joined(server, bring, hub):
    whole = tarred({"train/JPEGImages/a.jpg": os.urandom(50_000)})
    hub("org/set", {f"train.tar.gz.a{c}": whole[n * 20_000 : (n + 1) * 20_000] for n, c in enumerate("abc")})
    item = (
        "  val: {how: hub, what: a, licence: b, repo: org/set, files: train.tar.gz.*, joined: true, into: M,"
        " there: M/train/JPEGImages}\n"
    )
    assert states(bring(item)) == [BROUGHT] and (bring.root / "M/train/JPEGImages/a.jpg").stat().st_size == 50_000
    assert states(bring(item)) == [THERE]


def test_a_content_that_is_not_the_listed_one(server, bring, hub):
    hub("org/set", {"a.zip": zipped({"a.jpg": b"a"})})
    server.files["/datasets/org/set/resolve/main/a.zip"] = zipped({"a.jpg": b"b"})
    (result,) = bring("  val: {how: hub, what: a, licence: b, repo: org/set, files: a.zip, into: a}\n")
    assert result.state == FAILED and "wrong checksum" in result.detail


def test_a_repository_that_is_not_there_or_has_no_such_file(server, bring, hub):
    hub("org/set", {"a.zip": b""})
    item = "  val: {how: hub, what: a, licence: b, repo: org/REPO, files: b.zip, into: a}\n"
    (result,) = bring(item.replace("REPO", "set"))
    assert result.state == FAILED and "no file b.zip (there are: a.zip)" in result.detail
    (result,) = bring(item.replace("REPO", "none"))
    assert result.state == FAILED and "cannot be listed" in result.detail
    assert [file.path for file in hub_files("org/set", ["*.zip"])] == ["a.zip"]


# --- the command -----------------------------------------------------------------------------------------------------


def command(server, certificate, tmp_path, *words: str, before=None) -> subprocess.Popen[str]:
    catalogue = tmp_path / "mine.yaml"
    catalogue.write_text(
        f"items:\n  coco_val2014: {{urls: {server.url}/val.zip}}\n  coco_train2014: {{urls: {server.url}/train.zip}}\n"
    )
    env = {**os.environ, "REQUESTS_CA_BUNDLE": str(certificate), "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "1"}
    call = [sys.executable, "-m", "molmo2_nemo.cli.main", "prepare", "--fetch", "okvqa", "--catalogue", str(catalogue)]
    return subprocess.Popen(
        [*call, "--source", str(tmp_path / "root"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        preexec_fn=before,
    )


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_command_goes_on(server, certificate, tmp_path, kill):
    server.files |= {
        "/val.zip": zipped(PICTURES),
        "/train.zip": zipped({f"train2014/{i}.jpg": os.urandom(100_000) for i in range(80)}),
    }
    server.plans["/train.zip"] = ["slow:0.1", ""]
    first = command(server, certificate, tmp_path)
    parts = tmp_path / "root" / WORK / "downloads"
    until = time.monotonic() + 60
    while not any(p.stat().st_size > 200_000 for p in parts.rglob("*.part")):
        assert time.monotonic() < until and first.poll() is None
        time.sleep(0.02)
    first.send_signal(kill)
    first.communicate(timeout=60)
    assert first.returncode != 0 and not (tmp_path / "root/images/coco/train2014").exists()
    second = command(server, certificate, tmp_path)
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert len(list((tmp_path / "root/images/coco/train2014").iterdir())) == 80
    assert pictures(tmp_path / "root").items() >= PICTURES.items()
    asked = [wanted for path, wanted, _ in server.seen if path == "/train.zip"]
    assert asked[0] is None and int(asked[1][6:-1]) >= 200_000, "the second call asked only for the rest"
    assert "coverage is not known, as its rows cannot be read" in out


def test_a_file_that_cannot_be_had_fails_the_command_and_the_others_come(server, certificate, tmp_path):
    server.files["/val.zip"] = zipped(PICTURES)
    done = command(server, certificate, tmp_path)
    out, err = done.communicate(timeout=120)
    assert done.returncode == 2 and "brought 1 file," in out and "1 failed" in out
    assert "COCO 2014, training images: " in out and "status 404" in out and pictures(tmp_path / "root") == PICTURES


def test_a_file_that_cannot_be_written_to_its_end(server, certificate, tmp_path):
    """A limit on the size of files stands for the full disk: the system refuses to write on."""
    server.files |= {
        "/val.zip": zipped({"val2014/a.jpg": os.urandom(300_000)}),
        "/train.zip": zipped({"train2014/a": b"a"}),
    }

    def little():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = command(server, certificate, tmp_path, before=little)
    out, err = done.communicate(timeout=120)
    assert done.returncode == 2 and "What has come stays" in err and "Traceback" not in err, err
    again = command(server, certificate, tmp_path)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0 and (tmp_path / "root/images/coco/val2014/a.jpg").stat().st_size == 300_000
    asked = [wanted for path, wanted, _ in server.seen if path == "/val.zip"]
    assert asked[0] is None and asked[-1] is not None, "the second call asked only for the rest"
