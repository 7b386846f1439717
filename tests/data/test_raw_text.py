"""Raw text: which tokens are scored, where documents are split, resume in the middle of one, mixtures, bad documents.

The oracle is a brute force over the texts alone: the tokenizer's ids between two boundary tokens, cut every S.
"""

import json
from dataclasses import replace

import numpy as np
import pytest

from molmo2_nemo.data.annotation_json import read_annotation
from molmo2_nemo.data.balance import CostModel
from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig, LimitsConfig, PackingConfig, PhaseConfig, SourceConfig
from molmo2_nemo.data.json_values import FieldError
from molmo2_nemo.data.loader import PackStream
from molmo2_nemo.data.ordering import CostOrder
from molmo2_nemo.data.pieces import of_piece, piece_number, without
from molmo2_nemo.data.reader import ExampleReader
from molmo2_nemo.data.record import BadRecord, Record, parse_record
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.data.states import unread
from molmo2_nemo.data.tally import Tally
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.training.validation import packs as validation_packs

from .test_loader import same, take

TOKENIZER = Molmo2Tokenizer.load("tiny")
BOUNDARY = TOKENIZER.token(TOKENIZER.document_id)
S = 64
COST = CostModel(token=1e6, pair=1e5, crop=5e6, pooled_token=0, window_position=0, score=0)


def words(tokens, seed=0):
    """A text of that many tokens exactly."""
    rng = np.random.default_rng(seed)
    text = "".join(chr(97 + int(i)) for i in rng.integers(0, 26, 3 * tokens))
    while len(TOKENIZER.encode(text)) > tokens:
        text = text[:-1]
    while len(TOKENIZER.encode(text)) < tokens:
        text += "~"
    assert len(TOKENIZER.encode(text)) == tokens
    return text


def brute_force(text, length=S):
    """(inputs, labels) of every piece."""
    whole = [TOKENIZER.document_id, *TOKENIZER.encode(text), TOKENIZER.document_id]
    inputs, labels = whole[:-1], whole[1:]
    return [(inputs[i : i + length], labels[i : i + length]) for i in range(0, len(inputs), length)]


def record(text, **fields):
    return {"json": json.dumps({"annotations": [{"style": "raw_text", "text": text}], **fields}).encode()}


def asked(number):
    return {
        "json": json.dumps({"annotations": [{"style": "user_qa", "question": "q", "answer": f"a {number}"}]}).encode()
    }


LENGTHS = [1, S - 2, S - 1, S, S + 1, 2 * S - 1, 2 * S, 5 * S + 7, 9 * S, 3, 20, 40]  # tokens of the documents
TEXTS = [words(n, seed) for seed, n in enumerate(LENGTHS)]


def made(tmp_path, texts=TEXTS, mixed=False, **packing):
    write_shards(tmp_path / "books", ((f"{i:04d}", record(text)) for i, text in enumerate(texts)), records_per_shard=5)
    sources = {"books": SourceConfig(str(tmp_path / "books"))}
    if mixed:
        write_shards(tmp_path / "chat", ((f"{i:04d}", asked(i)) for i in range(30)), records_per_shard=20)
        sources["chat"] = SourceConfig(str(tmp_path / "chat"), 2.0)
    return DataConfig(sources=sources, packing=PackingConfig(sequence_length=S, buffer_size=5, **packing))


def stream(config, rank=0, size=1, micro=1):
    return PackStream(config, micro_batch_size=micro, dp_rank=rank, dp_size=size)


def parts(batches):
    """(key, inputs, labels, weights, positions) of every example of the batches, in the order packed."""
    for batch in batches:
        for b, keys in enumerate(batch.keys):
            for number, key in enumerate(keys):
                at = batch.example_ids[b] == number
                arrays = (batch.input_ids, batch.labels, batch.loss_weights, batch.position_ids)
                yield key, *(array[b][at].tolist() for array in arrays)


def documents(config, count):
    """Key -> text of the first `count` records of the stream, in their order."""
    reader = stream(config).reader
    found = {}
    for n in range(count):
        draw = reader.mixture.draw(n)
        key, members = reader.datasets[draw.source].read(draw.index)
        fields = json.loads(members["json"])["annotations"][0]
        if "text" in fields:
            found[key] = fields["text"]
    return found


# --- what is scored --------------------------------------------------------------------------------------------------


def test_every_token_but_the_first_is_scored_once_and_pieces_are_whole(tmp_path):
    config = made(tmp_path)
    texts = documents(config, len(TEXTS))
    assert sorted(texts.values()) == sorted(TEXTS)
    reader = stream(config).reader
    for n in range(len(TEXTS)):
        pieces = reader.pieces(n)
        expected = brute_force(texts[pieces[0][1].key])
        assert [p.num_tokens for _, p in pieces[:-1]] == [S] * (len(expected) - 1)
        for (_, piece), (inputs, labels) in zip(pieces, expected, strict=True):
            assert piece.input_ids.tolist() == inputs and piece.labels.tolist() == labels
            assert piece.loss_weights.tolist() == [1.0] * len(inputs)
            assert piece.position_ids.tolist() == list(range(len(inputs)))


def test_packs_hold_each_target_of_an_epoch_once(tmp_path):
    config = made(tmp_path)
    left = [(key, *piece) for key, text in documents(config, len(TEXTS)).items() for piece in brute_force(text)]
    source = iter(stream(config))
    for _ in range(40):
        for key, inputs, labels, weights, positions in parts([next(source)]):
            assert set(weights) == {1.0} and positions == list(range(len(inputs)))
            if (key, inputs, labels) in left:
                left.remove((key, inputs, labels))
    assert not left


@pytest.mark.parametrize("tokens, pieces", [(S - 2, 1), (S - 1, 1), (S, 2), (2 * S - 1, 2), (2 * S, 3)])
def test_where_a_document_is_split(tmp_path, tokens, pieces):
    """A document of n tokens has n + 1 inputs: the boundary token before it, and its own."""
    config = made(tmp_path, [words(tokens)])
    found = stream(config).reader.pieces(0)
    assert len(found) == pieces and sum(p.num_tokens for _, p in found) == tokens + 1
    assert found[-1][1].labels[-1] == TOKENIZER.document_id == found[0][1].input_ids[0]


def test_special_tokens_in_a_text_stay_text():
    text = f"a {BOUNDARY} b <|im_end|> <im_patch> c"
    example = ExampleBuilder(DataConfig(), TOKENIZER).build(
        Record("k", annotations=raw(text)), np.random.default_rng(0)
    )
    special = {TOKENIZER.document_id, TOKENIZER.eos_id, TOKENIZER.chat_start_id, *TOKENIZER.visual_ids}
    assert not special & set(example.input_ids[1:].tolist()) and not special & set(example.labels[:-1].tolist())
    assert TOKENIZER.decode(example.labels[:-1]) == text and not example.visual.any()


def raw(text):
    return [read_annotation({"style": "raw_text", "text": text}, 0, False)]


def test_weights(tmp_path):
    builder, rng = ExampleBuilder(DataConfig(), TOKENIZER), np.random.default_rng(0)

    def weight(source=None, **fields):
        return set(builder.build(Record("k", annotations=raw("a b c"), **fields), rng, weight=source).loss_weights)

    assert weight() == {1.0} and weight(weight=0.5) == {0.5} and weight(weight_factor=2.0) == {2.0}
    assert weight(0.25, weight=0.5) == {0.25} and weight(0.25, weight_factor=2.0) == {0.25}


def test_a_tokenizer_without_a_boundary_token_uses_the_end_token():
    text = TOKENIZER._special_aware.to_str().replace("<|endoftext|>", "<|other|>")
    from tokenizers import Tokenizer

    other = Molmo2Tokenizer(Tokenizer.from_str(text), {"eos_token": "<|im_end|>"}, vocab_size=TOKENIZER.vocab_size)
    assert other.document_id == other.eos_id
    assert BOUNDARY == "<|endoftext|>" and TOKENIZER.document_id != TOKENIZER.eos_id


def other_tokenizer(pre_tokenizer):
    """The tiny tokenizer with another way to find words; None: merges go over the ends of words."""
    from tokenizers import Tokenizer

    fields = json.loads(TOKENIZER._special_aware.to_str())
    fields["pre_tokenizer"] = pre_tokenizer
    return Molmo2Tokenizer(Tokenizer.from_str(json.dumps(fields)), TOKENIZER.config)


WAYS = {
    "Qwen's": TOKENIZER,
    "GPT-2's": other_tokenizer(
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    ),
    "a space before": other_tokenizer(
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    ),
    "no words": other_tokenizer(
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("window", [1, 7, 50, 400])
def test_a_document_is_encoded_in_parts_as_in_one(way, window):
    """Oracle: the library, on the whole text."""
    rng = np.random.default_rng(0)
    bits = [
        "the",
        " words",
        " of",
        "\n",
        "\n\n",
        "  ",
        "\t",
        "12",
        " 3",
        ".",
        " don't",
        "é",
        "e\u0301",
        "你好",
        "。\n",
        "🙂",
        "_",
    ]
    bits += ["<|endoftext|>", " <im_patch>", "\r\n", "\u2028", "a" * 90, "\n你"]
    for _ in range(10):
        text = "".join(rng.choice(bits, 120))
        found = WAYS[way].encode_document(text, window)
        assert found.dtype == np.int64 and found.tolist() == WAYS[way].encode(text)


def test_parts_of_a_document_are_short(monkeypatch):
    sizes = []
    plain = TOKENIZER.encode
    monkeypatch.setattr(TOKENIZER, "encode", lambda text: sizes.append(len(text)) or plain(text))
    TOKENIZER.encode_document("some words of a text, " * 500, 300)
    assert max(sizes) < 320 and sum(size > 150 for size in sizes) > 20
    assert TOKENIZER.encode_document("").tolist() == []


# --- the stream ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["balanced", "knapsack"])
@pytest.mark.parametrize("rank, size", [(0, 1), (1, 2)])
def test_resume_in_the_middle_of_a_document(tmp_path, mode, rank, size):
    config = made(tmp_path, mixed=True, mode=mode)
    runs = [take(stream(config, r, size), 40) for r in range(size)]
    inside = 0
    for cut in range(1, 30, 2):
        states = json.loads(json.dumps([run[cut - 1].state for run in runs]))
        inside += any(of_piece(number)[1] for number in states[rank]["backlog"])
        again = stream(config, rank, size)
        again.load_states(states)
        assert json.loads(json.dumps(again.state())) == states[rank]
        for a, b in zip(runs[rank][cut:], take(again, 6), strict=False):
            same(a, b)
    assert inside, "no cut fell into a document"


@pytest.mark.parametrize("before, after", [(2, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("window", [0, 4])
def test_another_number_of_ranks_loses_and_repeats_nothing(tmp_path, before, after, window):
    """Every token is used before the change, after it, or left for later, and only once."""
    config = made(tmp_path)

    def opened(rank, size):
        one = stream(config, rank, size)
        return CostOrder(one, window, COST) if window else one

    def run(one, count):
        """The tokens that its batches use, as (number of the record, token)."""
        source = iter(one)
        for _ in range(count):
            next(source)
            for seen in (one.stream if window else one).seen:
                record, start, end = of_piece(seen.number)
                yield from ((record, t) for t in range(start, end or sizes(record)))

    reader = stream(config).reader

    def sizes(record):
        return sum(piece.num_tokens for _, piece in reader.pieces(record))

    split = 0
    for cut in (1, 2, 3, 5, 6):
        first = [opened(r, before) for r in range(before)]
        used = [token for one in first for token in run(one, cut)]
        states = json.loads(json.dumps([one.state() for one in first]))
        later = [opened(r, after) for r in range(after)]
        for one in later:
            one.load_states(states)
        split += sum(of_piece(n)[1] > 0 for one in later for n in (one.stream if window else one).place.backlog)
        used += [token for one in later for token in run(one, 15)]
        left, start = unread(json.loads(json.dumps([one.state() for one in later])))
        used += [(n, t) for n, at, end in map(of_piece, left) for t in range(at, end or sizes(n))]
        assert len(used) == len(set(used)), "no token twice"
        assert set(used) == {(n, t) for n in range(start) for t in range(sizes(n))}, "none left out"
    assert split


def test_used_pieces_are_taken_from_what_is_left():
    """Oracle: sets of (record, token)."""
    total = 50

    def tokens(number):
        record, start, end = of_piece(number)
        return {(record, t) for t in range(start, end or total)}

    rng = np.random.default_rng(0)
    for _ in range(300):
        edges = [0, *sorted(rng.choice(np.arange(1, total), 4, replace=False).tolist()), 0]
        pieces = [piece_number(7, a, b) for a, b in zip(edges, edges[1:], strict=False)]
        used = [p for p in pieces if rng.random() < 0.5]
        start = int(rng.integers(0, 5))
        whole = [7] if start == 0 else pieces[:start] + [piece_number(7, edges[start], 0)]
        left = without([*whole, 3, 9], [*used, 9])
        assert set().union(*map(tokens, left)) == tokens(3) | (tokens(7) - set().union(set(), *map(tokens, used)))
        assert sum(len(tokens(n)) for n in left) == len(set().union(*map(tokens, left)))


def test_plain_numbers_are_as_before():
    assert without({5, 1, 3}, [3]) == [1, 5] and piece_number(12, 0, 0) == 12


def test_packs_that_grow_split_the_rest_of_a_document_anew(tmp_path):
    text = "some words of a long text, and " * 180
    config = replace(made(tmp_path, [text]), progression=[PhaseConfig(6, S // 4), PhaseConfig(12, S // 2)])
    run = take(stream(config), 20)
    whole = [TOKENIZER.document_id, *TOKENIZER.encode(text), TOKENIZER.document_id]
    got = [token for _, inputs, *_ in parts(run) for token in inputs]
    assert got == whole[: len(got)], "in order, none twice, none left out"
    assert [batch.input_ids.shape[1] for batch in run] == [S // 4] * 6 + [S // 2] * 6 + [S] * 8
    for cut in (3, 6, 9, 12, 15):
        again = stream(config)
        again.load_states([json.loads(json.dumps(run[cut - 1].state))])
        for a, b in zip(run[cut:], take(again, 20 - cut), strict=True):
            same(a, b)


def test_worker_processes_change_nothing(tmp_path):
    config = made(tmp_path, mixed=True)
    for a, b in zip(take(stream(config), 12), take(stream(replace(config, num_workers=1)), 12), strict=True):
        same(a, b)


def test_mixture_with_other_sources(tmp_path):
    config = made(tmp_path, mixed=True)
    run = take(stream(config), 60)
    assert {source for batch in run for pack in batch.sources for source in pack} == {"books", "chat"}
    assert any(len({*pack}) == 2 for batch in run for pack in batch.sources), "they share packs"


def test_split_documents_are_counted_once(tmp_path):
    config = made(tmp_path)
    one = stream(config)
    reader = one.reader
    take(one, 30)
    taken = [n for n in range(one.place.position) if len(reader.pieces(n)) > 1]
    assert one.counts["documents_split"] == len(taken) > 2
    again = stream(config)
    again.load_states([json.loads(json.dumps(one.state()))])
    assert again.counts == one.counts
    table = " ".join(" ".join(one.tally.table(config)).split())
    assert "documents longer than a sequence, split into several (data.packing.sequence_length=64)" in table
    assert one.tally.found["books", "documents_split"].first[0] == taken[0]


def test_validation_reads_every_piece(tmp_path):
    config = made(tmp_path)
    one = stream(config).reader
    reader = ExampleReader(config, one.builder, one.im_patch_id)
    tally = Tally()
    batches = list(validation_packs(reader, range(len(TEXTS)), config.packing, tally))
    assert not tally.skipped() and tally.totals()["examples"] >= len(TEXTS)
    assert sum(int((b.loss_weights > 0).sum()) for b in batches) == sum(LENGTHS) + len(LENGTHS)


def test_a_shorter_pack_than_at_the_checkpoint_is_refused_or_read_anew(tmp_path):
    """What waits cannot be split again; the rest of the document can."""
    config = made(tmp_path, [words(3 * S + 30), words(20)])
    state = json.loads(json.dumps(take(stream(config), 4)[-1].state))
    small = replace(config, packing=replace(config.packing, sequence_length=16))
    again = stream(small)
    again.load_states([state])
    waits = [number for number, _ in state["packer"]["waiting"] if of_piece(number)[1]]
    assert waits
    with pytest.raises(Exception, match=r"must not become smaller"):
        take(again, 1)


# --- records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"text": ""}, "blank"),
        ({"text": " \n\t"}, "blank"),
        ({"text": "half \ud800 a character"}, "half a character"),
    ],
)
def test_documents_that_cannot_be_trained(fields, says):
    builder = ExampleBuilder(DataConfig(), TOKENIZER)
    annotations = [read_annotation({"style": "raw_text", **fields}, 0, False)]
    with pytest.raises(BadRecord, match=says) as error:
        builder.plan(Record("k", annotations=annotations), np.random.default_rng(0))
    assert error.value.cause == "bad annotation"


@pytest.mark.parametrize(
    "fields", [{"text": 5}, {}, {"text": "a", "question": "q"}, {"text": "a", "messages": ["a", "b"]}]
)
def test_fields_of_raw_text(fields):
    with pytest.raises(FieldError):
        read_annotation({"style": "raw_text", **fields}, 0, False)


RAW = {"style": "raw_text", "text": "a"}
QA = {"style": "user_qa", "question": "q", "answer": "a"}


@pytest.mark.parametrize(
    "data",
    [
        {"annotations": [RAW, QA]},
        {"annotations": [RAW, RAW]},
        {"annotations": [RAW], "images": ["0.png"]},
        {"annotations": [RAW], "video": "mp4"},
        {"variants": [[RAW], [QA]]},
        {"annotations": [{**QA, "turns": [RAW]}]},
        {"annotations": [{"style": "raw_text", "either": [{"text": "a"}, {"text": "b"}]}]},
        {"annotations": [{**QA, "either": [QA, RAW]}]},
        {"annotations": [{**QA, "turns": [{"either": [QA, RAW]}]}]},
    ],
)
def test_raw_text_stands_alone(data):
    members = {"json": json.dumps(data).encode(), "0.png": b"x", "mp4": b"x"}
    with pytest.raises(BadRecord, match="only annotation of a record"):
        parse_record("k", members)


def test_long_documents_are_limited_by_their_json_alone(tmp_path):
    text = "word " * 260_000  # more than data.limits.text_chars, which is for messages
    example = ExampleBuilder(DataConfig(), TOKENIZER).plan(Record("k", annotations=raw(text)), np.random.default_rng(0))
    assert example.num_tokens == len(TOKENIZER.encode(text)) + 1
    with pytest.raises(BadRecord, match=r"data\.limits\.json_bytes"):
        parse_record("k", record(text), max_json_bytes=LimitsConfig(json_bytes=1000).json_bytes)
