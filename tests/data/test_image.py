"""Image preprocessing: the reference's worked examples, and an independent patch map."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from molmo2_nemo.data.config import ImageConfig
from molmo2_nemo.data.image import (
    TileGeometry,
    pool_windows,
    select_tiling,
    tile_patch_ids,
)
from molmo2_nemo.data.pictures import decode_image
from molmo2_nemo.data.resize import patchify, resize
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from tests.support.pictures import encode_image, encode_images

torch.set_num_threads(1)
TOKENIZER = Molmo2Tokenizer.load("tiny")
FULL = ImageConfig()
TINY = ImageConfig(crop_size=126, margin=2)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "width, height, tiling, canvas, grid, patches, tokens",
    [
        (640, 480, (2, 2), (644, 644), (23, 23), 725, 752),
        (1200, 800, (2, 4), (644, 1176), (23, 42), 1162, 1189),
        (378, 378, (1, 1), (378, 378), (14, 14), 392, 410),
        (300, 300, (1, 1), (378, 378), (14, 14), 392, 410),
        (100, 100, (1, 1), (378, 378), (14, 14), 392, 410),
        (1920, 1080, (2, 4), (644, 1176), (23, 42), 1162, 1189),
        (1000, 100, (1, 4), (378, 1176), None, None, None),
    ],
)
def test_worked_examples(width, height, tiling, canvas, grid, patches, tokens):
    visual = encode_image(picture(height, width), FULL, TOKENIZER, max_crops=8)
    assert visual.info["tiling"] == list(tiling)
    assert TileGeometry.of(FULL).canvas(tiling) == canvas
    assert visual.crops.shape == (tiling[0] * tiling[1] + 1, 729, 588) and visual.crops.dtype == np.uint8
    if grid:
        assert visual.info["token_grid"] == list(grid)
        assert visual.pooling.shape == (patches, 4)
        assert len(visual.token_ids) == tokens
        assert visual.token_ids.count(TOKENIZER.special.im_patch) == patches


@pytest.mark.parametrize("width, height, tiling", [(640, 480, [2, 2]), (1200, 800, [3, 5])])
def test_high_resolution_tilings(width, height, tiling):
    visual = encode_images([picture(height, width)], FULL, TOKENIZER, high_res=True)
    assert visual.info["images"][0]["tiling"] == tiling


def test_token_string():
    visual = encode_image(picture(480, 640), FULL, TOKENIZER, max_crops=8)
    s = TOKENIZER.special
    row = [s.im_patch] * 23 + [s.im_col]
    expected = [s.low_res_im_start, *[s.im_patch] * 196, s.im_end, s.im_start, *row * 23, s.im_end]
    assert visual.token_ids == expected


def test_pooling_rows():
    pooling = encode_image(picture(480, 640), FULL, TOKENIZER, max_crops=8).pooling
    assert pooling[0].tolist() == [0, 1, 27, 28]
    assert pooling[13].tolist() == [26, -1, 53, -1]
    assert pooling[195].tolist() == [728, -1, -1, -1]
    assert pooling[196].tolist() == [729, 730, 756, 757]
    assert pooling[-1].tolist() == [3616, 3617, 3643, 3644]


def masked_patch_ids(tiling, grid, margin):
    """The reference's recipe: mask each crop's inner margins with -1, interleave the crops, drop the -1."""
    rows, cols = tiling
    crops = np.arange(rows * cols * grid * grid).reshape(rows, cols, grid, grid)
    for r in range(rows):
        for c in range(cols):
            if r:
                crops[r, c, :margin] = -1
            if c:
                crops[r, c, :, :margin] = -1
            if r != rows - 1:
                crops[r, c, grid - margin :] = -1
            if c != cols - 1:
                crops[r, c, :, grid - margin :] = -1
    flat = crops.transpose(0, 2, 1, 3).reshape(-1)
    size = (rows * (grid - 2 * margin) + 2 * margin, cols * (grid - 2 * margin) + 2 * margin)
    return flat[flat >= 0].reshape(size)


@pytest.mark.parametrize("config", [FULL, TINY, ImageConfig(crop_size=126, margin=1, pool=3), ImageConfig(margin=0)])
@pytest.mark.parametrize("tiling", [(1, 1), (1, 4), (3, 2), (2, 2)])
def test_patch_map_against_masking(config, tiling):
    geometry = TileGeometry.of(config)
    expected = masked_patch_ids(tiling, geometry.grid, geometry.margin) + geometry.grid**2
    assert np.array_equal(tile_patch_ids(tiling, geometry, 1), expected)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4))
@settings(deadline=None)
def test_pool_windows_against_loops(rows, cols, pool):
    ids = np.arange(rows * cols).reshape(rows, cols)
    windows = pool_windows(ids, pool)
    top, left = ((-rows) % pool) // 2, ((-cols) % pool) // 2
    assert windows.shape == (-(-rows // pool), -(-cols // pool), pool * pool)
    for i in range(windows.shape[0]):
        for j in range(windows.shape[1]):
            for slot in range(pool * pool):
                y, x = i * pool + slot // pool - top, j * pool + slot % pool - left
                expected = ids[y, x] if 0 <= y < rows and 0 <= x < cols else -1
                assert windows[i, j, slot] == expected


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([1, 4, 8, 24]))
@settings(deadline=None)
def test_tiling_is_the_smallest_enlargement(height, width, max_crops):
    rows, cols = select_tiling(height, width, 266, max_crops)
    assert rows * cols <= max_crops

    def scale(i, j):
        return min(np.float32(266 * i) / np.float32(height), np.float32(266 * j) / np.float32(width))

    every = {
        (i, j): scale(i, j) for i in range(1, max_crops + 1) for j in range(1, max_crops + 1) if i * j <= max_crops
    }
    enlarging = [s for s in every.values() if s >= 1]
    best = min(enlarging) if enlarging else max(every.values())
    assert every[rows, cols] == best
    assert rows * cols == min(i * j for (i, j), s in every.items() if s == best)


def test_crops_are_cut_from_the_canvas():
    pixels = picture(150, 200)
    visual = encode_image(pixels, TINY, TOKENIZER, max_crops=8)
    geometry, (rows, cols) = TileGeometry.of(TINY), visual.info["tiling"]
    canvas = patchify(resize(pixels, *geometry.canvas((rows, cols)))[None], 14)
    stitched = visual.crops.reshape(-1, visual.crops.shape[-1])[tile_patch_ids((rows, cols), geometry, 1).reshape(-1)]
    assert np.array_equal(stitched, canvas[0])
    assert np.array_equal(visual.crops[0], patchify(resize(pixels, 126, 126)[None], 14)[0])


def test_several_pictures():
    images = [picture(100, 100), picture(300, 200), picture(80, 400)]
    visual = encode_images(images, TINY, TOKENIZER)
    expected, crops = [], 0
    for number, pixels in enumerate(images, start=1):
        alone = encode_image(pixels, TINY, TOKENIZER, max_crops=8, first_crop=crops)
        expected += TOKENIZER.encode(f"Image {number}") + alone.token_ids
        assert np.array_equal(visual.crops[crops : crops + len(alone.crops)], alone.crops)
        assert alone.pooling[0, 0] == crops * 81
        crops += len(alone.crops)
    assert visual.token_ids == expected
    assert sum(visual.unit_crops) == crops == len(visual.crops)
    assert sum(visual.unit_pooled_tokens) == len(visual.pooling)
    assert len(visual.unit_crops) == 3


def test_limits_on_several_pictures():
    config = ImageConfig(crop_size=126, margin=2, max_images=2, max_multi_image_crops=2)
    visual = encode_images([picture(150, 400)] * 3, config, TOKENIZER, high_res=True)
    assert visual.info["ignored"] == 1
    assert visual.unit_crops == [3, 3]


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="multiple of patch_size"):
        TileGeometry.of(ImageConfig(crop_size=100))
    with pytest.raises(ValueError, match="two margins"):
        TileGeometry.of(ImageConfig(crop_size=126, margin=5))


def test_one_pixel():
    data = encoded(Image.new("RGB", (1, 1), (9, 8, 7)))
    visual = encode_images([decode_image(data)], TINY, TOKENIZER)
    assert visual.crops.reshape(-1, 3).tolist() == [[9, 8, 7]] * (2 * 126 * 126)
