"""The loss of one long document in pieces, packed and spread over ranks: that of each piece alone on one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.model.oracle import build, fixture_config, fixture_weights, run_schedule
from tests.support.pool import start_megatron

torch.set_num_threads(1)
LENGTH = 72  # of a pack
TEXT = "A long document, <|endoftext|> not its end, that no pack of this test holds. " * 9


def pieces() -> list[Any]:
    """Of a long document, and a short document whole."""
    from molmo2_nemo.data.annotation_json import read_annotation
    from molmo2_nemo.data.build import ExampleBuilder
    from molmo2_nemo.data.config import DataConfig
    from molmo2_nemo.data.pieces import split
    from molmo2_nemo.data.record import Record
    from molmo2_nemo.data.tokenizer import Molmo2Tokenizer

    builder = ExampleBuilder(DataConfig(), Molmo2Tokenizer.load("tiny"))
    found = []
    for text in (TEXT, "Short."):
        record = Record("k", annotations=[read_annotation({"style": "raw_text", "text": text}, 0, False)])
        found += [piece for _, piece in split(0, builder.plan(record, np.random.default_rng(0)), LENGTH)]
    return found


def packed(examples: list[Any]) -> list[Any]:
    """Packs of the pieces in turn; the last two examples share one."""
    from molmo2_nemo.data.collate import collate
    from molmo2_nemo.model.inputs import PackInputs

    patch = fixture_config("tiny").text.vocab_size + 2
    rows = [*([one] for one in examples[:-2]), examples[-2:]]
    return [PackInputs.from_batch(collate([r], sequence_length=LENGTH, im_patch_id=patch)) for r in rows]


def loss_job(layout: dict[str, int]) -> float:
    """Of all packs, the way training computes it."""
    start_megatron(**layout)
    config = fixture_config("tiny")
    model = build(config, fixture_weights("tiny", config)).eval()
    return sum(float(loss) for loss in run_schedule(model, packed(pieces()), backward=False))


def oracle_job() -> tuple[float, list[int]]:
    """Sum over every piece alone of torch's cross entropy, in float64, and the tokens of each."""
    from molmo2_nemo.data.collate import collate
    from molmo2_nemo.model.inputs import PackInputs

    start_megatron()
    config = fixture_config("tiny")
    model = build(config, fixture_weights("tiny", config)).eval()
    total = 0.0
    for one in pieces():
        batch = collate([[one]], sequence_length=one.num_tokens, im_patch_id=config.text.vocab_size + 2)
        batch.labels = batch.loss_weights = None
        with torch.no_grad():
            logits = model(PackInputs.from_batch(batch))[0].double()
        total += float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(one.labels), reduction="sum"))
    return total, [one.num_tokens for one in pieces()]


@pytest.mark.parametrize("layout", [{}, {"context": 2}, {"tensor": 2}])
def test_loss_of_a_document_in_pieces(workers, layout):
    expected, tokens = workers.run(oracle_job)[0]
    assert len(tokens) > 4 and tokens[:-2] == [LENGTH] * (len(tokens) - 2) and sum(tokens[-2:]) < LENGTH
    losses = workers.run(loss_job, layout, ranks=2 if layout else 1)
    if "context" in layout:  # each rank has the loss of its own tokens
        losses = [sum(losses)]
    assert losses == pytest.approx([expected] * len(losses), rel=1e-6)
