"""The demo's data: complete, true to its promises, and buildable by the real example builder."""

import io
from collections import Counter

import av
import numpy as np
import pytest
from PIL import Image

from data_prep.demo import MEDIA, SETS, build_demo, main
from data_prep.demo_records import CAPTIONS, HEAD
from data_prep.shard_tools import index
from molmo2_nemo.data.annotations import MultiImagePoints, Points, VideoPoints
from molmo2_nemo.data.config import DataConfig, ImageConfig, PackingConfig, SourceConfig, VideoConfig
from molmo2_nemo.data.loader import PackStream
from molmo2_nemo.data.manifest import MANIFEST, read_entries
from molmo2_nemo.data.record import parse_record
from molmo2_nemo.data.shards import ShardDataset


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    assert main([str(out)]) == 0
    return out


def all_records(folder):
    data = ShardDataset(folder)
    return [parse_record(*data.read(i)) for i in range(len(data))]


def test_media_are_small_attributed_and_real():
    files = [p for p in MEDIA.iterdir() if p.suffix in (".jpg", ".mp4")]
    text = (MEDIA / "ATTRIBUTION.md").read_text()
    assert sum(p.stat().st_size for p in MEDIA.iterdir()) < 2_000_000 and all(p.name in text for p in files)
    for path in files:
        if path.suffix == ".jpg":
            with Image.open(path) as image:
                assert max(image.size) <= 480 and np.asarray(image).std() > 20
    with av.open(str(MEDIA / "bunny.mp4")) as container:
        frames = [f.to_ndarray(format="gray") for f in container.decode(video=0)]
    assert len(frames) == 125 and frames[0].shape == (270, 480)
    assert np.abs(frames[0].astype(int) - frames[50]).mean() > 5  # it moves


def test_sets_cover_what_the_demo_promises(demo):
    said = {name: [a.content for r in all_records(demo / name) for a in r.annotations] for name in SETS}
    styles = {name: Counter(content.style.name for content in contents) for name, contents in said.items()}
    assert set(styles["pretrain"]) == {"long_caption", "pointing", "point_count", "text_sft"}
    needed = {"long_caption", "user_qa", "a_okvqa_mc", "pointing", "point_count", "multi_image_pointing", "text_sft"}
    needed |= {"video_long_caption", "video_point", "video_point_count", "video_point_track_per_frame"}
    for name in ("sft", "long"):
        assert needed <= set(styles[name])
        found = all_records(demo / name)
        assert any(r.video and r.subtitles for r in found) and any(len(r.images) > 1 for r in found)
        assert any(not r.images and not r.video for r in found)
        assert any(len(r.annotations) > 2 for r in found)
    for name in CAPTIONS:
        assert 8 <= len(CAPTIONS[name].split()) <= 15


def test_points_lie_inside(demo):
    for r in all_records(demo / "long"):
        for content in (a.content for a in r.annotations):
            flat = content.points if isinstance(content, Points) else ()
            if isinstance(content, (MultiImagePoints, VideoPoints)):
                flat = [p for group in content.points for p in group]
            assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in flat)
    assert all(0 < x < 480 and 0 < y < 270 for x, y in HEAD)


def test_the_track_follows_the_rabbit():
    """The grey rabbit is there: saturation round the tracked point is far below the meadow's."""
    with av.open(str(MEDIA / "bunny.mp4")) as container:
        frames = {round(f.time, 2): f.to_ndarray(format="rgb24") for f in container.decode(video=0)}
    times = sorted(frames)
    for i, (x, y) in enumerate(HEAD):
        shown = max(t for t in times if t <= 0.5 * i + 1e-6)
        patch = frames[shown][y - 5 : y + 6, x - 5 : x + 6].astype(int)
        assert (patch.max(-1) - patch.min(-1)).mean() < 45, (i, (patch.max(-1) - patch.min(-1)).mean())


def test_rebuilding_is_identical_and_atomic(demo, tmp_path):
    build_demo(tmp_path)
    build_demo(tmp_path)
    for name in SETS:
        assert (tmp_path / name / MANIFEST).read_bytes() == (demo / name / MANIFEST).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(SETS)


def test_index_finds_what_was_written(demo, tmp_path):
    """Places, checksums and measures, from the tars alone."""
    for tar in (demo / "sft").glob("*.tar"):
        (tmp_path / tar.name).write_bytes(tar.read_bytes())
    index(tmp_path, "sft")
    assert list(read_entries(tmp_path / MANIFEST)) == list(read_entries(demo / "sft" / MANIFEST))
    assert ShardDataset(tmp_path).fingerprint == ShardDataset(demo / "sft").fingerprint


@pytest.mark.parametrize(
    "name, length, crops, frames", [("pretrain", 512, 16, 8), ("sft", 768, 24, 8), ("long", 1536, 48, 16)]
)
def test_real_builder_makes_batches(demo, name, length, crops, frames):
    """With the budgets of the tiny recipe: nothing is skipped, every record comes by, and most of a pack is filled."""
    config = DataConfig(
        sources={name: SourceConfig(str(demo / name))},
        image=ImageConfig(
            crop_size=126, margin=2, max_crops=2, high_res_max_crops=4, max_images=3, max_multi_image_crops=2
        ),
        video=VideoConfig(max_frames=frames),
        packing=PackingConfig(sequence_length=length, max_crops=crops, buffer_size=12),
    )
    stream = PackStream(config, micro_batch_size=2, dp_rank=0, dp_size=1)
    keys, fill = set(), []
    for _, batch in zip(range(16), stream, strict=False):
        keys.update(key.split(":")[1] for pack in batch.keys for key in pack)
        fill.append((batch.input_ids >= 0).mean())
        assert len(batch.crops) <= 2 * crops
        assert len(batch.pooling) == len(batch.pooled_positions) == batch.unit_pooled_tokens.sum()
        assert batch.pooling.max(initial=-1) < batch.crops.shape[0] * batch.crops.shape[1]
        assert (batch.loss_weights > 0).any(axis=1).all()
    assert not stream.skipped
    assert keys == {entry["key"] for entry in SETS[name]()}
    assert np.mean(fill) > 0.6


def test_pictures_decode(demo):
    for r in all_records(demo / "sft"):
        for content in r.images:
            Image.open(io.BytesIO(content)).load()
