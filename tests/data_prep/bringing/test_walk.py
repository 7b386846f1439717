"""The walk of docs/data.md from a published name to packs: its commands, with a server of this machine in the place of
the publisher's."""

import io
import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from molmo2_nemo.cli.main import main
from molmo2_nemo.data.loader import PackStream
from molmo2_nemo.settings.compose import compose
from tests.support.servers import zipped

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
WALK = PAGE.split("### A walk: from a name to packs")[1].split("\n## ")[0].replace("\\\n", " ")
ARCHIVE, INSIDE, COUNT = "lupantech-PromptPG-1a2b/data/tabmwp", "/tabmwp.zip", 12


def archive() -> bytes:
    """The repository's archive as its publisher lays it out; one picture is damaged, one is missing."""
    picture = io.BytesIO()
    Image.new("RGB", (120, 80), (200, 60, 30)).save(picture, "PNG")
    problems = {
        str(n): {"question": f"How many are {n} and 1?", "answer": str(n + 1), "split": "train"} for n in range(COUNT)
    }
    pictures = {f"{ARCHIVE}/tables/{n}.png": picture.getvalue() for n in range(1, COUNT)}
    pictures[f"{ARCHIVE}/tables/1.png"] = b"no picture"
    more = {f"{ARCHIVE}/problems_train.json": json.dumps(problems).encode(), f"{ARCHIVE}/README.md": b"other files"}
    return zipped({**more, **pictures})


@pytest.fixture
def place(server, certificate, tmp_path, monkeypatch):
    """An empty folder, and a catalogue with the made server's address."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    server.files[INSIDE] = archive()
    (tmp_path / "mine.yaml").write_text(f"items:\n  tabmwp: {{urls: {server.url}{INSIDE}}}\n")
    return server


def test_the_walk(place, capsys):
    needs, fetch, prepare, preview, train = re.findall(r"^molmo2 (.*?)(?: +#.*)?$", WALK, re.M)
    mine = ["--catalogue", "mine.yaml"]
    assert main([*shlex.split(needs), *mine]) == 0
    said = capsys.readouterr().out
    assert place.url in said and "tabwmp_da" in said and not place.seen
    assert main([*shlex.split(fetch), *mine]) == 0
    said = capsys.readouterr().out
    assert "brought 1 file," in said and Path("raw/tabwmp_da/tables/5.png").is_file()
    assert main([*shlex.split(fetch), *mine]) == 0 and len(place.seen) == 1, "a second call asks nobody"
    capsys.readouterr()
    assert main([*shlex.split(prepare), "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert f"done, {COUNT - 2} records" in said
    assert re.search(r"1  media not found \(the first: 0: ", said), said
    assert re.search(r"1  image cannot be decoded \(the first: 1: ", said), said
    assert main(shlex.split(preview)) == 0 and list(Path().rglob("*.html"))
    packs(shlex.split(train)[1:])


def packs(words: list[str]) -> None:
    """What the walk's training would read: every record, in packs of the run's length."""
    config = compose(words).data
    config.num_workers = 0
    seen: set[str] = set()
    stream = PackStream(config, micro_batch_size=1, dp_rank=0, dp_size=1)
    for _, batch in zip(range(COUNT), stream, strict=False):
        assert batch.input_ids.shape == (1, config.packing.sequence_length) and batch.loss_weights.any()
        seen |= set(batch.keys[0])
    assert seen == {f"tabwmp_da-000000.tar:{n}" for n in range(2, COUNT)} and not stream.tally.skipped()
