"""Files and folders that cannot be read or written, for every verb that takes one: one line that names it, code 2."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import pytest

import data_prep
from molmo2_nemo.cli import main as command
from molmo2_nemo.cli.main import main
from molmo2_nemo.cli.options import warn_once
from molmo2_nemo.data.manifest import MANIFEST
from molmo2_nemo.errors import UserError, blocking_file, file_error, read_text, writing
from molmo2_nemo.launch.reports import ERROR_DIR
from molmo2_nemo.settings.compose import compose
from molmo2_nemo.settings.schema import to_yaml

KINDS = ("text", "binary", "empty", "folder")
TINY = ("train", "recipe=tiny", "stage=sft", "parallel=single")


@pytest.fixture(scope="module")
def settings():
    """A stage's config.yaml."""
    return to_yaml(compose(TINY[1:]))


@pytest.fixture
def place(settings, tmp_path, monkeypatch):
    """The working folder: one thing of each kind, a stage that has made a step, an empty checkpoint."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("this is no data, no model and no setting\n")
    (tmp_path / "binary").write_bytes(b"\xff\x00\x80" + random.Random(0).randbytes(3000))
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "start" / "weights").mkdir(parents=True)
    (tmp_path / "prompts.jsonl").write_text('{"question": "?"}\n')
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / MANIFEST).touch()
    (tmp_path / "run" / "sft").mkdir(parents=True)
    (tmp_path / "run" / "sft" / "config.yaml").write_text(settings)
    step = {"step": 1, "loss": 1.0, "seconds": 1.0, "tokens": 10, "tokens_per_second": 10.0, "fill": 1.0, "time": 1.0}
    (tmp_path / "run" / "sft" / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    return tmp_path


def told(call, capsys) -> str:
    """The one line that `call` ends with, or the list of what is wrong with its settings."""
    assert main(list(call)) == 2
    err = capsys.readouterr().err
    assert err.startswith("molmo2: error: ") and (err.count("\n") == 1 or "settings cannot work:\n  - " in err), err
    return err


INPUTS = [
    ("train", "--config", "X"),
    ("train", "--config-dir", "X/"),
    ("mixture", "--config-dir", "X/"),
    ("status", "X"),
    ("report", "X"),
    ("shards", "check", "X"),
    ("shards", "stats", "X"),
    ("shards", "repair", "X"),
    ("shards", "index", "X"),
    ("preview", "X"),
    ("preview", "X.tar"),
    ("prepare", "./X", "--out", "out", "--workers", "0"),
    ("prepare", "pixmo_cap", "--out", "out", "--source", "X/"),
    ("prepare", "--list", "X"),
    ("generate", "start", "X"),
    ("generate", "X/", "prompts.jsonl"),
    ("ask", "start", "?", "--image", "X"),
    ("ask", "start", "?", "--video", "X"),
    ("convert", "import", "X", "out"),
    ("convert", "init", "--llm", "X", "--vit", "folder", "out"),
    (*TINY, "init_from=X"),
    (*TINY, "data.tokenizer=X"),
    (*TINY, "data.sources.demo.path=X"),
    (*TINY, "output_dir=X/"),
]


def input_calls():
    """Each call with each kind in the place of X. `X/`: a folder there is no mistake, or one that only torch sees."""
    for call in INPUTS:
        for kind in KINDS:
            if not (kind == "folder" and any(word.endswith("X/") for word in call)):
                yield kind, call


@pytest.mark.parametrize(
    ("kind", "call"), input_calls(), ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_what_cannot_be_read(kind, call, place, capsys):
    if "X.tar" in call:
        (place / kind).rename(place / f"{kind}.tar")
    words = [word.replace("X/", kind).replace("X", kind) for word in call]
    assert kind in told(words, capsys)
    assert not (place / "out").is_dir() or not any((place / "out").glob("*/*.tar")), "shards of nothing"


OUTPUTS = [  # O: where it goes
    (("report", "run", "--out", "O"), "file"),
    (("generate", "start", "prompts.jsonl", "--out", "O"), "file"),
    (("shards", "stats", "shards", "--png", "O"), "file"),
    (("preview", "shards", "--out", "O"), "folder"),
    (("prepare", "prompts.jsonl", "--out", "O"), "folder"),
    (("prepare", "prompts.jsonl", "--out", "out", "--cache", "O"), "folder"),
    (("demo", "--dir", "O"), "folder"),
    (("doctor", "--dir", "O"), "folder"),
    (("convert", "import", "start", "O"), "folder"),
    (("convert", "export", "start", "O", "--overwrite"), "folder"),
    (("convert", "init", "--llm", "start", "--vit", "start", "O"), "folder"),
    ((*TINY, "output_dir=O"), "folder"),
]


def output_calls():
    """Each call with what is in the way: a file above, or a thing of the other kind."""
    for call, makes in OUTPUTS:
        for where in ("text/below", "folder" if makes == "file" else "text"):
            yield where, call


@pytest.mark.parametrize(
    ("where", "call"), output_calls(), ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_what_cannot_be_written(where, call, place, capsys):
    before = sorted(place.rglob("*"))
    line = told([word.replace("O", where) if word.endswith("O") else word for word in call], capsys)
    assert where in line and ("is a file" in line or "is a folder" in line)
    assert sorted(p for p in place.rglob("*") if not p.name.endswith(".lock")) == before, "something was written"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc here")
def test_a_folder_that_cannot_be_made_is_told_with_its_setting(place, capsys, shards):
    line = told([*TINY, "output_dir=/proc/absent/run", f"data.sources.demo.path={shards}/sft"], capsys)
    assert "output_dir=/proc/absent/run: " in line and "No such file or directory" in line


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc here, where nobody can write")
def test_a_folder_that_cannot_be_written_is_told_before_a_pack_is_made(place, capsys):
    """The shards cannot be read either, which would be found later."""
    assert "--out /proc/pages: " in told(("preview", "shards", "--out", "/proc/pages"), capsys)


def test_a_full_disk_is_told_with_the_file(place, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    line = told(["report", "run", "--out", "/dev/full"], capsys)
    assert "/dev/full: No space left on device; make room there" in line


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "folder"])  # a folder is no settings at all
@pytest.mark.parametrize("verb", ["status", "report"])
def test_a_run_with_a_damaged_configuration(verb, kind, place, capsys):
    path = place / "run" / "sft" / "config.yaml"
    path.unlink()
    (place / kind).rename(path)
    line = told([verb, "run"], capsys)
    assert "run/sft/config.yaml" in line


def test_a_run_whose_metrics_are_no_text_is_shown_without_steps(place, capsys):
    (place / "binary").rename(place / "run" / "sft" / "metrics.jsonl")
    assert main(["status", "run"]) == 0
    assert told(["report", "run"], capsys).endswith("molmo2 status run shows their state\n")


PROMPTS = [
    ('{"question": "?", "image": 7}', "image is 7; expected the path of a file"),
    ('{"question": "?", "image": [null, "a"]}', "image is None; expected the path of a file"),
    ('{"question": "?", "image": "absent.jpg"}', "absent.jpg: no such file"),
    ('{"question": "?", "video": "folder"}', "folder: a folder, not a file"),
    ('{"question": "?", "image": "text"}', "text: cannot read image of"),
    ('{"question": "?", "video": "binary"}', "binary: cannot read video of"),
    ('{"question": "?", "image": "text", "video": "text"}', "a prompt has images or one video, not both"),
    ('{"question": "?", "style": "nope"}', "unknown style 'nope'"),
    ('{"question": "?", "style": "long_captoin"}', "did you mean 'long_caption'?"),
    ('{"question": "?", "style": 7}', "a style is a name such as user_qa"),
    ('{"question": "?", "answer": 7}', "answer is 7; expected a text"),
    ('{"question": null}', 'a text "question"'),
    ('{"question": 7}', "question is 7; expected a text"),
    ('{"question": "?"', "not JSON (Expecting ',' delimiter, column 17)"),
    ('{"question": "?', "not JSON (Unterminated string starting, column 14)"),
    ('{"question": "?", "clip": [1, 2]}', "clip without a video"),
    ('{"question": "?", "subtitles": "a.srt"}', "subtitles without a video"),
    ('{"question": "?", "video": "FILM", "clip": [2, 1]}', "clip is [2, 1]; expected 0 <= start < end"),
    ('{"question": "?", "video": "FILM", "clip": 2}', "clip is 2; expected [start, end]"),
    ('{"question": "?", "video": "FILM", "subtitles": "absent.srt"}', "absent.srt: no such file"),
    ('{"question": "?", "video": "FILM", "subtitles": "text"}', "text: subtitles are read from .srt"),
    ('{"question": "?", "video": "FILM", "subtitles": 7}', "subtitles is 7; expected the path of a file"),
    ('{"question": "?", "options": "a"}', "options is 'a'; expected a list of texts"),
    ('{"question": " "}', "the question is blank"),
    (
        '{"question": "?", "video": "FILM", "clip": [999, 1000]}',
        "bunny.mp4: clip 999.0 - 1000.0 s does not lie in a video",
    ),
    ('{"question": "?", "options": ["a cat", "a dog"], "answer": "C"}', "answer is 'C', which is none of the options"),
    ('{"question": "?", "options": ["a cat", "a dog"], "answer": ["B", "a fox"]}', "answer is 'a fox', which is none"),
    ('{"question": "?", "options": ["a cat", "a dog"], "answer": "A. a dog"}', "answer is 'A. a dog', which is none"),
    ('{"question": "?", "options": ["a cat", "a cat"]}', "options has 'a cat' twice"),
]
FILM = str(Path(data_prep.__file__).parent / "demo_media" / "bunny.mp4")
ASKED = [
    (("--clip", "1", "2"), "--clip belongs to a --video"),
    (("--subtitles", "text"), "--subtitles belongs to a --video"),
    (("--video", FILM, "--clip", "2", "1"), "clip is [2, 1]; expected 0 <= start < end"),
    (("--video", FILM, "--subtitles", "text"), "text: subtitles are read from .srt"),
    (("--video", FILM, "--frames", "0"), "--frames 0: must be at least 1"),
    (("--video", FILM, "--fps", "nan"), "--fps nan: must be above 0"),
    (("--max-crops", "0"), "--max-crops 0: must be at least 1"),
    (("--max-crops", "4", "--high-res"), "--high-res and --max-crops"),
    (("--temperature", "-1"), "--temperature -1.0: must be 0 (greedy) or more"),
    (("--top-p", "0.5"), "--top-p 0.5 without --temperature"),
    (("--stop", ""), "--stop with an empty text"),
    (("--video", FILM, "--clip", "999", "1000"), "bunny.mp4: clip 999.0 - 1000.0 s does not lie in a video of"),
]


@pytest.mark.parametrize(("words", "expected"), ASKED)
def test_questions_that_cannot_be_asked(words, expected, place, capsys):
    assert expected in told(["ask", "start", "?", *words], capsys)


def test_a_blank_question_is_not_asked(place, capsys):
    assert "the question is blank" in told(["ask", "start", " "], capsys)


@pytest.mark.parametrize("answer", ["B", "(b)", "B. a dog", "A dog.", "a dog", ["A", "a cat"], "", "B: a dog"])
def test_answers_that_are_an_option(answer, place):
    from molmo2_nemo.evaluation.prompt_file import read_prompts

    line = {"question": "?", "options": ["a cat", "a dog"], "answer": answer}
    (place / "prompts.jsonl").write_text(json.dumps(line))
    assert read_prompts(place / "prompts.jsonl")[0].reference == answer


def test_all_prompts_are_read_before_the_first_fault_is_said(place, capsys):
    (place / "prompts.jsonl").write_text("{}\n" * 3 + '{"question": "fine"}\n' + '{"question": ""}\n' * 4)
    assert main(["generate", "start", "prompts.jsonl"]) == 2
    first, *faults = capsys.readouterr().err.splitlines()
    assert first == "molmo2: error: 7 prompts cannot be used:"
    assert [line.split(": ")[0] for line in faults[:5]] == [f"  - prompts.jsonl, line {n}" for n in (1, 2, 3, 5, 6)]
    assert faults[5:] == ["  - and 2 more"]


def test_all_prompts_that_cannot_be_scored_are_said(place, capsys):
    lines = [{"question": "?", "answer": answer} for answer in ("3", "many", None)]
    (place / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["generate", "start", "prompts.jsonl", "--score", "counting"]) == 2
    first, many, none = capsys.readouterr().err.splitlines()
    assert first == "molmo2: error: 2 prompts cannot be scored:"
    assert "prompt 2: counting: the reference 'many'" in many and "prompt 3 has no reference answer" in none


IDLE = ("--frames", "3", "--fps", "1"), ("--max-crops", "2"), ("--high-res",)
PICTURE = str(Path(FILM).parent / "cat.jpg")


@pytest.mark.parametrize("options", IDLE, ids=lambda words: words[0])
def test_options_without_effect_are_said(options, place, capsys):
    film = options[0] == "--frames"
    asked = {"question": "?", "image": PICTURE} if film else {"question": "?", "video": FILM}
    (place / "prompts.jsonl").write_text(json.dumps(asked) + "\n" + json.dumps({"question": "?"}))
    for call in (["generate", "start", "prompts.jsonl"], ["ask", "start", "?", *_as_words(asked)]):
        assert main([*call, *options]) == 2  # the checkpoint is none, which is found out later
        *said, error = capsys.readouterr().err.splitlines()
        kind = "video" if film else "image"
        assert said == [f"warning: {name} has no effect: there is no {kind}" for name in options if name[0] == "-"]
        assert error.startswith("molmo2: error: start")
    with_both = [asked, {"question": "?", "image": PICTURE}, {"question": "?", "video": FILM}]
    (place / "prompts.jsonl").write_text("\n".join(map(json.dumps, with_both)))
    assert main(["generate", "start", "prompts.jsonl", *options]) == 2
    assert "no effect" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("process", "heard"),
    [
        ({}, True),  # the command itself, alone or before it starts its ranks
        ({"RANK": "0", "WORLD_SIZE": "2", ERROR_DIR: "errors"}, False),  # its first rank
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),  # of another launcher's ranks, the first
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
    ],
)
def test_what_all_processes_find_is_said_once(process, heard, place, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", ERROR_DIR):
        monkeypatch.delenv(name, raising=False)
    for name, value in process.items():
        monkeypatch.setenv(name, value)
    warn_once(["seen"])
    assert capsys.readouterr().err == ("warning: seen\n" if heard else "")


def _as_words(asked: dict[str, str]) -> list[str]:
    return [word for key, value in asked.items() if key != "question" for word in (f"--{key}", value)]


@pytest.mark.parametrize(("line", "expected"), PROMPTS)
def test_prompts_that_cannot_be_used(line, expected, place, capsys):
    (place / "prompts.jsonl").write_text('{"question": "fine"}\n' + line.replace("FILM", FILM) + "\n")
    said = told(["generate", "start", "prompts.jsonl"], capsys)
    assert expected in said and "prompts.jsonl, line 2: " in said


def test_null_in_a_prompt_counts_as_left_out(place):
    from molmo2_nemo.evaluation.prompt_file import KEYS, read_prompts
    from molmo2_nemo.inference.prompt import Prompt

    keys = {"question": "?"} | dict.fromkeys(KEYS[1:])
    (place / "prompts.jsonl").write_text(json.dumps(keys) + "\n" + json.dumps({"question": "?"}))
    first, second = read_prompts(place / "prompts.jsonl")
    assert first == second == Prompt("?", images=[], options=[])


@pytest.mark.parametrize(("style", "expected"), [("nope", "unknown style 'nope'"), ("", "is a name such as user_qa")])
def test_unknown_styles(style, expected, place, capsys):
    assert expected in told(["ask", "start", "?", "--style", style], capsys)


@pytest.mark.parametrize("call", [("shards", "check", "X"), ("prepare", "X.jsonl", "--out", "out")], ids=" ".join)
def test_fewer_processes_than_none(call, place, capsys):
    assert "--workers -3: must be at least 0" in told([*call, "--workers", "-3"], capsys)


def test_a_fault_of_ours_is_raised_with_its_traceback(monkeypatch):
    """Unlike what a person can mend: those errors name a file, or the state of a disk or a network."""

    def fails(error):
        monkeypatch.setattr(command, "build_parser", lambda: parser(error))
        return main(["train"])

    class parser:
        def __init__(self, error):
            self.raised = error

        def parse_known_args(self, argv):
            return self, []

        def run(self, args):
            raise self.raised

    for error in (KeyError("x"), ValueError("from a library"), OSError(errno.EBADF, "Bad file descriptor")):
        with pytest.raises(type(error)):
            fails(error)
    system = (OSError(errno.EROFS, "Read-only file system", "a"), ConnectionResetError(errno.ECONNRESET, "Reset"))
    for error in (UserError("a"), *system, ModuleNotFoundError("No module named 'lhotse'", name="lhotse")):
        assert fails(error) == 2


def test_verbose_shows_where(place, monkeypatch, capsys):
    monkeypatch.setenv("MOLMO2_VERBOSE", "1")
    assert main(["status", "absent"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.splitlines()[-1].startswith("molmo2: error: absent: no such folder")


def test_lines_of_system_errors(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as error:
        (tmp_path / "file" / "a" / "b").mkdir(parents=True)
    assert file_error(error.value) == f"{tmp_path}/file/a/b: Not a directory; {tmp_path}/file is a file"
    with pytest.raises(OSError) as error:
        (tmp_path / "file").mkdir()
    assert file_error(error.value).startswith(f"{tmp_path}/file: File exists; something of that name is there")
    with pytest.raises(OSError) as error, writing(tmp_path / "named"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert file_error(error.value).startswith(f"{tmp_path}/named: No space left on device; make room")
    assert file_error(OSError("a library's\n words")) == "a library's words"


def test_what_blocks_a_folder(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert blocking_file(tmp_path / "new" / "below") is None and blocking_file(tmp_path) is None
    assert blocking_file(tmp_path / "file" / "below") == tmp_path / "file"
    assert blocking_file(tmp_path / "link") == tmp_path / "link"
    assert blocking_file(tmp_path / ("x" * 300)) is None


def test_text_in_another_encoding_is_named(tmp_path):
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match="latin is not a text file: byte 1 is not UTF-8"):
        read_text(tmp_path / "latin")
