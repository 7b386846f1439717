"""Random answers and references, and what the official functions say of them: makes `points.json.gz` beside this file.

    python tests/evaluation/official/points.py CHECKOUT_OF_ALLENAI_MOLMO2

Runs in an environment of its own that has the official code's requirements and pycocotools; imports nothing of this
repository. What is replaced of the official code: the GPU and the process group by none, its running means (float32) by
NumPy's, and where a frame of a reference lacks an object, the masks of that frame by those of its objects (see
docs/evaluation.md: officially mask i belongs to point i of a frame, whatever is missing).
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np

CASES = 500  # of each kind
OUT = Path(__file__).with_name("points.json.gz")
LABELS = ("red cars", "a dog", 'the "left" cup', "people; 3 of them", "größte Tasse")


class NoGpu:
    """torch as the evaluators use it, on the CPU."""

    def __getattr__(self, name: str) -> Any:
        import torch

        return (lambda kind: torch.device("cpu")) if name == "device" else getattr(torch, name)


class OneProcess:
    @staticmethod
    def all_gather_into_tensor(out: Any, given: Any) -> None:
        out.copy_(given)


# --- masks and references -------------------------------------------------------------------------------------------


def blob(rng: random.Random, width: int, height: int, x: float, y: float, reach: int = 8) -> np.ndarray:
    """A box or an ellipse around a point, sometimes beside it: bool [H, W]."""
    if rng.random() < 0.1:
        x, y = rng.uniform(0, width), rng.uniform(0, height)
    a, b = rng.uniform(1, reach), rng.uniform(1, reach)
    rows, columns = np.mgrid[:height, :width]
    if rng.random() < 0.5:
        return (abs(columns - x) <= a) & (abs(rows - y) <= b)
    return ((columns - x) / a) ** 2 + ((rows - y) / b) ** 2 <= 1


def encoded(rng: random.Random, mask: np.ndarray) -> dict[str, Any]:
    """COCO's run lengths, compressed or plain."""
    from pycocotools import mask as coco

    made = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    if rng.random() < 0.5:
        return {"size": list(mask.shape), "counts": made["counts"].decode()}
    flat = np.concatenate([[False], mask.T.ravel()])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return {"size": list(mask.shape), "counts": np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()}


def place(rng: random.Random, width: int, height: int) -> tuple[float, float]:
    return round(rng.uniform(0, width), 1), round(rng.uniform(0, height), 1)


def beside(rng: random.Random, point: tuple[float, float], width: int, height: int) -> tuple[float, float]:
    """A point where an answer would have it, inside the image."""
    off = rng.choice((0, 1, 3, 12))
    x, y = point[0] + rng.gauss(0, off), point[1] + rng.gauss(0, off)
    return min(max(x, 0), width), min(max(y, 0), height)


def answered(rng: random.Random, points: list[tuple[float, float]], width: int, height: int) -> list[Any]:
    """Most of the points, moved, and sometimes others and doubles."""
    found = [beside(rng, p, width, height) for p in points if rng.random() < 0.85]
    found += [place(rng, width, height) for _ in range(rng.choice((0, 0, 0, 1, 3)))]
    if found and rng.random() < 0.15:
        found.append(rng.choice(found))
    return found


# --- answers as text ------------------------------------------------------------------------------------------------


def damaged(rng: random.Random, text: str) -> str:
    """The text as a model might get it wrong; two times in three as it is."""
    if not text or rng.random() < 0.66:
        return text
    kind, at = rng.randrange(6), rng.randrange(len(text))
    if kind == 0:
        return text[:at]
    if kind == 1:
        return text[:at] + text[at + 1 :]
    if kind == 2:
        return text[:at] + rng.choice('0123456789 ."<>;\t,:x') + text[at + 1 :]
    if kind == 3:
        return text[:at] + rng.choice(("1001", "999 999", " ", '"', "12.5", "\n")) + text[at:]
    if kind == 4:
        return f"Sure! {text} And {text[: at // 2]}"
    return text.replace(";", rng.choice("\t,:")).replace("  ", " ")


def older(rng: random.Random, points: list[tuple[float, float]], width: int, height: int) -> str:
    """Points in an image as older models write them."""
    scaled = [(round(100 * x / width, 1), round(100 * y / height, 1)) for x, y in points]
    kind = rng.randrange(7)
    if kind == 0 and scaled:
        return f'<point x="{scaled[0][0]}" y="{scaled[0][1]}" alt="it">it</point>'
    if kind == 1:
        inside = " ".join(f'x{i}="{x}" y{i}="{y}"' for i, (x, y) in enumerate(scaled, 1))
        return f'<points {inside} alt="them">them</points>'
    if kind == 2:
        return " and ".join(f"({x}, {y})" for x, y in scaled)
    if kind == 3:
        return "<points it\t-\t" + " ".join(f"{i} {x} {y}" for i, (x, y) in enumerate(scaled, 1)) + "/>"
    if kind == 4:
        inside = " ".join(f"{i} {int(10 * x):03d} {int(10 * y):03d}" for i, (x, y) in enumerate(scaled, 1))
        return f"<points it\t-\t{inside}/>"
    if kind == 5:
        return " ".join(f"Click({x}, {y})" for x, y in scaled)
    return " ".join(f"p = {int(10 * x):03d}, {int(10 * y):03d}" for x, y in scaled)


def formatter(rng: random.Random) -> Any:
    from olmo.preprocessing.point_formatter import UnifiedPointFormatter

    return UnifiedPointFormatter.build_for_format(rng.choice(("html-v1", "html-v2")))


def image_answer(rng: random.Random, points: list[tuple[float, float]], width: int, height: int) -> str:
    if rng.random() < 0.25:
        return damaged(rng, older(rng, points, width, height))
    mode = rng.choice(("point_count", "count_point", "point", "point", "count"))
    text = formatter(rng).format_image_points(points, (width, height), rng.choice(LABELS), mode=mode)
    return damaged(rng, text)


def video_answer(rng: random.Random, points: list[tuple[float, float, float]], width: int, height: int) -> str:
    times = sorted({t for t, _, _ in points})
    grouped = [[(x, y) for s, x, y in points if s == t] for t in times]
    if rng.random() < 0.15:
        blocks, number = [], 0
        for time, group in zip(times, grouped, strict=True):
            inside = []
            for x, y in group:
                number += 1
                inside.append(f"{number} {100 * x / width:0.1f} {100 * y / height:0.1f}")
            blocks.append(f"<points {time}\t{' '.join(inside)}/>")
        return damaged(rng, " ".join(blocks))
    mode = rng.choice(("point_count", "count_point", "point", "point"))
    return damaged(
        rng, formatter(rng).format_video_points(times, grouped, (width, height), rng.choice(LABELS), mode=mode)
    )


def track_answer(rng: random.Random, frames: list[dict[str, Any]], width: int, height: int) -> str:
    if rng.random() < 0.15:
        lines = []
        for frame in frames:
            inside = ", ".join(
                f"{n}: [{100 * e['point'][0] / width:0.1f}, {100 * e['point'][1] / height:0.1f}]"
                for n, e in frame["points"].items()
            )
            lines += [f"time {frame['time']:.2f}", "{" + inside + "}"]
        return damaged(rng, "\n".join(lines))
    return damaged(rng, formatter(rng).format_video_tracks(frames, (width, height), rng.choice(LABELS)))


# --- cases ----------------------------------------------------------------------------------------------------------


def safely(function: Any, *args: Any) -> Any:
    """What a function returns as JSON, or {"raises": name}."""
    try:
        return function(*args)
    except Exception as error:  # the official code raises on some answers
        return {"raises": type(error).__name__}


def rounded(value: Any) -> float:
    return round(float(value), 9)


def positions(points: dict[Any, Any]) -> dict[str, list[float]]:
    return {str(name): [rounded(v) for v in entry["point"]] for name, entry in points.items()}


def plain(value: Any) -> Any:
    """Figures as Python numbers."""
    return {k: float(v) for k, v in value.items() if v is not None}


def one(evaluator: Any, metadata: dict[str, Any], answer: str, tokenizer: Any = None) -> Any:
    predictions = {"predictions_text": [answer], "prompts_text": [""], "predictions": [answer]}
    return safely(lambda: plain(evaluator([metadata], predictions, tokenizer)))


def image_case(rng: random.Random, ev: Any) -> dict[str, Any]:
    width, height = rng.randint(30, 80), rng.randint(30, 80)
    points = [place(rng, width, height) for _ in range(rng.choice((0, 1, 1, 2, 3, 5, 9)))]
    masks = [blob(rng, width, height, *p) for p in points]
    answer = image_answer(rng, answered(rng, points, width, height), width, height)
    metadata = {"gt_points": np.array(points), "masks": masks, "image_size": (width, height)}
    reference = {"points": points, "size": [width, height], "masks": [encoded(rng, m) for m in masks]}
    count = {"count": len(points), "image_size": (width, height), "subset": "object", "timestamps": [], "points": []}
    counted = one(ev.PointCountEval(), count, answer)
    if "raises" not in counted:
        counted = {name: counted[name] for name in ("correct", "close")}
    case = {"answer": answer, "reference": reference, "pointing": one(ev.PointingEval(), metadata, answer)}
    extracted = safely(lambda: [[rounded(x), rounded(y)] for x, y in ev.extract_points(answer, width, height)])
    return {**case, "point_count": counted, "extract_points": extracted}


def count_case(rng: random.Random, ev: Any) -> dict[str, Any]:
    """An answer that says a number, beside points or alone."""
    expected = rng.choice((0, 1, 2, 3, 5, 8, 13, 21, 40, 60))
    said = max(0, expected + rng.choice((0, 0, 1, -1, 2, 3, 5)))
    text = rng.choice(
        (
            f"{said}",
            f" {said}. ",
            f'Counting the <points coords="0.5 1 100 200">cups</points> shows a total of {said}.',
            f'The total number of "cups" is: {said}.\nThey are located at: <points 0.5\t1 10.0 20.0/>.',
            f"The total number is: {said}",
            "There are none.",
            f'There are {said} <points coords="0.5 1 100 200 2 300 400">cups</points>.',
            "many",
            "",
            f"between {said} and {said + 3}",
        )
    )
    metadata = {"count": expected, "subset": "object", "image_size": (50, 40), "timestamps": [], "points": []}
    found = one(ev.VixMoPointCountEval(), metadata, text)
    return {"answer": text, "expected": expected, **{k: found[k] for k in ("correct", "close", "valid")}}


def video_case(rng: random.Random, ev: Any) -> dict[str, Any]:
    width, height, duration = rng.randint(30, 80), rng.randint(30, 80), rng.choice((3.0, 7.5, 20.0, 61.3))
    steps = int(2 * duration)
    points = [(rng.randint(0, steps) / 2, *place(rng, width, height)) for _ in range(rng.choice((0, 1, 2, 3, 6)))]
    points.sort(key=lambda p: p[0])
    tublets = []
    for time, x, y in points:
        shown = {time} | {max(0.0, time + rng.randint(-3, 3) / 2) for _ in range(rng.randint(0, 4))}
        tublets.append({t: blob(rng, width, height, x, y) for t in sorted(shown)})
    found = [(t + rng.choice((0, 0, 0, 0.5, -0.5, 0.1)), *beside(rng, (x, y), width, height)) for t, x, y in points]
    found = [(max(0.0, t), x, y) for t, x, y in found if rng.random() < 0.85]
    found += [(rng.randint(0, steps) / 2, *place(rng, width, height)) for _ in range(rng.choice((0, 0, 1, 3)))]
    answer = video_answer(rng, found, width, height)
    metadata = {"gt_abs_triplets": points, "gt_abs_masks": tublets, "video_duration": duration}
    times = sorted({t for t, _, _ in points})
    grouped = [[(i, x, y) for i, (s, x, y) in enumerate(points) if s == t] for t in times]
    masks = [
        [[{"time": t, "mask": encoded(rng, m)} for t, m in tublets[i].items()] for i, _, _ in group]
        for group in grouped
    ]
    reference = {"timestamps": times, "points": [[[x, y] for _, x, y in group] for group in grouped]}
    return {
        "answer": answer,
        "reference": {**reference, "size": [width, height], "duration": duration, "masks": masks},
        "video_point": one(ev.VixMoPointEval(), {**metadata, "video_height": height, "video_width": width}, answer),
        "extract_multi_image_points": safely(
            lambda: [[rounded(v) for v in p] for p in ev.extract_multi_image_points(answer, width, height)]
        ),
    }


def several_images_case(rng: random.Random, ev: Any) -> dict[str, Any]:
    """Points in several images of unlike sizes: only what is extracted, no official evaluator scores them."""
    sizes = [(rng.randint(30, 80), rng.randint(30, 80)) for _ in range(rng.randint(2, 4))]
    points = [[place(rng, *size) for _ in range(rng.choice((0, 1, 2, 4)))] for size in sizes]
    kept = [i for i, group in enumerate(points) if group] or [0]
    answer = damaged(
        rng,
        formatter(rng).format_multi_image_points(
            [i + 1 for i in kept], [points[i] for i in kept], [sizes[i] for i in kept], rng.choice(LABELS), mode="point"
        ),
    )
    widths, heights = zip(*sizes, strict=True)
    extracted = safely(
        lambda: [
            [rounded(v) for v in p]
            for p in ev.UnifiedPointFormatter().extract_multi_image_points(answer, widths, heights)
        ]
    )
    return {"answer": answer, "sizes": sizes, "extracted": extracted}


def moving(rng: random.Random, width: int, height: int, count: int) -> list[tuple[float, float]]:
    x, y = place(rng, width, height)
    dx, dy = rng.gauss(0, 3), rng.gauss(0, 3)
    path = [(min(max(x + i * dx, 0), width - 1), min(max(y + i * dy, 0), height - 1)) for i in range(count)]
    return [(round(x, 2), round(y, 2)) for x, y in path]


def answer_frames(rng: random.Random, frames: list[dict[str, Any]], fps: float, width: int, height: int) -> list[Any]:
    """An answer to a track: points moved, objects lost, numbers swapped from some frame on, other frames."""
    swap, since = rng.random() < 0.3, rng.randint(0, len(frames))
    made = []
    for i, frame in enumerate(frames):
        names = [n for n in frame["points"] if rng.random() < 0.9]
        new = dict(zip(names, reversed(names) if swap and i >= since else names, strict=True))
        points = {int(new[n]) + 1: {"point": beside(rng, frame["points"][n]["point"], width, height)} for n in names}
        if rng.random() < 0.1:
            points[9] = {"point": place(rng, width, height)}
        if points and rng.random() < 0.95:
            made.append({"time": frame["frame"] / fps, "points": points})
    if rng.random() < 0.2:
        made.append({"time": rng.randint(0, 12) / fps, "points": {7: {"point": place(rng, width, height)}}})
    return made


def track_case(rng: random.Random, ev: Any, tracking: Any) -> dict[str, Any]:
    width, height, fps = rng.randint(30, 80), rng.randint(30, 80), rng.choice((1, 2, 4, 5))
    numbers = sorted(rng.sample(range(10), rng.choice((0, 1, 2, 3, 5))))
    shown = [str(i) for i in range(rng.choice((0, 1, 2, 3, 4)))]
    paths = {name: moving(rng, width, height, 10) for name in shown}
    missing = rng.random() < 0.4  # objects that come and go
    frames = []
    for number in numbers if shown else []:
        there = [n for n in shown if not missing or rng.random() < 0.7]
        if there or missing:
            points = {n: {"point": list(paths[n][number]), "occluded": False} for n in there}
            frames.append({"frame": number, "time": number / fps, "points": points})
    pixels = {n: {f["frame"]: blob(rng, width, height, *paths[n][f["frame"]]) for f in frames} for n in shown}
    masks: dict[str, list[Any]] = {n: [pixels[n].get(i) for i in range(10)] for n in shown}
    answer = track_answer(rng, answer_frames(rng, frames, fps, width, height), width, height)
    by_frame = {f["frame"]: f["points"] for f in frames}

    def of_its_objects(_: Any, index: int, *__: Any) -> list[np.ndarray]:
        return [pixels[n][index] for n in sorted(by_frame.get(index, {}))]

    metadata = {"example_id": "a", "w": width, "h": height, "points": frames, "masks": masks, "video_fps": fps}
    replaced, theirs = missing, tracking.load_masks_at_frame
    if replaced:
        tracking.load_masks_at_frame = of_its_objects
    figures = one(ev.VideoObjectTrackingEval(), metadata, answer)
    tracking.load_masks_at_frame = theirs
    reference = {
        "frames": [{"time": f["time"], "points": {n: e["point"] for n, e in f["points"].items()}} for f in frames],
        "size": [width, height],
        "fps": fps,
        "masks": {
            n: [encoded(rng, pixels[n][f["frame"]]) if n in f["points"] else None for f in frames] for n in shown
        },
    }

    def extracted() -> list[Any]:
        found = ev.extract_tracks(answer, width, height, fps, format="video_point_track_per_frame")
        return [
            [float(f["time"]), {str(n): [rounded(v) for v in e["point"]] for n, e in f["points"].items()}]
            for f in found
        ]

    return {
        "answer": answer,
        "reference": reference,
        "objects_come_and_go": missing,
        "track": figures,
        "extract_tracks": safely(extracted),
    }


def target_case(rng: random.Random, ev: Any) -> dict[str, Any]:
    """Points in a mask (all of them) and in a box (the first)."""
    width, height = rng.randint(30, 80), rng.randint(30, 80)
    point = place(rng, width, height)
    mask = blob(rng, width, height, *point, reach=20)
    if rng.random() < 0.1:
        mask = np.ascontiguousarray(mask[: height // 2])
    answer = image_answer(rng, answered(rng, [point] * rng.choice((1, 1, 1, 2)), width, height), width, height)
    x, y, w, h = (round(v, 1) for v in (point[0] - rng.uniform(0, 9), point[1] - rng.uniform(0, 9), 12, 12))
    size = (width, height)
    bench = one(ev.PointBenchEval(), {"image_size": size, "mask": mask, "category": "spatial"}, answer)
    spot = one(
        ev.ScreenSpotEvaluator(),
        {"image_size": size, "bbox": [x, y, w, h], "kind": "web", "data_type": "icon"},
        answer,
    )
    pro = one(
        ev.ScreenSpotProEvaluator(),
        {"image_size": size, "bbox": [x, y, x + w, y + h], "group": "Office", "application": "word"},
        answer,
    )
    os_world = one(ev.OsWorldGEvaluator(), {"image_size": size, "box_coordinates": [x, y, w, h]}, answer)
    values = {
        result.get(name, result.get("raises"))
        for result, name in ((spot, "web"), (pro, "overall"), (os_world, "overall"))
    }
    return {
        "answer": answer,
        "mask": {"mask": encoded(rng, mask), "size": size},
        "box": {"box": [x, y, x + w, y + h], "size": size},
        "point_in_mask": bench.get("spatial", bench),
        "point_in_box": sorted(values, key=str),
    }


def assignment_case(rng: random.Random, linear_sum_assignment: Any) -> dict[str, Any]:
    rows, columns = rng.randint(1, 9), rng.randint(1, 9)
    whole = rng.choice((2, 4, 100, None))  # few different costs: many assignments cost the same
    cost = [[rng.random() if whole is None else rng.randrange(whole) for _ in range(columns)] for _ in range(rows)]
    found = linear_sum_assignment(np.array(cost, float))
    return {"cost": cost, "pairs": [list(map(int, pair)) for pair in zip(*found, strict=True)]}


def mask_case(rng: random.Random) -> dict[str, Any]:
    from pycocotools import mask as coco

    height, width = rng.randint(1, 60), rng.randint(1, 60)
    pixels = blob(rng, width, height, rng.uniform(0, width), rng.uniform(0, height), 30)
    if rng.random() < 0.3:
        pixels ^= np.random.default_rng(rng.randrange(10**6)).random((height, width)) < 0.05
    made = coco.encode(np.asfortranarray(pixels.astype(np.uint8)))
    bits = np.packbits(coco.decode(made).ravel()).tobytes().hex()
    return {"mask": {"size": [height, width], "counts": made["counts"].decode()}, "bits": bits}


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    import olmo.eval.evaluators as ev
    import olmo.eval.object_tracking_utils as tracking
    from scipy.optimize import linear_sum_assignment

    ev.torch, ev.dist, ev.get_world_size = NoGpu(), OneProcess, lambda: 1
    ev.mean_metric = lambda values: float(np.mean(values)) if len(values) else None
    from olmo.preprocessing.point_formatter import UnifiedPointFormatter

    ev.UnifiedPointFormatter = UnifiedPointFormatter
    kinds = {
        "image": lambda rng: image_case(rng, ev),
        "count": lambda rng: count_case(rng, ev),
        "video": lambda rng: video_case(rng, ev),
        "several_images": lambda rng: several_images_case(rng, ev),
        "track": lambda rng: track_case(rng, ev, tracking),
        "target": lambda rng: target_case(rng, ev),
        "assignment": lambda rng: assignment_case(rng, linear_sum_assignment),
        "mask": mask_case,
    }
    made = {name: [case(random.Random(f"{name} {i}")) for i in range(CASES)] for name, case in kinds.items()}
    with open(OUT, "wb") as file, gzip.GzipFile(fileobj=file, mode="wb", mtime=0, filename="") as packed:
        packed.write(json.dumps(made, separators=(",", ":")).encode())
    for name, cases in made.items():
        raised = sum('"raises"' in json.dumps(case) for case in cases)
        print(f"{name}: {len(cases)} cases, the official code raises in {raised}")


if __name__ == "__main__":
    main()
