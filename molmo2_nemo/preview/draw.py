"""Arrays -> images: crops with their pooling windows, the mask of a pack, the strip of its tokens.

Shape legend: C crops, P patches of a crop, D_p values of a patch, G patches per side (P = G * G), N pooled tokens,
K patches of a full pooling window, S tokens of a pack, R side of the mask's image.
"""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from molmo2_nemo.attention.mask import TokenMask, may_attend
from molmo2_nemo.data.example import PAD_EXAMPLE, ROOT_BRANCH
from molmo2_nemo.preview.collect import PackView, Part

VISUAL = "#e8913a"
ROOT = "#8c96a3"
PADDING = "#e6e8eb"
BRANCHES = ("#4e79a7", "#59a14f", "#b07aa1", "#3aa6a0", "#d1495b", "#a3a500", "#8a6d4f", "#e377a2")
INK = "#1f2933"
WINDOW_LINE = np.array([236, 0, 130], np.float32)  # rare in photos, visible on white and black


def rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def branch_colour(branch: int) -> str:
    return ROOT if branch == ROOT_BRANCH else BRANCHES[branch % len(BRANCHES)]


def unpatchify(crops: np.ndarray) -> np.ndarray:
    """uint8 [C, P, D_p] -> uint8 [C, side, side, 3]."""
    count, patches, values = crops.shape
    grid, patch = math.isqrt(patches), math.isqrt(values // 3)
    pixels = crops.reshape(count, grid, grid, patch, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return pixels.reshape(count, grid * patch, grid * patch, 3)


def window_map(pooling: np.ndarray, num_crops: int, patches: int) -> np.ndarray:
    """The pooled token of each patch: int64 [C, G, G], -1 for patches in no window (the cut margins of tiles)."""
    found = np.full(num_crops * patches, -1, np.int64)
    tokens, positions = np.nonzero(pooling >= 0)
    found[pooling[tokens, positions]] = tokens
    grid = math.isqrt(patches)
    return found.reshape(num_crops, grid, grid)


def draw_crop(pixels: np.ndarray, windows: np.ndarray, side: int) -> Image.Image:
    """One crop with lines between pooling windows; patches in no window are dimmed.

    Args:
        pixels: uint8 [side_px, side_px, 3]; windows: int64 [G, G]; side: of the result, pixels.
    """
    grid = windows.shape[0]
    side = max(side // grid, 2) * grid  # whole pixels per patch
    step = side // grid
    canvas = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR)).astype(np.float32)
    dim = np.kron(windows < 0, np.ones((step, step), bool))
    canvas[dim] = canvas[dim] * 0.3 + 150
    large = np.kron(windows, np.ones((step, step), np.int64))
    edges = np.zeros((side, side), bool)
    edges[:, 1:] |= large[:, 1:] != large[:, :-1]
    edges[1:] |= large[1:] != large[:-1]
    canvas[edges] = canvas[edges] * 0.35 + WINDOW_LINE * 0.65
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def crop_captions(part: Part) -> list[str]:
    """A caption for each crop of an example: the view of an image, or the time of a frame."""
    info = part.example.info
    if "frame_times" in info:
        return [f"{seconds:.1f} s" for seconds in info["frame_times"]]
    captions = []
    for number, image in enumerate(info.get("images", []), start=1):
        rows, cols = image["tiling"]
        name = f"image {number}" if len(info["images"]) > 1 else "image"
        captions.append(f"{name}, global")
        captions += [f"tile {r + 1},{c + 1} of {rows}x{cols}" for r in range(rows) for c in range(cols)]
    return captions


def draw_crops(part: Part, *, limit: int) -> list[tuple[str, Image.Image]]:
    """An example's crops, each with its caption and all of one size, at most 270 pixels.

    Of more than `limit` crops, evenly spaced ones are drawn, including the first and the last.
    """
    example = part.example
    count = example.num_crops
    if not count:
        return []
    chosen = np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int))
    windows = window_map(example.pooling, count, example.crops.shape[1])
    captions = crop_captions(part) or [f"crop {i}" for i in range(count)]
    side = 270 if len(chosen) <= 4 else 189 if len(chosen) <= 12 else 135
    return [(captions[i], draw_crop(unpatchify(example.crops[i : i + 1])[0], windows[i], side)) for i in chosen]


def contact_sheet(crops: list[tuple[str, Image.Image]], *, width: int = 1200) -> Image.Image:
    """Crops, one or more, with their captions in rows, for the PNG file.

    Args:
        width: pixels at most.
    """
    gap, label = 8, 18
    side = crops[0][1].width
    columns = max(1, min(len(crops), width // (side + gap)))
    rows = -(-len(crops) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) - gap, rows * (side + label + gap) - gap), "white")
    pen, font = ImageDraw.Draw(sheet), _font(13)
    for place, (caption, image) in enumerate(crops):
        x, y = place % columns * (side + gap), place // columns * (side + label + gap)
        pen.text((x, y), caption, fill=INK, font=font)
        sheet.paste(image, (x, y + label))
    return sheet


def shown_branches(view: PackView) -> np.ndarray:
    """The branch that determines the colour of each token of a pack: int64 [S]. A lone conversation is branch 0."""
    found = np.full(view.batch.input_ids.shape[1], ROOT_BRANCH, np.int64)
    for part in view.parts:
        for branch, tokens in enumerate(part.branches()):
            found[part.start + tokens.start : part.start + tokens.stop] = branch
    return found


def mask_image(mask: TokenMask, length: int, shown: np.ndarray, *, side: int = 960) -> np.ndarray:
    """The mask of the first `length` tokens: uint8 [R, R, 3].

    One pixel stands for a square of token pairs; its colour is a mix weighted by the number of allowed pairs: visual
    pairs orange, keys in a branch (`shown`, int64 [S]) in its colour, keys in the root grey, masked pairs white.

    Pairs are counted over runs of like tokens within a pixel: between two runs all are allowed or none, so one pair of
    tokens stands for them; within a run, those to earlier tokens or all.
    """
    cell = max(1, -(-length // side))
    cells = -(-length // cell)
    kind = np.where(shown[:length] == ROOT_BRANCH, 0, 1 + shown[:length] % len(BRANCHES))  # of a key
    colours = torch.tensor([rgb(ROOT), *(rgb(c) for c in BRANCHES), rgb(VISUAL)], dtype=torch.float32)  # [1 + 8 + 1, 3]
    tokens = np.stack([*mask.on_host()[:, 0, :length], kind, np.arange(length) // cell])
    starts = np.flatnonzero(np.append(True, (tokens[:, 1:] != tokens[:, :-1]).any(0)))
    runs = torch.from_numpy(tokens[:, starts])  # int64 [5, T]: example, branch, visual block, kind, cell
    sizes = torch.from_numpy(np.diff(starts, append=length)).float()
    owner, is_visual, places = runs[4], runs[2] > 0, torch.arange(len(starts))
    widths = torch.bincount(torch.arange(length) // cell, minlength=cells).float()
    kinds = runs[3].unique().tolist()
    image = torch.empty(cells, cells, 3)
    per_pass = max(1, 8_000_000 // (len(starts) * max(1, len(starts) // cells)))  # rows of pixels
    for first in range(0, cells, per_pass):
        last = min(first + per_pass, cells)
        own = places[(owner >= first) & (owner < last)]
        pairs = _allowed_pairs(mask, runs[:3], sizes, own)  # [Q, T]
        layers = [(colours[-1], pairs * is_visual[own, None] * is_visual)]
        pairs -= layers[0][1]
        layers += [(colours[kind], pairs * (runs[3] == kind)) for kind in kinds]
        totals, counts = torch.zeros(last - first, cells, 3), torch.zeros(last - first, cells, 1)
        for colour, layer in layers:
            rows = torch.zeros(last - first, len(starts)).index_add_(0, owner[own] - first, layer)
            share = torch.zeros(last - first, cells).index_add_(1, owner, rows)[..., None]
            totals += share * colour
            counts += share
        filled = (counts / (widths[first:last, None] * widths)[..., None]).clamp(0, 1)
        strength = torch.where(counts > 0, 0.25 + 0.75 * filled, 0.0)  # a single allowed pair must stay visible
        image[first:last] = 255 * (1 - strength) + totals / counts.clamp(min=1) * strength
    return image.clamp(0, 255).round().to(torch.uint8).numpy()


def _allowed_pairs(mask: TokenMask, runs: torch.Tensor, sizes: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Allowed pairs of tokens between the runs `own`, int64 [Q], and all runs, int64 [3, T]: float32 [Q, T]."""
    places = torch.arange(runs.shape[1])
    queries, keys = runs[:, own, None].unbind(), runs[:, None].unbind()
    allowed = may_attend(queries, keys, own[:, None], places, mask.visual_attention)
    pairs = allowed * sizes[own, None] * sizes
    alone = runs[:, own].unbind()
    also_later = may_attend(alone, alone, own, own + 1, mask.visual_attention)
    size = sizes[own]
    pairs[torch.arange(len(own)), own] = torch.where(also_later, size * size, size * (size + 1) / 2)
    return pairs


def enlarge(pixels: np.ndarray, side: int) -> Image.Image:
    """Nearest-neighbour enlargement by a whole factor, to at most `side` pixels."""
    factor = max(1, side // max(pixels.shape[:2]))
    image = Image.fromarray(pixels)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def token_colours(view: PackView) -> np.ndarray:
    """Colour of each token of a pack: uint8 [S, 3], by the first that applies of visual, branch, root, padding."""
    batch = view.batch
    colours = np.zeros((batch.input_ids.shape[1], 3), np.uint8)
    shown = shown_branches(view)
    for branch in np.unique(shown):
        colours[shown == branch] = rgb(branch_colour(int(branch)))
    colours[batch.visual[0]] = rgb(VISUAL)
    colours[batch.example_ids[0] == PAD_EXAMPLE] = rgb(PADDING)
    return colours


def token_strip(view: PackView, *, width: int = 1200, height: int = 74) -> Image.Image:
    """The pack from left to right: kinds of tokens above, loss weights as bars below, lines between examples."""
    length = view.batch.input_ids.shape[1]
    at = (np.arange(width) * length // width).clip(0, length - 1)
    strip = np.full((height, width, 3), 255, np.uint8)
    top = height // 2
    strip[:top] = token_colours(view)[at][None]
    weights = view.batch.loss_weights[0]
    edges = np.append(np.arange(width) * length // width, length)
    peaks = np.array([weights[a : max(b, a + 1)].max() for a, b in zip(edges[:-1], edges[1:], strict=True)])
    tall = np.rint((height - top - 4) * peaks / max(float(weights.max()), 1e-9)).astype(int)
    rows = np.arange(height)[:, None]
    strip[(rows >= height - tall[None]) & (rows > top)] = rgb(INK)
    for part in view.parts:
        x = part.start * width // length
        strip[:, max(x - 1, 0) : x + 1] = 255 if x else strip[:, :1]
        strip[:top, x : x + 1] = rgb(INK)
    return Image.fromarray(strip)


def overview(view: PackView, square: Image.Image) -> Image.Image:
    """The strip and the mask of a pack in one image, for the PNG file."""
    used = sum(part.example.num_tokens for part in view.parts)
    strip = token_strip(view, width=960)
    sheet = Image.new("RGB", (strip.width + 40, square.height + strip.height + 110), "white")
    pen, font = ImageDraw.Draw(sheet), _font(15)
    pen.text((20, 12), f"{view.title}: {used} tokens, {view.batch.crops.shape[0]} crops", fill=INK, font=font)
    sheet.paste(strip, (20, 40))
    entries = [("visual", VISUAL), ("root", ROOT), *((f"branch {i}", c) for i, c in enumerate(BRANCHES[:4]))]
    x = 20
    for label, colour in [*entries, ("padding", PADDING)]:
        pen.rectangle((x, strip.height + 54, x + 12, strip.height + 66), fill=colour)
        pen.text((x + 17, strip.height + 50), label, fill=INK, font=font)
        x += 35 + int(pen.textlength(label, font=font))
    sheet.paste(square, (20, strip.height + 85))
    return sheet


def data_uri(image: Image.Image, *, photo: bool = False) -> str:
    """The image as a `data:` address: JPEG for photos, else PNG."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85) if photo else image.save(out, "PNG", optimize=True)
    kind = "jpeg" if photo else "png"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def jpeg(pixels: np.ndarray, *, side: int) -> bytes:
    """An image, uint8 [H, W, 3], as a JPEG of at most side x side pixels."""
    image, out = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((side, side))
    image.save(out, "JPEG", quality=80)
    return out.getvalue()


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
