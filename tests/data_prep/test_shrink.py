"""Pictures made smaller on the way. Oracle: the tiles of the original picture, and the answers of its points."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from data_prep.shard_tools import check
from data_prep.shrink import IN_PIXELS, LARGER, MADE, NEEDED, RAISED, smaller_size, tile_limits
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.config import DataConfig, ImageConfig, SourceConfig
from molmo2_nemo.data.image import TileGeometry, images_layout
from molmo2_nemo.data.loader import ExampleReader, default_builder
from molmo2_nemo.data.manifest import MANIFEST, read_head
from molmo2_nemo.data.shards import ShardDataset


def picture(width, height, kind="JPEG", orientation=None):
    """A smooth scene, so that resampling it once more changes little."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(9 * x + 3 * y), np.sin(5 * y), np.sin(4 * (x - y))]
    image = Image.fromarray(np.stack([(127 + 120 * wave) for wave in waves], -1).astype(np.uint8))
    file, exif = io.BytesIO(), Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(file, kind, exif=exif, **({"quality": 98} if kind == "JPEG" else {}))
    return file.getvalue()


def prepare(*words):
    return main(["prepare", *map(str, words), "--workers", "0"])


def made(folder):
    data = ShardDataset(folder)
    read = [data.read(i)[1] for i in range(len(data))]
    return [(json.loads(m["json"]), {name: content for name, content in m.items() if name != "json"}) for m in read]


def size(content):
    return Image.open(io.BytesIO(content)).size


def notes(folder):
    return {text: count for text, (count, *_) in read_head(folder / MANIFEST)["notes"].items()}


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- sizes -----------------------------------------------------------------------------------------------------------

SIZES = [(4000, 3000), (3000, 4000), (6000, 1500), (5000, 5000), (2048, 1365), (1920, 1080), (9000, 700), (400, 3000)]
SIZES += [tuple(map(int, np.random.default_rng(seed).integers(300, 6000, 2))) for seed in range(25)]


def tilings(size, limits):
    """What training makes of a picture: rows and columns of tiles with each limit."""
    from molmo2_nemo.data.image import select_tiling

    g = TileGeometry.of(ImageConfig())
    return [select_tiling(size[1] - g.overlap, size[0] - g.overlap, g.window, limit) for limit in limits]


@pytest.mark.parametrize("size", SIZES)
def test_the_model_reads_the_same_tiles_and_enlarges_nothing(size):
    limits, geometry = (8, 24), TileGeometry.of(ImageConfig())
    found = smaller_size(size, 1, ImageConfig(), limits)
    assert tilings(found, limits) == tilings(size, limits)
    if found != size:
        for tiling in tilings(size, limits):
            height, width = geometry.canvas(tiling)
            assert found[0] >= width and found[1] >= height
        assert abs(found[0] / found[1] - size[0] / size[1]) <= size[0] / size[1] * 0.5 / min(found)
        less = tuple(round(side * (max(found) - 1) / max(size)) for side in size)
        canvas = [geometry.canvas(tiling) for tiling in tilings(size, limits)]
        short = any(less[0] < width or less[1] < height for height, width in canvas)
        assert short or tilings(less, limits) != tilings(size, limits)
    else:
        canvas = [geometry.canvas(tiling) for tiling in tilings(size, limits)]
        assert any(size[0] < 1.2 * width or size[1] < 1.2 * height for height, width in canvas)


def test_a_side_above_what_is_read_is_kept_to():
    assert smaller_size((4000, 3000), 2500, ImageConfig(), (8, 24)) == (2500, 1875)
    assert smaller_size((4000, 3000), 100, ImageConfig(), (8,)) < smaller_size(
        (4000, 3000), 100, ImageConfig(), (8, 24)
    )


def test_high_resolution_counts_unless_no_data_set_of_the_run_has_it():
    assert tile_limits(DataConfig()) == (8, 24)
    none, some = SourceConfig("a"), SourceConfig("b", p_high_res=0.1)
    assert tile_limits(DataConfig(sources={"a": none})) == (8,)
    assert tile_limits(DataConfig(sources={"a": none, "b": some})) == (8, 24)
    image = ImageConfig(max_crops=4, max_multi_image_crops=3, high_res_max_crops=12, p_high_res=0.5)
    assert tile_limits(DataConfig(sources={"a": none}, image=image)) == (3, 4, 12)


def test_the_layout_of_tokens_is_the_same():
    tokenizer = default_builder(DataConfig())[0].tokenizer
    for one in SIZES[:6]:
        for pictures, high_res in (([one], False), ([one], True), ([one, (500, 400)], False)):
            few = [smaller_size(one, 1, ImageConfig(), (8, 24)), *pictures[1:]]
            layouts = [images_layout(sizes, ImageConfig(), tokenizer, high_res=high_res) for sizes in (pictures, few)]
            assert layouts[0].token_ids == layouts[1].token_ids
            assert np.array_equal(layouts[0].pooling, layouts[1].pooling)


# --- records ---------------------------------------------------------------------------------------------------------


def test_pictures_of_a_set(tmp_path, capsys):
    (tmp_path / "large.jpg").write_bytes(picture(3200, 2400))
    (tmp_path / "turned.jpg").write_bytes(picture(3200, 2400, orientation=6))
    (tmp_path / "small.jpg").write_bytes(picture(640, 480))
    (tmp_path / "lossless.png").write_bytes(picture(3200, 2400, "PNG"))
    (tmp_path / "long.jpg").write_bytes(picture(3000, 390))
    names = ("large.jpg", "turned.jpg", "small.jpg", "lossless.png", "long.jpg")
    path = lines(tmp_path / "own.jsonl", *[{"image": name, "caption": "Waves."} for name in names])
    assert prepare(path, "--out", tmp_path / "out", "--strict", "--max-image-side", 2400) == 0
    found = made(tmp_path / "out" / "own")
    assert [(data["images"], size(*members.values())) for data, members in found] == [
        (["0.jpg"], (2400, 1800)),
        (["0.jpg"], (1800, 2400)),
        (["0.jpg"], (640, 480)),
        (["0.png"], (2400, 1800)),
        (["0.jpg"], (3000, 390)),
    ]
    assert found[2][1]["0.jpg"] == (tmp_path / "small.jpg").read_bytes()
    assert not Image.open(io.BytesIO(found[1][1]["0.jpg"])).getexif().get(0x0112)
    assert Image.open(io.BytesIO(found[0][1]["0.jpg"])).info.get("exif") is None
    said = notes(tmp_path / "out" / "own")
    assert said[f"an image {MADE}"] == 3 and said[f"an image {NEEDED}"] == 1
    assert f"an image {MADE}" in capsys.readouterr().out
    settings = read_head(tmp_path / "out" / "own" / MANIFEST)["settings"]
    assert (settings["max_image_side"], settings["tiles"]) == (2400, [8, 24])
    assert check(tmp_path / "out" / "own") == []


def test_a_smaller_side_is_raised_and_said(tmp_path):
    (tmp_path / "large.jpg").write_bytes(picture(4000, 3000))
    path = lines(tmp_path / "own.jsonl", {"image": "large.jpg", "caption": "Waves."})
    assert prepare(path, "--out", tmp_path / "out", "--strict", "--max-image-side", 100) == 0
    ((_, members),) = made(tmp_path / "out" / "own")
    assert size(members["0.jpg"]) == smaller_size((4000, 3000), 1, ImageConfig(), (8, 24))
    assert notes(tmp_path / "out" / "own")[f"an image {RAISED}"] == 1
    assert prepare(path, "--out", tmp_path / "few", "--strict", "--max-image-side", 100, "--for", "recipe=tiny") == 0
    ((_, members),) = made(tmp_path / "few" / "own")
    assert max(size(members["0.jpg"])) < 1000  # the tiny model reads two tiles of 56 pixels, and few


def test_a_file_that_would_grow_is_kept(tmp_path):
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((2600, 1950)).save(file, "JPEG", quality=3)
    (tmp_path / "tight.jpg").write_bytes(file.getvalue())
    path = lines(tmp_path / "own.jsonl", {"image": "tight.jpg", "caption": "Noise."})
    assert prepare(path, "--out", tmp_path / "out", "--strict", "--max-image-side", 2400) == 0
    ((_, members),) = made(tmp_path / "out" / "own")
    assert members["0.jpg"] == file.getvalue() and notes(tmp_path / "out" / "own")[f"an image {LARGER}"] == 1


SPOT = {"style": "pointing", "label": "spot"}
ANNOTATIONS = {
    "pixels": [{**SPOT, "points": [[1777, 2003], [3, 5]]}],
    "a width and a height": [{**SPOT, "points": [[177, 200]], "width": 320, "height": 240}],
    "percent": [{**SPOT, "points": [[17.7, 20]], "point_scale": 100}],
    "turns": [{"style": "pointing", "turns": [{"label": "spot", "points": [[1777, 2003]]}]}],
    "alternatives": [{**SPOT, "points": [[1777, 2003]], "either": [{"label": "spot"}, {"label": "dot"}]}],
    "units of alternatives": [
        {**SPOT, "either": [{"points": [[1777, 2003]]}, {"points": [[17.7, 20]], "point_scale": 100}]}
    ],
}


@pytest.mark.parametrize("name", ANNOTATIONS)
@pytest.mark.parametrize("orientation", [None, 6])
def test_points_stay_where_they_were(name, orientation, tmp_path):
    """Training's texts of the smaller picture are those of the original."""
    width, height = (2400, 3200) if orientation is None else (3200, 2400)
    (tmp_path / "large.jpg").write_bytes(picture(width, height, orientation=orientation))
    path = lines(tmp_path / "own.jsonl", {"image": "large.jpg", "annotations": ANNOTATIONS[name]})
    texts = []
    for words in ((), ("--max-image-side", 1800)):
        assert prepare(path, "--out", tmp_path / "out", "--strict", "--overwrite", *words) == 0
        config = DataConfig(sources={"own": SourceConfig(str(tmp_path / "out" / "own"))})
        reader = ExampleReader(config, *default_builder(config))
        texts.append([reader[n].info["conversations"] for n in range(6)])
    ((stored, members),) = made(tmp_path / "out" / "own")
    assert max(size(members["0.jpg"])) < 3200 and texts[0] == texts[1]
    assert check(tmp_path / "out" / "own") == []


def test_points_of_several_pictures_in_pixels_keep_them(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(picture(3200, 2400))
    spots = {"style": "multi_image_pointing", "label": "spot"}
    rows = [
        {"images": ["a.jpg", "b.jpg"], "annotations": [{**spots, "points": [[[1777, 2003]], []]}]},
        {"images": ["a.jpg", "b.jpg"], "annotations": [{**spots, "points": [[[17.7, 20.3]], []], "point_scale": 100}]},
    ]
    path = lines(tmp_path / "own.jsonl", *rows)
    assert prepare(path, "--out", tmp_path / "out", "--strict", "--max-image-side", 2400) == 0
    sides = [{max(size(content)) for content in members.values()} for _, members in made(tmp_path / "out" / "own")]
    assert sides == [{3200}, {2400}] and notes(tmp_path / "out" / "own")[f"an image {IN_PIXELS}"] == 1
