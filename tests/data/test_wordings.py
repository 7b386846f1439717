"""Imported wordings: the reader of a checkout, the file, and what is said about either when it is wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields

import pytest

from molmo2_nemo.cli.main import main
from molmo2_nemo.data.config import TextFormatConfig
from molmo2_nemo.data.literals import SourceFile
from molmo2_nemo.data.published_wordings import EXPECTED, EXPECTED_CHOICE, commit_of, read_checkout
from molmo2_nemo.data.styles import KNOWN_STYLES, style_of
from molmo2_nemo.data.templates import OWN
from molmo2_nemo.data.wordings import LISTS, OWN_WORDINGS, ChoiceWords, check_list, load, pin, save, wordings_of
from molmo2_nemo.errors import DataError, UserError
from tests.support.official_shape import FILES, write_checkout


@pytest.fixture
def checkout(tmp_path):
    return write_checkout(tmp_path / "checkout")


@pytest.fixture
def saved(checkout, tmp_path):
    path = tmp_path / "wordings.json"
    save(read_checkout(checkout).wordings, path)
    return path


def test_our_own_lists_have_the_fields_that_are_filled_in():
    assert set(OWN) == set(LISTS)
    for name, texts in OWN.items():
        check_list(texts, LISTS[name], name)


def test_every_style_names_lists_that_there_are():
    named = set()
    for style in map(style_of, KNOWN_STYLES):
        named |= {style.wordings, style.question_wordings}
        named |= {style.track.wordings, style.track.wordings_no_fps} if style.track else set()
    assert named - {""} <= set(LISTS)


def test_a_checkout_gives_what_its_code_has(checkout):
    """The reference: the same file, run. The reader does not run it: the module would leave at once."""
    found = read_checkout(checkout)
    text = (checkout / FILES["formatter"]).read_text()
    kept = [line for line in text.splitlines() if not line.startswith(("import ", "raise ", "OTHER"))]
    namespace: dict = {}
    exec("\n".join(kept), namespace)
    table = namespace["GENERAL_PROMPTS_V1"]
    plain = ("long_caption", "video_short_answer", "video_point", "pointing", "only_count", "video_transcript")
    for name in plain:
        assert list(found.wordings.lists[name]) == table[name], name
    assert found.wordings.lists["explanation"] == ("made chain_of_thought 0 of an image: {question}",)
    assert found.wordings.lists["video_clip_caption_start_end"][3].endswith("{start} {end}")
    assert found.wordings.lists["multi_image_pointing"][0].endswith("{label} {images}")
    assert found.wordings.lists["video_single_point_track_per_frame"][0].endswith("{point} {fps}")
    assert "video" in found.wordings.lists["video_point"][0] and "image" in found.wordings.lists["pointing"][0]
    assert found.notes == []
    assert found.wordings.lists["video_single_point_track_start_end"] == OWN["video_single_point_track_start_end"]


def test_multiple_choice_of_a_checkout(checkout):
    choice = read_checkout(checkout).wordings.choice
    assert choice is not None
    assert choice.common_markers == ("{name}. ", "{name}) ", "{name}: ", "({name}) ")
    assert "{{name}} " in choice.other_markers and "{name})" in choice.other_markers
    assert list(choice.other_markers) == sorted(set(choice.other_markers), key=lambda t: t.replace("{name}", "%s"))
    assert choice.separators == (";", " // ") and len(choice.bullets) == 10
    assert [len(kind) for kind in choice.names] == [26, 26, 20, 5] and choice.names[2][-1] == "20"
    assert choice.name_words == ("letter", "letter", "number", "numeral")
    assert choice.layouts[2] == "build_option_templates 2: {question}\n\n{options}\n{instruction}"
    assert choice.name_layouts[8].endswith("{question}\n{options} by {name}")
    assert choice.named_instructions == ("the {name} and more", "all with its {name}")
    assert {part.name for part in fields(ChoiceWords)} == set(EXPECTED_CHOICE)


def test_the_file_is_read_back_and_pinned(saved, tmp_path):
    made = load(saved)
    assert wordings_of(TextFormatConfig(templates=str(saved))) == made
    config = TextFormatConfig(templates=str(saved))
    pin(config)
    assert config.templates_sha256 == made.fingerprint() == json.loads(saved.read_text())["sha256"]
    again = tmp_path / "again.json"
    save(made, again)
    assert again.read_bytes() == saved.read_bytes()
    missing = TextFormatConfig(templates=str(tmp_path / "gone.json"))
    pin(missing)
    assert missing.templates_sha256 is None
    assert wordings_of(TextFormatConfig()) is OWN_WORDINGS


def test_another_file_than_the_settings_are_for(saved):
    with pytest.raises(UserError, match="the settings are for 0123456789ab; name the file that the run was trained"):
        wordings_of(TextFormatConfig(templates=str(saved), templates_sha256="0123456789abcdef"))


def edited(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda v: v["lists"]["pointing"].append("Point to {label} now."), "was edited: its wordings have"),
        (lambda v: v["choice"]["bullets"].reverse(), "was edited: its wordings have the fingerprint"),
        (lambda v: v.update(sha256=None), "was edited"),
        (lambda v: v["lists"].pop("pointing"), "lists: missing: pointing"),
        (lambda v: v["lists"].update(pointed=["x"]), "lists: unknown: pointed"),
        (lambda v: v["lists"].update(pointing=[]), "pointing: the list is empty"),
        (lambda v: v["lists"].update(pointing=["a", "b"]), r"pointing, wording 1 \('a'\): {label} is missing"),
        (lambda v: v["lists"].update(pointing="Point to {label}"), "pointing: expected a list of texts"),
        (lambda v: v["lists"].update(long_caption=["a {thing}"]), "unknown field {thing}; known here: none"),
        (lambda v: v["lists"].update(pointing=["{label} {question}"]), "unknown field {question}; known here: {label}"),
        (lambda v: v["lists"].update(no_pointing=[" "]), "wording 1 .*: is empty"),
        (lambda v: v["choice"].pop("layouts"), "choice: missing: layouts"),
        (lambda v: v["choice"].update(names=[]), "choice.names: expected a list of lists"),
        (lambda v: v["choice"].update(names=[["A", "B"], 3]), r"choice.names\[1\]: expected a list of texts"),
        (lambda v: v["choice"].update(name_words=["letter"]), "choice.name_words: one word for each of the 4 kinds"),
        (lambda v: v["choice"].update(common_markers=["* "]), "choice.common_markers, wording 1 .*{name} is missing"),
        (lambda v: v.update(lists=3), "lists: expected an object"),
        (lambda v: v.update(version=2), "version 2 of wordings, this program reads 1"),
        (lambda v: v.update(kind="other"), "is not a file of wordings; make one with molmo2 templates import"),
    ],
)
def test_a_file_that_is_not_as_it_was_imported(saved, change, told):
    edited(saved, change)
    with pytest.raises(DataError, match=told):
        load(saved)


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "w.json"
    deep = "[" * 100_000
    for text, told in (
        ("{", "is not JSON"),
        (deep, "is not JSON"),
        ("[]", "is not a file of wordings"),
        ('"x"', "is not a file of wordings"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=told):
            load(path)
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="is not a text file"):
        load(path)
    with pytest.raises(UserError, match="no such file; molmo2 templates import makes one"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        (
            "formatter",
            '"pointing": [',
            '"pointings": [',
            r"formatter\.py: GENERAL_PROMPTS_V1 has no wordings for pointing$",
        ),
        ("formatter", '    "only_count": [', '    "x": [', "has no wordings for only_count$"),
        (
            "formatter",
            '"video_count"] = [p.',
            '"video_count"] = [p.x().',
            r"\['video_count'\] cannot be read: line \d+: ",
        ),
        ("formatter", '"chain_of_thought": [', '"chain": [', "has no wordings for chain_of_thought"),
        ("formatter", "GENERAL_PROMPTS_V1 = {", "PROMPTS = {", "nothing is assigned to GENERAL_PROMPTS_V1"),
        ("formatter", "GENERAL_PROMPTS_V1 = {", "GENERAL_PROMPTS_V1 = {**more,", "GENERAL_PROMPTS_V1|cannot be read"),
        ("formatter", "long_caption 0 of an image", "x {label}", r"long_caption.*wording 1.*unknown field {label}"),
        ("formatter", "pointing 1 of an image: {label}", "x", r"\['pointing'\], wording 2 .*{label} is missing"),
        ("formatter", "made transcript 4", "", "cannot be parsed as Python"),
        ("formatter", '"""Made', '""Made', "cannot be parsed as Python"),
        ("choices", "def build_option_templates", "def build_layouts", "there is no function build_option_templates"),
        ("choices", 'COMMON_MARKERS = ["%s. "', 'COMMON_MARKERS = ["x. "', "a mark needs %s once, found 'x. '"),
        ("choices", '"%s. "', '"%d. "', "a mark needs %s once"),
        ("choices", "{q}\\n\\n{opts}", "{q}\\n\\n{other}", "build_option_templates|cannot be read as data"),
        ("choices", "{q}\\n\\n{opts}", "{q}\\n\\n", "choice.layouts, wording 1.*{options} is missing"),
        ("choices", "    names = [", "    named = [", "assigns nothing to names"),
        ("choices", '(["i",', '("i", ["i",', "names are not pairs"),
        ("choices", "        out += [", "        other = [", r"build_option_instructions\(\) has 1 lists, 2 expected"),
        ("video", "class COIN(", "class Coin(", "there is no class COIN"),
        ("video", "    action_templates = [", "    templates = [", "COIN.action_templates: nothing is assigned to it"),
        (
            "video",
            "templates = [",
            "templates = 3 or [",
            "ActivityNet.templates: line 7: .3 or .* cannot be read as data",
        ),
        ("video", "made COIN 1", "{label}", r"COIN.action_templates, wording 2 .*unknown field {label}"),
        ("pixmo", "NO_POINT_PREFIX = [", "NO_POINT_PREFIX = []\nOTHER = [", "NO_POINT_PREFIX: the list is empty"),
        ("pixmo", "NO_POINT_PREFIX = [", "NO_POINT_PREFIX = [1,", "NO_POINT_PREFIX: expected a list of texts"),
    ],
)
def test_a_checkout_that_has_something_else(tmp_path, file, old, new, told):
    if (file, old) == ("formatter", "made transcript 4"):
        new = "made 'transcript"
    folder = write_checkout(tmp_path, **{file: (old, new)})
    with pytest.raises(DataError, match=told) as error:
        read_checkout(folder)
    assert str(tmp_path) in str(error.value)


def test_folders_that_are_no_checkout(checkout, tmp_path):
    with pytest.raises(UserError, match="no such folder; name a checkout of allenai/molmo2"):
        read_checkout(tmp_path / "nowhere")
    (checkout / FILES["pixmo"]).unlink()
    with pytest.raises(UserError, match="is no checkout of allenai/molmo2: it has no olmo/data/pixmo_datasets.py"):
        read_checkout(checkout)
    shutil.rmtree(checkout / "olmo")
    with pytest.raises(UserError, match="it has no olmo/preprocessing/data_formatter.py, no olmo/pre"):
        read_checkout(checkout)


def test_another_number_and_new_lists_are_said(tmp_path):
    old = "GENERAL_PROMPTS_V1 = {\n"
    folder = write_checkout(
        tmp_path,
        formatter=(old, old + "    'video_sound': ['what do you hear?'],\n"),
        pixmo=("NO_POINT_PREFIX = [", "NO_POINT_PREFIX = ['one more: ',"),
    )
    assert read_checkout(folder).notes == [
        "no_pointing: 33 wordings, 32 expected",
        "GENERAL_PROMPTS_V1 has 'video_sound', which is new and not used here",
    ]


def test_commits(tmp_path):
    sha = "0123456789" * 4
    git = tmp_path / ".git"
    assert commit_of(tmp_path) is None
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert commit_of(tmp_path) is None
    (git / "packed-refs").write_text(f"# pack-refs with: peeled\n{'9' * 40} refs/heads/other\n{sha} refs/heads/main\n")
    assert commit_of(tmp_path) == sha
    (git / "refs" / "heads" / "main").write_text("a" * 40 + "\n")
    assert commit_of(tmp_path) == "a" * 40
    (git / "HEAD").write_text(sha + "\n")
    assert commit_of(tmp_path) == sha
    (git / "HEAD").write_bytes(b"\xff\xfe")
    assert commit_of(tmp_path) is None


def test_the_command(checkout, tmp_path, capsys):
    out = tmp_path / "w.json"
    assert main(["templates", "import", str(checkout), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    for name, count in EXPECTED.items():
        assert any(line.split() == [name, str(count)] for line in said.splitlines()), name
    assert "multiple choice, layouts" in said and f"fingerprint {load(out).fingerprint()}" in said
    assert "not as expected" not in said and "from allenai/molmo2, commit unknown" in said
    assert main(["templates", "check", str(out)]) == 0
    assert load(out).fingerprint() in capsys.readouterr().out
    edited(out, lambda values: values["lists"]["pointing"].pop())
    assert main(["templates", "check", str(out)]) == 2
    assert "was edited" in capsys.readouterr().err
    assert main(["templates", "import", str(tmp_path), "--out", str(out)]) == 2
    assert "is no checkout of allenai/molmo2" in capsys.readouterr().err
    assert main(["templates", "import", str(checkout), "--out", str(tmp_path)]) == 2
    assert "it is a folder" in capsys.readouterr().err


def test_nothing_of_a_checkout_is_run(checkout):
    """The files of the made checkout leave the process when they are run, and import what is not there."""
    for name in FILES.values():
        text = (checkout / name).read_text()
        with pytest.raises((SystemExit, ImportError)):
            exec(text, {})
        SourceFile(checkout / name)
    assert read_checkout(checkout).notes == []
