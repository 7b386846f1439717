"""Documents that see each other, chunks interleaved, documents by length: against the texts and counts by hand."""

import json
import re
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.data.balance import CostModel
from molmo2_nemo.data.config import DataConfig, LengthRateConfig, PackingConfig, SourceConfig, TextFormatConfig
from molmo2_nemo.data.counts import PackCounts
from molmo2_nemo.data.length_rates import rate_problems
from molmo2_nemo.data.ordering import CostOrder
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.training.step_statistics import task_ids

from .test_loader import same, take
from .test_raw_text import COST, TOKENIZER, asked, record, stream

S = 256
B = TOKENIZER.document_id
CASES = np.random.default_rng(0).integers(0, 2, (20, 100))
# Each document has a letter of its own, in both cases, so that every token tells its document and its place
TEXTS = ["".join("aA"[c].translate({97: 97 + i, 65: 65 + i}) for c in CASES[i][: 10 + 15 * (i % 7)]) for i in range(20)]


def made(tmp_path, mixed=False, **text):
    books = {f"{i:02d}": text for i, text in enumerate(TEXTS)}
    write_shards(tmp_path / "books", ((key, record(text)) for key, text in books.items() if int(key) % 2))
    write_shards(tmp_path / "code", ((key, record(text)) for key, text in books.items() if not int(key) % 2))
    sources = {name: SourceConfig(str(tmp_path / name)) for name in ("books", "code")}
    if mixed:
        write_shards(tmp_path / "chat", ((f"c{i}", asked(i)) for i in range(30)))
        sources["chat"] = SourceConfig(str(tmp_path / "chat"), 2.0)
    settings = TextFormatConfig(**{"document_mask": False, **text})
    return DataConfig(sources=sources, packing=PackingConfig(sequence_length=S, buffer_size=12), text=settings)


def by_example(batch):
    """Input ids, labels, weights and positions of each example of a batch of one pack."""
    arrays = (batch.input_ids, batch.labels, batch.loss_weights, batch.position_ids)
    return [[a[0][batch.example_ids[0] == n].tolist() for a in arrays] for n in range(batch.example_ids.max() + 1)]


@pytest.mark.parametrize("mixed", [False, True])
def test_without_a_mask_documents_are_one_sequence(tmp_path, mixed):
    """The packs are those of the masked run, their documents written one after the other by hand."""
    config = made(tmp_path, mixed)
    masked = take(stream(replace(config, text=TextFormatConfig())), 30)
    shared = 0
    for alone, together in zip(masked, take(stream(config), 30), strict=True):
        examples = by_example(alone)
        documents = [e for e in examples if e[0][0] == B]
        shared += mixed and 1 < len(documents) < len(examples)
        by_hand = [sum((d[i] for d in documents), []) for i in range(3)]
        by_hand.append(list(range(len(by_hand[0]))))
        expected = [e for e in examples if e[0][0] != B] + ([by_hand] if documents else [])
        assert sorted(by_example(together)) == sorted(expected)
        if not mixed:
            ids = [torch.from_numpy(a) for a in (together.example_ids, together.branch_ids)]
            used = len(by_hand[0])
            seen = TokenMask(*ids, torch.zeros_like(ids[0])).rows(0, used, 0, used)[0]
            assert torch.equal(seen, torch.ones(used, used).tril().bool())
            assert PackCounts.of(together).pairs == used * (used + 1) // 2 > PackCounts.of(alone).pairs
        assert sorted(together.keys[0]) == sorted(alone.keys[0])
    assert shared or not mixed


def test_each_token_keeps_its_data_set(tmp_path):
    """Losses are logged by data set: the letters of a token's document say which it is of."""
    config = made(tmp_path, shuffle_chunks=3)
    both = 0
    for batch in take(stream(config), 20):
        found = task_ids(batch, {"books": 1, "code": 2})[0]
        for token, task in zip(batch.input_ids[0].tolist(), found.tolist(), strict=True):
            letter = re.search("[a-tA-T]", TOKENIZER.decode([token])) if token not in (-1, B) else None
            if letter and TOKENIZER.decode([token]) not in "</chunk>":
                assert task == (1 if (ord(letter[0].lower()) - 97) % 2 else 2)
        both += {1, 2} <= set(found.tolist())
    assert both > 10


def documents_of(batch):
    """Of each document of a pack, told by its letter: its text in the inputs, without marks, and its scored labels."""
    texts, labels = defaultdict(str), defaultdict(list)
    ids, weights, own = batch.input_ids[0], batch.loss_weights[0], batch.labels[0]
    start = 0
    for tokens in batch.source_tokens[0]:
        at = slice(start, start + tokens)
        text = re.sub(r"</?chunk \d+>", "", TOKENIZER.decode(ids[at][ids[at] != B]))
        scored = own[at][weights[at] > 0]
        letter = re.search("[a-zA-Z]", text + TOKENIZER.decode(scored[scored != B]))
        if letter:  # else it is the boundary token alone
            texts[letter[0].lower()] += text
            labels[letter[0].lower()] += scored.tolist()
        start += tokens
    assert start == int((batch.example_ids[0] >= 0).sum())
    return texts, labels


def test_chunks_are_interleaved_and_each_document_keeps_its_order(tmp_path):
    config = made(tmp_path, shuffle_chunks=4)
    config.sources = {"books": config.sources["books"]}  # 10 documents: none twice in a pack, mostly
    kinds = Counter()
    for batch in take(stream(config), 60):
        if len(set(batch.keys[0])) < len(batch.keys[0]):
            continue
        texts, labels = documents_of(batch)
        assert len(texts) == len(batch.keys[0])
        for letter, text in texts.items():
            whole = TEXTS[ord(letter) - 97]
            assert text == whole
            assert labels[letter] == [*TOKENIZER.encode(whole), B]  # every target once, and none of a mark
        runs = len(batch.source_tokens[0])
        kinds["cut"] += runs > len(texts)
        assert batch.position_ids[0][: sum(batch.source_tokens[0])].tolist() == list(range(sum(batch.source_tokens[0])))
        written = TOKENIZER.decode(batch.input_ids[0][batch.input_ids[0] >= 0])
        heads, tails = (len(re.findall(mark, written)) for mark in (r"<chunk \d>", r"</chunk \d>"))
        assert heads == tails == runs - len(texts)
        order = re.findall("[a-z]", re.sub(r"</?chunk \d+>|<[^>]*>", "", written).lower())
        kinds["interleaved"] += sum(a != b for a, b in zip(order, order[1:], strict=False)) >= len(texts)
    assert kinds["cut"] > 20 and kinds["interleaved"] > 10, kinds


@pytest.mark.parametrize("cut", [1, 7, 20])
def test_resume_is_bit_identical(tmp_path, cut):
    config = made(tmp_path, mixed=True, shuffle_chunks=4)
    config.sources["books"].length_rates = [LengthRateConfig(30, 4.0)]
    whole = take(stream(config), 30)
    again = stream(config)
    again.load_states([json.loads(json.dumps(whole[cut - 1].state))])
    for a, b in zip(whole[cut:], take(again, 30 - cut), strict=True):
        same(a, b)
        assert a.source_tokens == b.source_tokens and a.state == b.state


def test_workers_and_order_by_cost_change_no_pack(tmp_path):
    config = made(tmp_path, shuffle_chunks=4)
    plain = take(stream(config), 12)
    for a, b in zip(plain, take(stream(replace(config, num_workers=2)), 12), strict=True):
        same(a, b)
    sorted_ = take(CostOrder(stream(config), 4, CostModel(**{**vars_of(COST), "pair": 1e6})), 12)
    key = lambda batch: batch.input_ids.tolist()  # noqa: E731
    for i in range(0, 12, 4):
        assert sorted(map(key, sorted_[i : i + 4])) == sorted(map(key, plain[i : i + 4]))
        pairs = [PackCounts.of(batch).pairs for batch in sorted_[i : i + 4]]
        assert pairs == sorted(pairs, reverse=True)


def vars_of(cost):
    return {name: getattr(cost, name) for name in type(cost).__slots__}


def test_documents_come_as_often_as_their_length_says(tmp_path):
    """Documents of at least 60 tokens in each of 8 epochs, those of 20 to 59 in 4, shorter ones in one."""
    config = made(tmp_path)
    config.sources = {"books": config.sources["books"]}
    tokens = {f"{i:02d}": 1 + len(TOKENIZER.encode(TEXTS[i])) for i in range(1, 20, 2)}
    expected = {key: 8 if n >= 60 else 4 if n >= 20 else 1 for key, n in tokens.items()}
    assert len(set(expected.values())) == 3
    config.sources["books"].length_rates = [LengthRateConfig(0, 0.5), LengthRateConfig(20, 2), LengthRateConfig(60, 4)]
    reader = stream(config).reader
    found, epochs = Counter(), defaultdict(set)
    for n in range(8 * len(tokens)):
        pieces = reader.pieces(n)
        if isinstance(pieces, list):
            key = pieces[0][1].key.rpartition(":")[2]
            found[key] += 1
            epochs[key].add(reader.mixture.draw(n).epoch)
    assert found == expected and all(len(epochs[key]) == count for key, count in expected.items())

    source = stream(config)
    take(source, 40)
    tally = source.tally.totals()
    read = tally["examples"] + tally["documents_passed_over"]
    assert tally["documents_passed_over"] == pytest.approx(read * (1 - sum(expected.values()) / 80), abs=0.1 * read)
    assert not source.skipped and not source.quarantined


def test_rates_that_make_no_sense():
    def problems(*pairs):
        return list(rate_problems("x", [LengthRateConfig(*pair) for pair in pairs]))

    assert not problems() and not problems((0, 1), (10, 0)) and not problems((5, 0))
    assert "x[1].tokens=3: must be more than 5" in problems((5, 1), (3, 1))[0]
    assert "x[0].tokens=-1: must be at least 0" in problems((-1, 1))[0]
    assert "x[0].rate=-2" in problems((0, -2))[0]
    assert "x: every rate is 0" in problems((0, 0), (4, 0))[0]


def test_a_piece_that_fills_its_pack_is_not_cut(tmp_path):
    """There is no room for marks."""
    config = made(tmp_path, shuffle_chunks=8)
    config.packing.sequence_length = 32
    for batch in take(stream(config), 20):
        assert batch.input_ids.shape == (1, 32)
    reader = stream(config).reader
    found = [piece for n in range(20) for _, piece in reader.pieces(n)]
    long = [piece for piece in found if piece.input_ids[0] == B and "piece" in piece.info]
    assert long and all(piece.chunks == [32] for piece in long)
