"""A frozen encoder whose crops are computed once: bits, counts, and what makes features others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from molmo2_nemo.data.config import FeatureCacheConfig
from molmo2_nemo.errors import UserError
from molmo2_nemo.features.frozen import Counts, FrozenFeatures
from molmo2_nemo.features.store import HEADER
from molmo2_nemo.model.config import VisionConfig, preset
from molmo2_nemo.model.vision import VisionEncoder

TINY = preset("tiny").vision
WIDE = VisionConfig(num_layers=2, feature_layers=(-1,))  # published widths, where fp32 rows differ by their company


def made(config: VisionConfig = TINY, dtype: torch.dtype = torch.float32, seed: int = 0) -> VisionEncoder:
    torch.manual_seed(seed)
    encoder = VisionEncoder(config, dtype)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, 0, 0.05)
    return encoder.requires_grad_(False)


def frozen(encoder: VisionEncoder, folder: object, **options: object) -> FrozenFeatures:
    vision = encoder.config
    config = FeatureCacheConfig(None if folder is None else str(folder), keep_free_gib=0, **options)  # type: ignore
    return FrozenFeatures(encoder, (vision.num_patches, vision.feature_size), config, (vision,))


def some(count: int, config: VisionConfig = TINY, seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randint(0, 256, (count, config.num_patches, config.patch_dim), dtype=torch.uint8)


def encoded(features: FrozenFeatures, crops: torch.Tensor, chunk: int | None = None) -> torch.Tensor:
    """All crops as a run, in chunks, each encoded twice as in training that recomputes."""
    found, parts = features.look_up(crops), []
    for start in range(0, len(crops), chunk or len(crops)):
        at = slice(start, min(len(crops), start + (chunk or len(crops))))
        parts.append(features.encode(crops[at], found, at))
        assert torch.equal(features.encode(crops[at], found, at), parts[-1])
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [None, 2])
def test_second_time_from_disk_with_the_same_bits(tmp_path, dtype, chunk):
    encoder, crops = made(dtype=dtype), some(5)
    first = frozen(encoder, tmp_path)
    want = encoder(crops)
    assert torch.equal(encoded(first, crops, chunk), want)
    first.close()
    entry = HEADER.size + want[0].numel() * dtype.itemsize
    assert first.counts == Counts(misses=5, written=5 * entry)
    again = frozen(encoder, tmp_path)
    encoder.forward = None  # type: ignore  # not called
    assert torch.equal(encoded(again, crops.flip(0), chunk), want.flip(0))
    assert again.counts == Counts(hits=5, read=5 * entry)
    again.close()


def test_some_from_disk(tmp_path):
    encoder, crops = made(), some(6)
    first = frozen(encoder, tmp_path)
    encoded(first, crops[1:4])
    first.close()
    again = frozen(encoder, tmp_path)
    assert torch.equal(encoded(again, crops), encoder(crops))
    again.close()
    assert (again.counts.hits, again.counts.misses) == (3, 3)


@pytest.mark.parametrize("together", [1, 3])
def test_groups_of_a_fixed_size_are_the_same_with_and_without(tmp_path, together):
    """At published widths a row's bits may depend on how many there are, so `together` is compared, not the batch."""
    encoder, crops = made(WIDE), some(4, WIDE)
    without = frozen(encoder, None, together=together)
    want = encoded(without, crops)
    assert without.counts == Counts(misses=4)
    groups = torch.cat((crops, crops.new_zeros(2, *crops.shape[1:])))
    size = 1 if together == 1 else 3
    plain = torch.cat([encoder(groups[i : i + size]) for i in range(0, 6 if size == 3 else 4, size)])[:4]
    assert torch.equal(want, plain)
    kept = frozen(encoder, tmp_path, together=together)
    assert torch.equal(encoded(kept, crops), want)
    kept.close()
    again = frozen(encoder, tmp_path, together=together)
    assert torch.equal(encoded(again, crops), want) and again.counts.hits == 4
    if together == 1:  # in other company
        assert torch.equal(encoded(again, torch.cat((some(1, WIDE, 5), crops[2:])))[1:], want[2:])
    again.close()


def test_what_makes_features_others(tmp_path):
    crops = some(2)
    plain = made()
    names = set()
    changed = made()
    with torch.no_grad():
        changed.blocks[2].mlp.fc2.bias[3] += 1e-3
    wide = replace(TINY, layernorm_eps=1e-5)
    eps = VisionEncoder(wide).requires_grad_(False)
    eps.load_state_dict(plain.state_dict())
    stores = [
        *(frozen(encoder, tmp_path) for encoder in (plain, changed, eps, made(dtype=torch.bfloat16))),
        frozen(plain, tmp_path, together=2),
    ]
    for features in stores:
        encoded(features, crops)
        assert features.counts.hits == 0 and features.counts.misses == 2
        store = features.store()
        assert store is not None
        names.add(store.own.name)
        features.close()
    assert len(names) == len(stores)
    same = frozen(made(), tmp_path)
    encoded(same, crops)
    assert same.counts.hits == 2
    same.close()


def test_a_damaged_entry_is_computed_again_counted_and_said(tmp_path, capsys):
    encoder, crops = made(), some(4)
    first = frozen(encoder, tmp_path)
    encoded(first, crops)
    first.close()
    path = sorted(p for p in tmp_path.rglob("*") if p.is_file())[2]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    again = frozen(encoder, tmp_path)
    assert torch.equal(encoded(again, crops), encoder(crops))
    again.close()
    counts = again.counts
    assert (counts.hits, counts.misses, counts.damaged) == (3, 1, 1) and counts.written == len(content)
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize(("damaged", "rest"), [(3, None), (4, "and 1 more damaged ones: 4 in all"), (6, "and 3 more")])
def test_of_many_damaged_entries_the_rest_is_counted(damaged, rest, tmp_path, capsys):
    encoder, crops = made(), some(6)
    first = frozen(encoder, tmp_path)
    encoded(first, crops)
    first.close()
    paths = sorted(p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size > HEADER.size)[:damaged]
    for path in paths:
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    again = frozen(encoder, tmp_path)
    assert torch.equal(encoded(again, crops), encoder(crops)) and again.counts.damaged == damaged
    during = capsys.readouterr().out
    again.close()
    after = capsys.readouterr().out
    assert sum(str(path) in during for path in paths) == 3
    assert ("and more damaged ones, which the log counts as features_damaged" in during) == (damaged > 3)
    assert (after == "") if rest is None else (rest in after)


def test_checking_finds_features_that_differ(tmp_path, capsys):
    encoder, crops = made(), some(4)
    first = frozen(encoder, tmp_path)
    store = first.store()
    wrong = encoder(crops)
    wrong[2] += 0.5
    found = first.look_up(crops)
    assert store is not None
    for key, row in zip(found.keys, wrong, strict=True):
        store.write(key, row.flatten().view(torch.uint8).numpy())
    first.close()
    checking = frozen(encoder, tmp_path, verify=1.0)
    assert torch.equal(encoded(checking, crops), wrong)  # what is kept is taken
    checking.close()
    assert (checking.counts.checked, checking.counts.different) == (4, 1)
    assert "differ from those kept by up to 0.5" in capsys.readouterr().out


def test_at_the_limit_training_goes_on(tmp_path, capsys):
    encoder, crops = made(), some(6)
    entry = HEADER.size + TINY.num_patches * TINY.feature_size * 4
    limited = frozen(encoder, tmp_path, max_gib=4.5 * entry / 2**30)
    assert torch.equal(encoded(limited, crops), encoder(crops))
    limited.close()
    assert limited.counts == Counts(misses=6, written=4 * entry, unsaved=2)
    out = capsys.readouterr().out
    assert out.count("no more are kept") == 1 and str(tmp_path) in out
    again = frozen(encoder, tmp_path, max_gib=4.5 * entry / 2**30)
    assert torch.equal(encoded(again, crops), encoder(crops))
    again.close()
    assert (again.counts.hits, again.counts.unsaved) == (4, 2)


def test_an_encoder_that_is_trained_is_refused(tmp_path):
    with pytest.raises(UserError, match="train_vit=false"):
        frozen(made().requires_grad_(True), tmp_path)


def test_no_crops(tmp_path):
    features = frozen(made(), tmp_path)
    found = features.look_up(some(3)[:0])
    assert found.keys == [] and features.counts == Counts()
    features.close()
