"""Coverage of a data set's videos, and the lists and commands for those that are missing."""

from __future__ import annotations

import json
import shlex

import pytest

from data_prep.bringing.catalogue import load
from data_prep.bringing.coverage import coverage, youtube_id
from data_prep.bringing.journal import WORK, Journal
from data_prep.bringing.recipes import bucket_commands, bucket_objects, youtube_command
from data_prep.bringing.videos import report
from data_prep.download import Downloader
from data_prep.sources import find_source
from data_prep.sources.base import File, Frames
from molmo2_nemo.errors import DataError

IDS = [f"abcdefgh-{n:02d}" for n in range(4)] + ["-startsdash", "not-in-it__"]


def gcs(name: str, part: str = "youtube-cc-exist") -> dict[str, str]:
    return {
        "gcp_url": f"https://storage.googleapis.com/bucket/{part}/{name}/{name}.mkv",
        "youtube_url": f"https://www.youtube.com/watch?v={name}",
    }


@pytest.fixture
def root(tmp_path):
    """A folder with the rows of Molmo2-AskModelAnything, two per video, and two of its six videos."""
    rows = tmp_path / "Molmo2-AskModelAnything"
    rows.mkdir()
    lines = [{"video_id": name, "question": f"{q}?", "answer": "yes"} for name in IDS for q in "ab"]
    (rows / "HumanQA.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "youtube-cc/youtube-cc-kw" / IDS[0]).mkdir(parents=True)
    (tmp_path / "youtube-cc/youtube-cc-kw" / IDS[0] / "film.mp4").write_bytes(b"x")
    (tmp_path / "youtube-cc" / f"{IDS[1]}.webm").write_bytes(b"x")
    return tmp_path


def downloader(root, certificate):
    return Downloader(root / WORK / "downloads", backoff=0.01, retries=2, verify=str(certificate))


def test_coverage_counts_videos_once(root, certificate):
    found = coverage(find_source("molmo2_human_qa"), (root,), root / WORK, downloader(root, certificate))
    assert (found.wanted, found.there) == (6, 2) and found.youtube_ids() == IDS[2:]
    assert found.words() == "33 % of 6 (4 missing)"


def test_videos_of_the_bucket_and_the_others(root, certificate, hub):
    mapping = {name: gcs(name) for name in IDS[:5]}
    hub("allenai/Molmo2-AskModelAnything", {"youtube_id_to_urls_mapping.json": json.dumps(mapping).encode()})
    get = downloader(root, certificate)
    lines = report(find_source("molmo2_human_qa"), root, load(), get, "my-project")
    assert lines[0] == "molmo2_human_qa: 33 % of 6 (4 missing)"
    copy = next(line for line in lines if "gcloud" in line)
    assert "--billing-project=my-project" in copy and copy.endswith(".gs.txt")
    listed = (root / WORK / "molmo2_human_qa.gs.txt").read_text().split()
    assert listed == [f"gs://bucket/youtube-cc-exist/{name}/{name}.mkv" for name in IDS[2:5]]
    films = (root / WORK / "molmo2_human_qa.youtube.txt").read_text().split()
    assert films == ["https://www.youtube.com/watch?v=not-in-it__"]
    assert len((root / WORK / "molmo2_human_qa.missing.txt").read_text().splitlines()) == 4
    for name in IDS[2:]:  # where the commands put them, the source finds them
        (root / "youtube-cc" / f"{name}.mkv").write_bytes(b"x")
    assert report(find_source("molmo2_human_qa"), root, load(), get, None) == [
        "molmo2_human_qa: 100 % of 6 (0 missing)"
    ]


def test_without_a_project_and_without_the_hub(root, certificate, hub):
    hub(
        "allenai/Molmo2-AskModelAnything",
        {"youtube_id_to_urls_mapping.json": json.dumps({IDS[2]: gcs(IDS[2])}).encode()},
    )
    text = "\n".join(report(find_source("molmo2_human_qa"), root, load(), downloader(root, certificate), None))
    assert "1 of 4 videos are in a bucket; whoever copies them pays (put your Google Cloud project" in text
    hub("allenai/Molmo2-AskModelAnything", {"youtube_id_to_urls_mapping.json": b"<html>"})
    get = downloader(root / "other", certificate)
    text = "\n".join(report(find_source("molmo2_human_qa"), root, load(), get, None))
    assert "the bucket's list of videos cannot be had" in text and "4 videos by their YouTube ids" in text


def test_rows_that_cannot_be_had_and_hand_work(tmp_path, certificate):
    lines = report(find_source("doc_qa"), tmp_path, load(), downloader(tmp_path, certificate), None)
    assert "by hand (registration)" in lines[0] and "https://rrc.cvc.uab.es/?ch=17" in lines[0]
    assert lines[1].endswith("coverage is not known, as its rows cannot be read: its files are not there yet")
    (tmp_path / "doc_qa/documents").mkdir(parents=True)
    (tmp_path / "doc_qa/documents/a.png").write_bytes(b"x")
    row = {"questionId": 1, "question": "?", "answers": ["a"], "image": "documents/a.png", "data_split": "train"}
    (tmp_path / "doc_qa/train_v1.0_withQT.json").write_text(json.dumps({"data": [row]}))
    lines = report(find_source("doc_qa"), tmp_path, load(), downloader(tmp_path, certificate), None)
    assert lines == ["doc_qa: 100 % of 1 (0 missing)"], "what is there need not be brought"


def test_two_frames_per_second(tmp_path):
    path = tmp_path / "mapping.json"
    path.write_text(
        json.dumps({"a": gcs("a"), "b": gcs("b", "youtube-cc-kw"), "c": {"gcp_url": "https://else/x/y"}, "d": 1})
    )
    objects, unknown = bucket_objects(path, ["a", "b", "c", "d", "e"], two_fps=True)
    assert objects == {
        "youtube-cc-exist-2fps": ["gs://bucket/youtube-cc-exist-2fps/a_2fps.mp4"],
        "youtube-cc-kw-2fps": ["gs://bucket/youtube-cc-kw-2fps/b_2fps.mp4"],
    }
    assert unknown == ["c", "d", "e"]
    commands = bucket_commands(objects, tmp_path / "set", tmp_path / "youtube cc", None)
    assert len(commands) == 2 and shlex.split(commands[0])[:3] == [
        "mkdir",
        "-p",
        f"{tmp_path}/youtube cc/youtube-cc-exist-2fps",
    ]
    assert (tmp_path / "set.youtube-cc-kw-2fps.gs.txt").read_text() == "gs://bucket/youtube-cc-kw-2fps/b_2fps.mp4\n"


@pytest.mark.parametrize("text", ["[1]", "{"])
def test_a_mapping_that_is_none(tmp_path, text):
    path = tmp_path / "mapping.json"
    path.write_text(text)
    with pytest.raises(DataError, match="mapping.json"):
        bucket_objects(path, ["a"])


def test_the_yt_dlp_command_reads_whole_addresses(tmp_path):
    words = shlex.split(youtube_command(["-startsdash"], tmp_path / "a set", tmp_path / "to here"))
    assert words[0] == "yt-dlp" and words[words.index("--output") + 1] == f"{tmp_path}/to here/%(id)s.%(ext)s"
    batch = words[words.index("--batch-file") + 1]
    assert batch == f"{tmp_path}/a set.youtube.txt"
    with open(batch) as file:
        assert file.read() == "https://www.youtube.com/watch?v=-startsdash\n"


@pytest.mark.parametrize(
    "media, name",
    [
        (File("youtube-cc/youtube-cc-exist/abcdefgh_-1/", "youtube-cc/abcdefgh_-1"), "abcdefgh_-1"),
        (File("youtube-cc/x-2fps/abcdefgh_-1_2fps"), "abcdefgh_-1"),
        (File("all-videos/v_abcdefgh_-1"), "abcdefgh_-1"),
        (File("videos/abcdefgh_-1.mp4"), "abcdefgh_-1"),
        (File("images/000000000001.jpg"), ""),
        (Frames("frames/abcdefgh_-1", 2.0), ""),
    ],
)
def test_ids_in_names(media, name):
    assert youtube_id(media) == name


def test_a_journal_with_a_line_that_was_cut_off(tmp_path):
    Journal(tmp_path).note("a", "url", "done")
    path = tmp_path / WORK / "done.jsonl"
    path.write_bytes(path.read_bytes() + b'{"item": "b", "addr')
    journal = Journal(tmp_path)
    assert journal.state("a", "url") == "done" and not journal.knows({"b"})
    journal.note("c", "url", "done")
    assert Journal(tmp_path).state("c", "url") == "done", "the next line is not joined to the broken one"
