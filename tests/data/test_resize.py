"""Stretching and patch order: the same bits as the plain way of torch, whatever the sizes, layouts and threads."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from molmo2_nemo.data.resize import patchify, resize, resizes

SIDES = (1, 2, 3, 31, 126, 127, 270, 378, 480, 721, 1080)
TARGETS = ((378, 378), (126, 196), (126, 126), (644, 910), (379, 377), (1, 2))


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def plain_resize(pixels, height, width):
    """Channels first and contiguous, one step after the other."""
    chw = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).unsqueeze(0).float().contiguous()
    out = F.interpolate(chw, size=(height, width), mode="bilinear", align_corners=False)
    return out.round().to(torch.uint8)[0].permute(1, 2, 0).contiguous().numpy()


def plain_patches(crops, patch):
    count, height, width, channels = crops.shape
    split = crops.reshape(count, height // patch, patch, width // patch, patch, channels)
    return np.ascontiguousarray(split.transpose(0, 1, 3, 2, 4, 5)).reshape(count, -1, patch * patch * channels)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("target", TARGETS)
def test_resize_is_the_plain_one_to_the_bit(threads, target):
    """Up, down, and both at once; noise, and a flat picture whose values must stay."""
    threads(1)
    for size in itertools.product(SIDES, SIDES):
        pixels = picture(*size, seed=sum(size))
        got = resize(pixels, *target)
        assert got.dtype == np.uint8 and got.flags.c_contiguous
        np.testing.assert_array_equal(got, plain_resize(pixels, *target), err_msg=str(size))
    flat = np.full((50, 70, 3), 200, np.uint8)
    assert (resize(flat, *target) == 200).all()


def test_pixels_of_any_layout(threads):
    """Turned and mirrored frames are views of others."""
    threads(1)
    pixels = picture(90, 131)
    for view in (np.rot90(pixels), pixels[:, ::-1], pixels[::-1], pixels[3:80:2, 5:], pixels[..., ::-1]):
        np.testing.assert_array_equal(resize(view, 126, 98), plain_resize(view, 126, 98))
        part = view[None, : view.shape[0] // 7 * 7, : view.shape[1] // 7 * 7]
        np.testing.assert_array_equal(patchify(part, 7), plain_patches(part, 7))


@pytest.mark.parametrize("source, target", [((480, 640), (378, 378)), ((50, 31), (126, 196)), ((1, 1), (126, 126))])
def test_resize_against_the_formula(source, target):
    """Bilinear by hand in float64: pixel centres, no antialiasing, edges repeated."""
    pixels = picture(*source)

    def weights(size_in, size_out):
        at = np.maximum((np.arange(size_out) + 0.5) * size_in / size_out - 0.5, 0)
        low = np.minimum(np.floor(at).astype(int), size_in - 1)
        high, part = np.minimum(low + 1, size_in - 1), at - low
        matrix = np.zeros((size_out, size_in))
        np.add.at(matrix, (np.arange(size_out), low), 1 - part)
        np.add.at(matrix, (np.arange(size_out), high), part)
        return matrix

    rows, columns = weights(source[0], target[0]), weights(source[1], target[1])
    expected = np.stack([rows @ pixels[..., c].astype(float) @ columns.T for c in range(3)], axis=-1)
    got = resize(pixels, *target)
    assert got.shape == (*target, 3) and got.dtype == np.uint8
    # fp32 decides near-ties of halves differently now and then; everything else is the rounded value.
    assert np.max(np.abs(got - expected)) <= 0.52  # positions are fp32 too
    assert np.mean(got != np.round(expected)) < 0.01


def test_resize_does_not_depend_on_threads(threads):
    """Decoding in the training process and in workers, which have one thread each, must give the same pixels."""
    pixels = picture(301, 457)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(resize(pixels, 378, 378))
        assert torch.get_num_threads() == count
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_patchify_numbers():
    patches = patchify(np.arange(378 * 378 * 3).reshape(1, 378, 378, 3), 14)[0]
    assert patches[0, :4].tolist() == [0, 1, 2, 3]
    assert (patches[0, 42], patches[1, 0], patches[27, 0]) == (1134, 42, 15876)


def test_patches_of_several_crops_and_into_given_room():
    crops = np.stack([picture(42, 56, seed) for seed in range(3)])
    room = np.zeros((5, 12, 588), np.uint8)
    np.testing.assert_array_equal(patchify(crops, 14, room[1:4]), plain_patches(crops, 14))
    np.testing.assert_array_equal(room[1:4], plain_patches(crops, 14))
    assert not room[[0, 4]].any()
    window = crops[:1, 14:42, 14:42]  # a tile of a canvas
    np.testing.assert_array_equal(patchify(window, 14), plain_patches(window, 14))


def test_several_sizes_are_those_of_each(threads):
    """One of them the picture's own, whose pixels are not copied."""
    threads(1)
    pixels = picture(37, 53)
    sizes = [(64, 20), (37, 53), (10, 53), (37, 60)]
    found = resizes(pixels, sizes)
    for got, size in zip(found, sizes, strict=True):
        np.testing.assert_array_equal(got, plain_resize(pixels, *size), err_msg=str(size))
    assert found[1] is pixels and resizes(pixels, sizes[1:2] * 2)[1] is pixels
