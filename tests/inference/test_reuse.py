"""Several questions about one medium: decoded once, encoded once, and answered to the bit as without."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig, ImageConfig, VideoConfig
from molmo2_nemo.data.record import Subtitle
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.inference.encoded import EncodedMedia
from molmo2_nemo.inference.prompt import Prompt
from molmo2_nemo.inference.ranks import Place, runs_of
from molmo2_nemo.inference.seen import SeenMedia
from molmo2_nemo.parallel.crops import VisionRanks, VisionUnits, plan_crops
from tests.inference.test_engine import NEW, built, picture, the_tokenizer
from tests.support.films import film
from tests.support.packs import demo_data
from tests.support.pool import start_megatron

QUESTIONS = ("Which animal is it?", "What colour is the house behind it?", "How many?")


class Counting(ExampleBuilder):
    """Counts what it decodes."""

    count = 0

    def decode(self, *args: Any) -> dict[str, Any]:
        self.count += 1
        return super().decode(*args)


@pytest.fixture
def builder() -> Counting:
    config = DataConfig(image=ImageConfig(crop_size=126, margin=2), video=VideoConfig(max_frames=6))
    return Counting(config, Molmo2Tokenizer.load("tiny"), training=False)


def same(one: Any, other: Any) -> bool:
    arrays = ("input_ids", "position_ids", "visual", "crops", "pooling", "unit_crops", "unit_pooled_tokens")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays) and one.info == other.info


def test_questions_about_one_film_decode_it_once(builder):
    seen, shown = SeenMedia(), film(90)
    prompts = [Prompt(QUESTIONS[0], video=shown), Prompt(QUESTIONS[1], video=bytes(bytearray(shown)))]
    prompts.append(Prompt(QUESTIONS[2], video=shown, subtitles=[Subtitle(0.5, 1.0, "a cat")]))
    found = [seen.example(prompt, builder) for prompt in prompts]
    assert (builder.count, seen.decoded, seen.reused) == (1, 1, 2)
    assert all(same(example, prompt.example(builder)) for example, prompt in zip(found, prompts, strict=True))
    assert found[0].crops is found[2].crops and found[2].num_tokens > found[0].num_tokens


def test_what_is_shown_otherwise_is_decoded_again(builder, tmp_path):
    shown, path = film(90), tmp_path / "film.mp4"
    path.write_bytes(shown)
    rng = np.random.default_rng(0)
    images = [picture(rng), picture(rng)]
    fewer = Counting(replace(builder.config, video=VideoConfig(max_frames=3)), builder.tokenizer, training=False)
    steps: list[tuple[Prompt, Counting, bool]] = [
        (Prompt("?", video=shown), builder, False),
        (Prompt("?", video=shown), fewer, False),
        (Prompt("?", video=shown, clip=(0.0, 1.0)), fewer, False),
        (Prompt("?", video=shown, clip=(0.0, 1.0), sampling={"max_fps": 1.0}), fewer, False),
        (Prompt("?", video=path), fewer, False),
        (Prompt("two", video=path), fewer, True),
        (Prompt("?", images), builder, False),
        (Prompt("no picture between"), builder, False),
        (Prompt("two", list(images)), builder, True),
        (Prompt("?", images[::-1]), builder, False),
    ]
    seen = SeenMedia()
    for prompt, own, again in steps:
        before = seen.reused
        assert same(seen.example(prompt, own), prompt.example(own))
        assert seen.reused == before + again
    path.write_bytes(film(60))
    seen.example(Prompt("?", video=path), builder)
    path.write_bytes(film(90, first=5))
    assert same(seen.example(Prompt("?", video=path), builder), Prompt("?", video=path).example(builder))


def test_what_could_not_be_decoded_is_tried_again(builder):
    seen, cut = SeenMedia(), film(90)
    for _ in range(2):
        with pytest.raises(ValueError):
            seen.example(Prompt("?", video=cut[: len(cut) // 3]), builder)
    assert seen.decoded == seen.reused == 0


def batch_of(media: EncodedMedia, *prompts: Any) -> Any:
    found = media.batch(prompts)
    asked = []

    def encode(crops: slice, windows: torch.Tensor) -> torch.Tensor:
        asked.append((crops.start, crops.stop, windows.shape[1]))
        return torch.full((len(windows), 8), float(crops.start))

    return found, encode, asked


def test_visual_tokens_are_kept_by_what_they_follow_from(builder):
    one, two = (Prompt("?", video=film(90, first=n)).example(builder) for n in range(2))
    other = replace(one, pooling=one.pooling[::-1].copy())
    media, words = EncodedMedia(), Prompt("?").example(builder)
    found, encode, asked = batch_of(media, words, one, two, words, one, other)
    windows = torch.zeros(9, 12, dtype=torch.int64)
    for crops in (slice(0, 4), slice(4, 6), slice(6, 12), slice(12, 16), slice(16, 18), slice(18, 22)):
        tokens = found.of(crops, windows, encode)
        expected = crops.start if crops.start not in (12, 16) else crops.start - 12
        assert torch.equal(tokens, torch.full((9, 8), float(expected)))
    width = one.pooling.shape[1]
    assert asked == [(0, 4, width), (4, 6, width), (6, 12, width), (18, 22, width)], "cut to the prompt's own width"
    assert (media.encoded, media.reused) == (4 + 2 + 6 + 4, 4 + 2)


def test_the_oldest_are_let_go(builder):
    examples = [Prompt("?", video=film(90, first=n)).example(builder) for n in range(3)]
    size = 9 * 8 * 4
    media = EncodedMedia(limit=2 * size)
    windows = torch.zeros(9, 9, dtype=torch.int64)
    for number, again in ((0, 0), (1, 0), (0, 6), (2, 0), (1, 0), (2, 6)):
        before = media.reused
        found, encode, _ = batch_of(media, examples[number])
        found.of(slice(0, 6), windows, encode)
        assert media.reused == before + again and media.bytes <= 2 * size
    nothing = EncodedMedia(limit=0)
    for _ in range(2):
        found, encode, asked = batch_of(nothing, examples[0])
        found.of(slice(0, 6), windows, encode)
        assert asked and nothing.reused == nothing.bytes == 0


def test_crops_of_two_packs_are_not_encoded_together():
    counts = torch.tensor([1, 1, 5, 1, 2, 1])  # crops of units, of which packs have three, one, none and two
    units = VisionUnits(
        counts, counts, counts.numpy(), torch.arange(11) + torch.tensor([0] * 7 + [93] + [292] * 3), 4, 100
    )
    for chunk, expected in ((None, [7, 1, 3]), (2, [2, 5, 1, 2, 1])):
        plan = plan_crops(units, VisionRanks(), chunk, by_pack=True)
        assert [crops.stop - crops.start for crops, _ in plan.chunks] == expected
        assert [crops.start for crops, _ in plan.chunks][1:] == [crops.stop for crops, _ in plan.chunks][:-1]
    two = [plan_crops(units, VisionRanks(context=2, rank=rank), by_pack=True) for rank in range(2)]
    assert [crops.stop - crops.start for plan in two for crops, _ in plan.chunks] == [7, 1, 3]


@pytest.mark.parametrize("count", [0, 1, 7, 31, 64, 1000])
@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
def test_every_item_has_one_replica_and_neighbours_stay_together(count, replicas):
    dealt = [runs_of(count, Place(replica, replicas, True)) for replica in range(replicas)]
    assert sorted(item for items in dealt for item in items) == list(range(count))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= max(1, count // (4 * replicas))
    if count == 1000:
        owners = {item: replica for replica, items in enumerate(dealt) for item in items}
        assert sum(owners[i] != owners[i + 1] for i in range(count - 1)) <= (0 if replicas == 1 else count // 8)


def answered(shards: str, limit: int, twice: bool) -> dict[str, Any]:
    """Job: tokens of questions about two films and a picture, hidden states of every batch, and crops encoded.

    Args:
        twice: every question is a batch of its own, and all are asked again.
    """
    from molmo2_nemo.inference.engine import Generator
    from molmo2_nemo.inference.sampling import Sampling
    from tests.support.rerun import rerun

    start_megatron()
    config = demo_data(Path(shards))
    builder, model = ExampleBuilder(config, the_tokenizer(config), training=False), built()
    image = picture(np.random.default_rng(3))
    media = [{"video": film(80)}, {"video": film(50, first=9)}, {"images": [image]}]
    prompts = [Prompt(question, **one) for one in media for question in QUESTIONS]
    generator = Generator(model, builder.tokenizer, batch_tokens=1 if twice else 400)
    generator.media = EncodedMedia(limit)
    examples = [generator.seen.example(prompt, builder) for prompt in prompts]
    hidden, crops, encode, states = [], Counter[str](), model.vision.forward, model.hidden_states

    def counted(pixels: torch.Tensor) -> torch.Tensor:
        crops["encoded"] += len(pixels)
        return encode(pixels)

    def kept(*args: Any) -> torch.Tensor:
        hidden.append(states(*args))
        return hidden[-1]

    model.vision.forward, model.hidden_states = counted, kept
    tokens = [[done.tokens for done in generator.complete(examples, Sampling(NEW))] for _ in range(1 + twice)]
    model.vision.forward, model.hidden_states = encode, states
    return {
        "tokens": tokens,
        "hidden": [one.numpy() for one in hidden],
        "encoded": crops["encoded"],
        "counts": (generator.seen.decoded, generator.seen.reused, generator.media.encoded, generator.media.reused),
        "media": sum(examples[first].num_crops for first in (0, 3, 6)),
        "again": [rerun(model, example, builder.tokenizer, NEW) for example in examples] if not limit else None,
    }


@pytest.mark.parametrize("twice", [False, True], ids=["batches", "one by one"])
def test_the_same_bits_as_without(workers, shards, twice):
    once = workers.run(answered, str(shards), 2**30, twice)[0]
    without = workers.run(answered, str(shards), 0, twice)[0]
    asked = 3 * once["media"] * (1 + twice)
    assert without["encoded"] == asked and once["encoded"] == once["media"]
    assert once["counts"] == (3, 6, once["media"], asked - once["media"])
    assert without["counts"] == (3, 6, asked, 0)
    assert once["tokens"] == without["tokens"] == [without["again"]] * (1 + twice)
    assert len(once["hidden"]) == len(without["hidden"]) > 1
    assert all(np.array_equal(one, other) for one, other in zip(once["hidden"], without["hidden"], strict=True))
