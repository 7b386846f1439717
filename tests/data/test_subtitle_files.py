"""Subtitle files of the usual kinds. Oracle: the demuxers and decoders of ffmpeg, through PyAV."""

import json
import re
import shutil

import av
import pytest

from data_prep import demo
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.shards import ShardDataset
from molmo2_nemo.data.subtitle_files import parse
from molmo2_nemo.errors import DataError

LINES = [(0.5, 1.25, "Good morning."), (1.5, 2.0, "Two lines,\nwith a comma"), (3723.004, 3725.1, "Late.")]
SRT = """1
00:00:00,500 --> 00:00:01,250
<i>Good</i> morning.

2
00:00:01,500 --> 00:00:02,000
{\\an8}Two lines,
with a comma

3
01:02:03,004 --> 01:02:05,100
Late.
"""
VTT = """WEBVTT - a title

STYLE
::cue { color: red }

NOTE
a comment

first
00:00.500 --> 00:01.250 line:0 position:20%
<v Ann>Good</v> <c.loud>morning.</c>

00:01.500 --> 00:02.000
Two lines,
with a comma

01:02:03.004 --> 01:02:05.100
Late.
"""
ASS = """[Script Info]
ScriptType: v4.00+

[V4+ Styles]
Format: Name, Fontname, Fontsize
Style: Default,Arial,20

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
Comment: 0,0:00:09.00,0:00:10.00,Default,,0,0,0,,a comment
Dialogue: 0,0:00:00.50,0:00:01.25,Default,,0,0,0,,{\\i1}Good{\\i0} morning.
Dialogue: 0,0:00:01.50,0:00:02.00,Default,,0,0,0,,Two lines,\\Nwith a comma
Dialogue: 0,1:02:03.00,1:02:05.10,Default,,0,0,0,,Late.
Dialogue: 0,1:02:06.00,1:02:07.00,Default,,0,0,0,,{\\p1}m 0 0 l 100 0{\\p0}
"""
FILES = {"talk.srt": SRT, "talk.vtt": VTT, "talk.ass": ASS}


def of_ffmpeg(path):
    found = []
    with av.open(str(path)) as film:
        for packet in film.demux(film.streams.subtitles[0]):
            for line in packet.decode() if packet.size else ():
                start = float(packet.pts * packet.time_base)
                text = b"".join(rect.ass for rect in line).decode() if not hasattr(line, "ass") else line.ass.decode()
                text = re.sub(r"\{[^}]*\}", "", text.split(",", 8)[-1]).replace("\\N", "\n").strip()
                found.append((start, start + float(packet.duration * packet.time_base), text))
    return found


@pytest.mark.parametrize("name", FILES)
def test_lines_are_those_of_ffmpeg(name, tmp_path):
    (tmp_path / name).write_text(FILES[name])
    lines = parse(name, FILES[name].encode())
    late = 3723.0 if name == "talk.ass" else 3723.004
    assert lines == [*LINES[:2], (late, *LINES[2][1:])]
    theirs = of_ffmpeg(tmp_path / name)[: len(lines)]
    assert [text for *_, text in theirs] == [text for *_, text in lines]
    for ours, other in zip(lines, theirs, strict=True):
        assert ours[:2] == pytest.approx(other[:2], abs=1e-3)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_line_ends_and_encodings(ending, encoding):
    assert parse("a.srt", SRT.replace("\n", ending).encode(encoding)) == LINES


@pytest.mark.parametrize("text", ["10:30 - 11:00", "1:2, 3:4", "a -> b", "open 9:00.0 - 12:30.0", "1-2"])
def test_texts_with_times_in_them_are_no_times(text):
    lines = [(1.0, 2.0, f"x\n{text}")]
    assert parse("a.srt", f"1\n00:00:01,0 --> 00:00:02,0\nx\n{text}\n".encode()) == lines


def test_texts_with_empty_lines_numbers_and_entities():
    text = "1\n00:00:01,0 --> 00:00:02,0\none\n\nafter a gap\n42\n\n2\n00:00:03,0 --> 00:00:04,0\n\n"
    assert parse("a.srt", text.encode()) == [(1.0, 2.0, "one\n\nafter a gap\n42")]
    vtt = "WEBVTT\n\n00:01.000 --> 00:02.000\na &lt; b &amp; <00:01.500>c&nbsp;d\n\nstray\n"
    assert parse("a.VTT", vtt.encode()) == [(1.0, 2.0, "a < b & c d")]
    assert parse("a.srt", b"1\n00:00:01,0 --> 00:00:02,0\n3 < 4 and 5 > 2\n")[0][2] == "3 < 4 and 5 > 2"


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.srt", "1\n00:00:01,0 - 00:00:02,0\nx\n", "line 2: 00:00:01,000 --> 00:00:02,500 was expected"),
        ("a.srt", "1\n0:1 --> soon\nx\n", "line 2: "),
        ("a.vtt", "00:01.000 --> 00:02.000\nx\n", "line 1: WEBVTT"),
        ("a.ass", "[Events]\nDialogue: 0,0:00:01.00,0:00:02.00,x\n", "line 2: no Format"),
        (
            "a.srt",
            "1\n00:00:01,000 --> 00:00:02,000\nx\n\n2\n00:00:02,000 -> 00:00:03,000\ny\n",
            "line 6: 00:00:01,000 -->",
        ),
        ("a.vtt", "WEBVTT\n\n00:01.000 → 00:02.000\nx\n", "line 3: 00:00:01,000 -->"),
        ("a.srt", "1\n00:00:05,000 --> 00:00:03,000\nx\n", "line 2: ends at 3 s, before its start at 5 s"),
        (
            "a.ass",
            "[Events]\nFormat: Start, End, Text\nDialogue: 0:00:05.00,0:00:03.00,x\n",
            "line 3: ends at 3 s, before its start at 5 s",
        ),
        ("a.ass", "[Events]\nFormat: Start, End, Text\nDialogue: 1,2,x\n", "line 3: times"),
        ("a.lrc", "[00:01]x", ".srt, .vtt"),
        ("a.srt", "", "no subtitles"),
    ],
)
def test_what_cannot_be_read_is_named(name, text, words):
    with pytest.raises(DataError, match=re.escape(words)):
        parse(name, text.encode())
    with pytest.raises(DataError, match="not UTF-8"):
        parse("a.srt", "é".encode("latin1"))


def test_prepare_reads_them_as_it_reads_lines(tmp_path, capsys):
    """Oracle: the same lines written into the JSONL."""
    shutil.copy(demo.MEDIA / "bunny.mp4", tmp_path)
    (tmp_path / "subs").mkdir()
    for name, text in FILES.items():
        (tmp_path / "subs" / name).write_text(text.replace("1:02:0", "0:00:0"))
    (tmp_path / "subs" / "bad.srt").write_text("1\nnow --> then\nx\n")
    film = {"video": "bunny.mp4", "clip": [1, 4.5], "question": "What is said?", "answer": "Late."}
    written = [{"start": s, "end": e, "text": t} for s, e, t in [*LINES[:2], (3.0, 5.1, "Late.")]]
    names = [*FILES, "bad.srt", "gone.srt"]
    lines = [{**film, "subtitles": written}, *({**film, "subtitles": f"subs/{name}"} for name in names)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["prepare", str(tmp_path / "own.jsonl"), "--out", str(tmp_path / "out"), "--workers", "0"]) == 0
    data = ShardDataset(tmp_path / "out" / "own")
    read = [json.loads(data.read(i)[1]["json"])["subtitles"] for i in range(len(data))]
    assert len(read) == 4 and read[0] == read[3] and [line["text"] for line in read[0]][0] == "Good morning."
    for srt in read[1:3]:
        assert [line["text"] for line in srt] == [line["text"] for line in read[0]]
        assert [line["start"] for line in srt] == pytest.approx([line["start"] for line in read[0]], abs=0.005)
    skipped = [json.loads(line) for line in (tmp_path / "out" / "own" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["line"], line["field"], line["reason"]) for line in skipped] == [
        (5, "subtitles", "subtitles cannot be read"),
        (6, "subtitles", "media not found"),
    ]
    assert "line 2" in skipped[0]["detail"] and "bad.srt" in skipped[0]["detail"]


def test_lists_as_longvideobench_has_them():
    lines = [
        {"start": "00:00:01.500", "end": "00:00:03.000", "line": "<i>one</i>"},
        {"timestamp": [3, 4.25], "text": "two\nlines"},
        {"start": "1:02:03", "end": 3724.5, "line": ""},
    ]
    assert parse("a.json", json.dumps(lines).encode()) == [(1.5, 3.0, "one"), (3.0, 4.25, "two\nlines")]
    bad = {
        '{"a": 1}': "a list of lines was expected",
        "[1": "is no JSON",
        "[5]": "line 1: .* was expected, not 5",
        '[{"start": "soon", "end": 2, "line": "a"}]': "line 1: a time was expected, .* not 'soon'",
        '[{"timestamp": [1.0, null], "text": "a"}]': "line 1: a time was expected, .* not None",
        '[{"timestamp": [2, 1], "text": "a"}]': "line 1: ends at 1 s, before its start at 2 s",
        "[]": "holds no subtitles",
    }
    for content, words in bad.items():
        with pytest.raises(DataError, match=words):
            parse("a.json", content.encode())
