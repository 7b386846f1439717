"""Generation from a cache against the whole sequence run again for every token: the same tokens, under every layout."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.packs import demo_data
from tests.support.pool import start_megatron
from tests.support.thorough import THOROUGH, thorough

NEW = 6  # tokens of an answer
SHARPER = 4  # than drawn: weights of the decoder and connector
TOGETHER = 1200 if THOROUGH else 500  # tokens of a batch
KINDS = ("text", "image", "images", "video", "subtitles", "branches")
WORDS = "which animal sits behind that small red house under an old tree and looks at seven birds".split()


def sentence(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(3, 40))) + "?"


def picture(rng: np.random.Generator) -> bytes:
    file, (width, height) = io.BytesIO(), rng.integers(60, 300, 2)
    Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def made(kind: str, count: int, shards: Any) -> list[Any]:
    """Random prompts of a kind, as examples; "branches": the first answer of a tree's other branches is not seen."""
    from molmo2_nemo.data.build import ExampleBuilder
    from molmo2_nemo.data.record import Subtitle
    from molmo2_nemo.inference.generate import first_turn
    from tests.support.films import film

    config = demo_data(shards)
    tokenizer = the_tokenizer(config)
    builder = ExampleBuilder(config, tokenizer, training=False)
    rng = np.random.default_rng(sum(map(ord, kind)))
    found = []
    for number in range(count):
        if kind == "branches":
            found.append(first_turn(branched(builder, rng, number))[0])
            continue
        images = [picture(rng) for _ in range({"image": 1, "images": int(rng.integers(2, 4))}.get(kind, 0))]
        video = None
        if kind in ("video", "subtitles"):
            video = film(int(rng.integers(20, 90)), first=number)
        lines = [Subtitle(float(t), float(t) + 1, sentence(rng)) for t in range(2)] if kind == "subtitles" else []
        found.append(builder.prompt(images, video, sentence(rng), subtitles=lines))
    return found


def branched(builder: Any, rng: np.random.Generator, number: int) -> Any:
    """A training example of three branches whose only scored answer is the last one's."""
    import json

    from molmo2_nemo.data.record import parse_record

    annotations = [{"style": "user_qa", "question": sentence(rng), "answer": sentence(rng)} for _ in range(3)]
    members = {"json": json.dumps({"images": ["png"], "annotations": annotations}).encode(), "png": picture(rng)}
    record = parse_record(f"r{number}", members)
    example = builder.plan(record, rng)
    example.make_room()
    example.info |= builder.decode(record, example.info.get("images"), example.crops)
    example.loss_weights = np.where(example.branch_ids == example.branch_ids.max(), example.loss_weights, 0)
    return example


def the_tokenizer(config: Any) -> Any:
    from molmo2_nemo.data.tokenizer import Molmo2Tokenizer

    return Molmo2Tokenizer.load(config.tokenizer, vocab_size=config.vocab_size)


def built(**context: Any) -> Any:
    """The tiny model on this job's groups."""
    from megatron.core import parallel_state

    from molmo2_nemo.model.config import preset
    from molmo2_nemo.model.decoder import transformer_config
    from molmo2_nemo.model.molmo2 import Molmo2Model
    from molmo2_nemo.parallel.context import ContextSettings

    molmo2 = preset("tiny")
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    config = transformer_config(
        molmo2,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tensor,
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        sequence_parallel=context.pop("sequence", False),
    )
    model = Molmo2Model(molmo2, config, context=ContextSettings(**context), seed=5).eval()
    with torch.no_grad():  # as drawn, a model says the same whatever it is asked
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "vision" not in name:
                parameter *= SHARPER
    return model


def both_ways(kind: str, count: int, shards: Any) -> tuple[list[list[int]], list[list[int]], int]:
    """Tokens by the cache, by running again, and how many batches the cache's prompts shared."""
    from molmo2_nemo.inference.engine import Generator, batches
    from molmo2_nemo.inference.sampling import Sampling
    from tests.support.rerun import rerun

    start_megatron()
    prompts, model, tokenizer = made(kind, count, shards), built(), the_tokenizer(demo_data(shards))
    generator = Generator(model, tokenizer, batch_tokens=TOGETHER)
    done = generator.complete(prompts, Sampling(NEW))
    again = [rerun(model, prompt, tokenizer, NEW) for prompt in prompts]
    return [c.tokens for c in done], again, len(list(batches([p.num_tokens for p in prompts], TOGETHER)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_as_running_again(workers, shards, kind):
    count = 50 if THOROUGH else 12
    cached, again, shared = workers.run(both_ways, kind, count, shards)[0]
    assert cached == again
    assert 1 < shared < count and len({tuple(tokens) for tokens in again}) > count / 5


def answered(count: int, shards: Any, layout: dict[str, int], context: dict[str, Any]) -> list[list[int]]:
    from molmo2_nemo.inference.engine import Generator
    from molmo2_nemo.inference.sampling import Sampling

    start_megatron(**layout)
    prompts = [prompt for kind in KINDS for prompt in made(kind, count, shards)]
    generator = Generator(built(**context), the_tokenizer(demo_data(shards)), batch_tokens=2048)
    return [completion.tokens for completion in generator.complete(prompts, Sampling(NEW))]


@pytest.mark.parametrize(
    ("layout", "context"),
    [
        thorough({"tensor": 2}, {}),
        ({"tensor": 2}, {"sequence": True}),
        thorough({"context": 2}, {}),
        ({"context": 2}, {"ulysses": 1}),
        ({"tensor": 2, "context": 2}, {"sequence": True, "ulysses": 1, "cp_comm_type": "all_gather"}),
    ],
)
def test_the_same_tokens_under_every_layout(workers, shards, layout, context):
    alone = workers.run(answered, 3, shards, {}, {})[0]
    ranks = layout.get("tensor", 1) * layout.get("context", 1)
    assert workers.run(answered, 3, shards, layout, context, ranks=ranks) == [alone] * ranks
