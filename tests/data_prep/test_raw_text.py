"""Raw text from a JSONL file to packs and pages: prepare, check, index, mixture, preview, and what is refused."""

import gzip
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.estimate import text_cost
from data_prep.own_tables import files_below
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.config import DataConfig, SourceConfig
from molmo2_nemo.data.loader import PackStream
from molmo2_nemo.data.manifest import MANIFEST, read_head
from molmo2_nemo.data.record import parse_record
from molmo2_nemo.data.shards import ShardDataset
from molmo2_nemo.data.tally import KINDS
from molmo2_nemo.preview import collect, page
from molmo2_nemo.settings.compose import compose

LONG = "One sentence of a long document follows another. " * 2000  # about 18,000 tokens, by estimate
LIMIT = "data.packing.sequence_length"


def prepare(tmp_path, lines, *options):
    path = tmp_path / "books.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return main(["prepare", str(path), "--out", str(tmp_path / "out"), "--workers", "0", *options])


def skipped(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / "books" / "skipped.jsonl").read_text().splitlines()]


def test_documents_are_stored_whole(tmp_path, capsys):
    texts = [LONG, "A short one with <|endoftext|> in it.\r\n\n  ", "\ufeffgrüße 你好 \u2028 end"]
    lines = [
        {"text": texts[0], "key": "novel"},
        {"text": texts[1], "weight": 0.5},
        {"text": texts[2], "subtitles": None},
    ]
    assert prepare(tmp_path, lines, "--strict") == 0
    data = ShardDataset(tmp_path / "out" / "books")
    records = [parse_record(*data.read(i)) for i in range(3)]
    assert [record.annotations[0].content.text for record in records] == texts
    assert records[0].key.endswith(":novel") and records[1].weight == 0.5
    said = capsys.readouterr().out
    assert f"         1  {KINDS['documents_split'].said(DataConfig())}, by estimate (the first: novel)" in said
    assert main(["shards", "check", str(tmp_path / "out" / "books"), "--workers", "0"]) == 0
    assert "split into several" in capsys.readouterr().out
    assert main(["shards", "check", str(tmp_path / "out" / "books"), "--workers", "0", "--for", f"{LIMIT}=65536"]) == 0
    assert "split into several" not in capsys.readouterr().out
    stored = pq.read_table(tmp_path / "out" / "books" / MANIFEST)["tokens"].to_pylist()
    assert stored == [text_cost([[{"style": "raw_text", "text": text}]]) for text in texts] and stored[0] > 18_000


BAD = [
    ({"text": ""}, "text", "not blank"),
    ({"text": " \n\t "}, "text", "not blank"),
    ({"text": 5}, "text", "text must be a string, not 5"),
    ({"text": ["a", "b"]}, "text", "text must be a string"),
    ({"text": "half \ud800"}, "", "not valid Unicode"),
    ({"text": "a", "caption": "b"}, "text", "is a field of an annotation"),
    ({"text": "a", "image": "cat.jpg"}, "text", "text stands beside image: write caption"),
    ({"text": "a", "titel": "b"}, "titel", "unknown field"),
    ({"text": "a", "weight": 0}, "weight", "above 0"),
    ({"text": "a", "clip": [0, 1]}, "clip", "belongs to a video"),
    ({"annotations": [{"style": "raw_text", "text": "a", "question": "q"}]}, "annotations[0].question", "no question"),
    ({"annotations": [{"style": "raw_text", "text": "a"}] * 2}, "annotations[0].style", "only annotation"),
    ({"variants": [[{"style": "raw_text", "text": "a"}]]}, "variants[0][0].style", "only annotation"),
    ('{"text": "' + "a" * (16 * 2**20) + '"}', "", "data.limits.json_bytes"),
]


@pytest.mark.parametrize("line, field, words", BAD, ids=range(len(BAD)))
def test_documents_that_are_refused(tmp_path, line, field, words):
    assert prepare(tmp_path, [{"text": "good"}, line, {"text": "good too"}]) == 0
    (found,) = skipped(tmp_path)
    assert found["line"] == 2 and words in found["reason"] + ": " + found["detail"]
    assert (found["field"] or "") == field
    assert len(ShardDataset(tmp_path / "out" / "books")) == 2


def test_tars_of_another_tool_with_the_same_json(tmp_path, capsys):
    """A record is as it is stored; the index is made anew from the tar alone."""
    assert prepare(tmp_path, [{"text": LONG}, {"text": "b"}]) == 0
    folder = tmp_path / "foreign"
    folder.mkdir()
    (tar,) = (tmp_path / "out" / "books").glob("*.tar")
    shutil.copy(tar, folder)
    capsys.readouterr()
    assert main(["shards", "index", str(folder), "--workers", "0"]) == 0
    assert "split into several" in capsys.readouterr().out
    assert len(ShardDataset(folder)) == 2 and "documents longer" in " ".join(read_head(folder / MANIFEST)["notes"])


@pytest.fixture
def run(tmp_path):
    chat = tmp_path / "chat.jsonl"
    chat.write_text("\n".join(json.dumps({"question": f"{i}?", "answer": f"{i}"}) for i in range(20)))
    assert main(["prepare", str(chat), "--out", str(tmp_path / "out"), "--workers", "0"]) == 0
    assert prepare(tmp_path, [{"text": LONG, "key": "novel"}, {"text": "</div><script>short"}]) == 0
    cfg = compose(["recipe=tiny", "stage=sft", f"{LIMIT}=1024", "data.packing.buffer_size=4"])
    paths = {name: str(tmp_path / "out" / name) for name in ("books", "chat")}
    cfg.data.sources = {"books": SourceConfig(paths["books"], weight=0.25), "chat": SourceConfig(paths["chat"])}
    return cfg


def test_mixture_and_its_weights(run):
    stream = PackStream(collect.in_process(run), micro_batch_size=1, dp_rank=0, dp_size=1)
    source = iter(stream)
    weights = {"books": set(), "chat": set()}
    for _ in range(40):
        batch = next(source)
        for number, name in enumerate(batch.sources[0]):
            weights[name] |= set(batch.loss_weights[batch.example_ids == number].tolist())
    assert weights["books"] == {0.25} and weights["chat"] > {0.0}
    assert stream.counts["documents_split"] >= 1


def test_preview_shows_documents_and_their_pieces(run, tmp_path):
    view = collect.record(run, "novel")
    assert view.batch.input_ids.shape == (1, 1024)
    total = view.parts[0].example.info["piece"][2]
    assert f"<b>raw text</b>: tokens 1 to 1,024 of {total:,}" in page.tree(view.parts[0])
    views = collect.packs(run, 50)
    shown = "".join(page.tree(part) for view in views for part in view.parts)
    assert f"tokens 1,025 to 2,048 of {total:,}" in shown and f"to {total:,} of {total:,}" in shown
    assert "1024 x 0.25 = 256.00" in shown
    written = page.write_pages(views[:3], run, collect.tokenizer_of(run), tmp_path / "pages", "")[0].read_text()
    assert "raw text" in written and "<script" not in written


def test_a_folder_of_texts_is_one_data_set(tmp_path, capsys):
    """JSON Lines of a corpus, packed or not, and Parquet: each document once, whatever other columns there are."""
    corpus = tmp_path / "corpus"
    lines, parquet = corpus / "lines", corpus / "parquet"
    lines.mkdir(parents=True)
    parquet.mkdir()
    parts = [["one", "two"], ["three"], ["four", "five", "six"]]
    for number, texts in enumerate(parts):
        rows = [{"text": text, "url": f"https://{text}.org", "meta": {"page": number}} for text in texts]
        written = "".join(json.dumps(row) + "\n" for row in rows).encode()
        packed = number == 1
        path = lines / f"part-{number}.jsonl{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(written) if packed else written)
        pq.write_table(pa.Table.from_pylist(rows), parquet / f"part-{number}.parquet")
    for folder in (lines, parquet):
        out = tmp_path / "out" / folder.name
        assert main(["prepare", f"text={folder}", "--out", str(out), "--workers", "0"]) == 0
        said = capsys.readouterr().out
        assert "a field 'url', not read" in said and "a field 'meta', not read" in said
        data = ShardDataset(out / "text")
        found = [parse_record(*data.read(i)).annotations[0].content.text for i in range(len(data))]
        assert found == sum(parts, [])
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.jsonl").write_text('{"body": "a document"}\n')
    assert main(["prepare", f"text={other}", "--out", str(tmp_path / "none")]) == 2
    assert "have a field text, or one that --map names" in capsys.readouterr().err
    (lines / "part-3.jsonl").write_text('{"text": "seven"}\n{"text": ""}\n')
    assert main(["prepare", f"text={lines}", "--out", str(tmp_path / "again"), "--workers", "0"]) == 0
    bad = json.loads((tmp_path / "again" / "text" / "skipped.jsonl").read_text())
    assert (bad["file"], bad["line"], bad["field"]) == ("part-3.jsonl", 2, "text")


def documents(folder):
    data = ShardDataset(folder)
    return [parse_record(*data.read(i)).annotations[0].content.text for i in range(len(data))]


def prepare_texts(tmp_path, corpus, *options):
    assert main(["prepare", f"text={corpus}", "--out", str(tmp_path / "out"), "--workers", "0", *options]) == 0
    return documents(tmp_path / "out" / "text")


def test_a_folder_of_texts_is_read_with_those_below_it(tmp_path, capsys):
    """As SlimPajama comes: files of the same names in folders of chunks, packed by zstandard, and other splits."""
    corpus = tmp_path / "corpus"
    zstd = pa.Codec("zstd")
    for place in ("train/chunk1/a_0", "train/chunk1/a_1", "train/chunk2/a_0", "test/chunk1/a_0", ".cache/x"):
        path = corpus / f"{place}.jsonl.zst"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(zstd.compress(json.dumps({"text": place}).encode() + b"\n{}\n", asbytes=True))
    (corpus / "train" / "again").symlink_to(corpus / "train", target_is_directory=True)
    (corpus / "readme.jsonl").write_text('{"text": "about it"}\n')
    found = prepare_texts(tmp_path, corpus)
    assert found == ["train/chunk1/a_0", "train/chunk1/a_1", "train/chunk2/a_0"]
    said = capsys.readouterr().out
    assert f"not read: the file {corpus / 'readme.jsonl'}" in said
    assert f"not read: 1 file in {corpus / 'test'}\n" in said and ".cache" not in said
    data = ShardDataset(tmp_path / "out" / "text")
    assert len({data.read(i)[0] for i in range(3)}) == 3, "keys of files with the same name"
    bad = [json.loads(line) for line in (tmp_path / "out" / "text" / "skipped.jsonl").read_text().splitlines()]
    places = [("train/chunk1/a_0.jsonl.zst", 2), ("train/chunk1/a_1.jsonl.zst", 2), ("train/chunk2/a_0.jsonl.zst", 2)]
    assert [(one["file"], one["line"]) for one in bad] == places
    assert prepare_texts(tmp_path, corpus / "test", "--overwrite") == ["test/chunk1/a_0"]


def test_parquet_of_texts_is_read_in_folders_below(tmp_path, capsys):
    corpus = tmp_path / "corpus"
    for place in ("2013/part", "2014/part"):
        (corpus / place).parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist([{"text": place, "url": "u"}]), corpus / f"{place}.parquet")
    assert prepare_texts(tmp_path, corpus) == ["2013/part", "2014/part"]
    pq.write_table(pa.Table.from_pylist([{"text": "above"}]), corpus / "part.parquet")
    (corpus / "more.jsonl").write_text('{"text": "lines"}\n')
    assert prepare_texts(tmp_path, corpus, "--overwrite") == ["above"]
    said = capsys.readouterr().out
    for name in ("1 file in {}/2013\n", "1 file in {}/2014\n", "the file {}/more.jsonl\n"):
        assert "not read: " + name.format(corpus) in said
    other = tmp_path / "other"
    for place in ("a", "b"):
        (other / place).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist([{"question": "q", "answer": "a"}]), other / place / "x.parquet")
    capsys.readouterr()
    assert main(["prepare", f"text={other}", "--out", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert "files of folders below it are not read, as they are no texts" in said
    assert f"({other / 'a'}, {other / 'b'})" in said


def test_a_file_or_a_folder_of_texts_that_cannot_be_read_is_named(tmp_path, capsys):
    """As in a download of Hugging Face's that was not finished: its files are links."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.jsonl").write_text(json.dumps({"text": "A document."}) + "\n")
    (corpus / "b.jsonl").symlink_to(tmp_path / "blobs" / "b")
    assert main(["prepare", f"text={corpus}", "--out", str(tmp_path / "out"), "--workers", "0"]) == 2
    assert f"{corpus / 'b.jsonl'}: No such file or directory" in capsys.readouterr().err
    (corpus / "b.jsonl").unlink()
    with pytest.raises(OSError, match="x" * 300):
        files_below(corpus / ("x" * 300), (".jsonl",))
