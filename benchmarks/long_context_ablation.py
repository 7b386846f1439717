"""The tiny model with and without stage 3 (Tables 11 and 13 of the Molmo2 paper, at small scale).

    python -m benchmarks.long_context_ablation [--seeds 3] [--questions 60] [--run DIR] [--quick] [--out FILE]

Films of evaluation/needles, in which one frame has the answer, and its pictures as stills. The first two stages are
those of recipe=needle (of the run in DIR, or trained here), and then, as that recipe has films
alone, some steps more of stage 2 on stills, captions and films of up to 16 frames. From there, for every seed: `with`
trains on films of up to 128 frames and stills, and `without` on as many tokens again of stage 2's data, so that the two
differ in length alone. A seed draws both data sets anew and their order. Both answer

short video QA   films of 16 frames         image QA   the picture as a still
long video QA    films of 128 frames        caption    "Describe the picture.", scored by caption_recall

and then questions on films of 128 frames of which they are shown 8, 16, ... all: who is shown one in sixteen misses the
frame that matters in fifteen films of sixteen, so no model can answer from few. Columns and accuracy over inference
frames are means over seeds, beside each seed's own; a picture of the same name shows them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import machine, write_result
from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import VideoConfig
from molmo2_nemo.data.shard_writer import write_shards
from molmo2_nemo.evaluation.needles.needle import Needle
from molmo2_nemo.evaluation.needles.pictures import NeedlePicture
from molmo2_nemo.evaluation.task import Question, Task, TaskSettings
from molmo2_nemo.inference.prompt import Prompt

LONG, SHORT = 128, 16  # frames
SETS = {  # films, lengths of their haystacks, stills
    "sft": (800, (4, 8, 16), 800),
    "long": (300, (16, 32, 64, 128), 100),
}
STEPS = {"sft": 80, "long": 60}
SHOWN = (8, 16, 32, 64, 128)  # inference frames
DESCRIBE = "Describe the picture."
WAYS = ("with", "without")
COLUMNS = ("short video QA", "long video QA", "caption", "image QA")


def caption(picture: NeedlePicture) -> str:
    of = dict(picture.colours)
    return f"A {of.pop('picture')} picture with " + ", ".join(f"{colour} on {ground}" for ground, colour in of.items())


def png(picture: NeedlePicture) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture.pixels()).save(file, "PNG")
    return file.getvalue()


def questions_and_caption(needle: Needle) -> list[dict[str, str]]:
    asked = [*needle.questions().values(), (DESCRIBE, caption(needle.picture))]
    return [{"style": "user_qa", "question": question, "answer": answer} for question, answer in asked]


def records(stage: str, share: float, seed: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Films and stills of a stage, mixed."""
    films, lengths, stills = SETS[stage]
    rng = np.random.default_rng([seed, list(SETS).index(stage)])
    kinds = rng.permutation([True] * max(8, round(films * share)) + [False] * max(8, round(stills * share)))
    for number, is_film in enumerate(kinds):
        frames = int(rng.choice(lengths))
        needle = Needle(int(rng.integers(2**62)), frames, float(rng.uniform()))
        if is_film:
            members = {"mp4": needle.film(VideoConfig(max_frames=frames))}
            media: dict[str, Any] = {"video": "mp4"}
        else:
            members, media = {"png": png(needle.picture)}, {"images": ["png"]}
        yield (
            f"{stage}-{number:06d}",
            {"json": json.dumps(media | {"annotations": questions_and_caption(needle)}).encode()} | members,
        )


def train(stage: str, folder: Path, data: Path, steps: int, seed: int, start: Path | None = None) -> Path:
    """Trains one stage of recipe=needle on a data set, in a folder of its own; returns its checkpoint."""
    words = [f"stage={stage}", "recipe=needle", f"output_dir={folder}", f"data.sources.needle.path={data}"]
    words += [f"stage.max_steps={steps}", f"save_every={steps}", f"seed={seed}", f"data.seed={seed}"]
    words += [] if start is None else [f"init_from={start}"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("w") as log:
        subprocess.run([sys.executable, "-m", "molmo2_nemo.cli.main", "train", *words], stdout=log, check=True)
    return checkpoint(folder / stage)


def checkpoint(stage: Path) -> Path:
    from molmo2_nemo.rundir.summary import resolve_checkpoint

    return Path(resolve_checkpoint(str(stage)))


class Films:
    """Questions on films of so many frames, each asked one thing; or on stills."""

    def __init__(self, count: int, frames: int, kind: str) -> None:
        self.count, self.frames, self.kind = count, frames, kind

    def __len__(self) -> int:
        return self.count

    def questions(self, number: int, builder: ExampleBuilder) -> list[Question]:
        needle = Needle(2**62 + number, self.frames, (number * 0.618) % 1)
        asked = list(needle.questions().values())
        question, answer = asked[number % len(asked)]
        if self.kind == "caption":
            question, answer = DESCRIBE, caption(needle.picture)
        if self.kind == "image QA" or self.kind == "caption":
            prompt = Prompt(question, images=[png(needle.picture)])
        else:
            video = replace(builder.config.video, max_frames=self.frames)  # the film does not depend on what is shown
            prompt = Prompt(question, video=needle.film(video))
        return [Question(f"{self.kind}/{number}", prompt, (answer,))]


class Asked(Task):
    name, title, group, video = "ablation", "films and stills", "long video QA", True
    max_new_tokens = 32

    def __init__(self, kind: str) -> None:
        self.scorers = ("caption_recall" if kind == "caption" else "exact_match",)  # type: ignore[misc]

    def open(self, settings: TaskSettings) -> Films:
        raise NotImplementedError


def answered(checkpoint: Path, count: int, shown: Sequence[int]) -> dict[str, Any]:
    """The four columns of a checkpoint, and its accuracy on long films over inference frames, 0 to 1."""
    from molmo2_nemo.evaluation.run import evaluate
    from molmo2_nemo.inference.engine import Generator
    from molmo2_nemo.inference.load import load
    from molmo2_nemo.inference.sampling import Sampling

    model, builder, tokenizer = load(checkpoint)
    generator = Generator(model, tokenizer)

    def score(kind: str, frames: int, seen: int) -> float:
        video = replace(builder.config.video, max_frames=seen)
        own = ExampleBuilder(replace(builder.config, video=video), tokenizer, training=False)
        task = Asked(kind)
        lines = evaluate(task, Films(count, frames, kind), count, generator, own, Sampling(max_new_tokens=32))
        assert lines is not None and not any("failed" in line for line in lines), lines
        return statistics.mean(line["scores"][task.scorers[0]]["value"] for line in lines)

    columns = {
        kind: score(kind, SHORT if kind == "short video QA" else LONG, SHORT if kind == "short video QA" else LONG)
        for kind in COLUMNS
    }
    return {"columns": columns, "frames": {str(n): score("long video QA", LONG, n) for n in shown}}


def common_start(folder: Path, run: Path | None, share: float) -> Path:
    """The checkpoint from which all seeds go on: recipe=needle's second stage, and stills and captions after it."""
    if run is None:
        from benchmarks.needles import trained

        run = trained(folder / "needle", share)
    write_shards(folder / "sft", records("sft", share, 0))
    return train("sft", folder / "mixed", folder / "sft", steps("sft", share), 0, checkpoint(run / "sft"))


def steps(stage: str, share: float) -> int:
    return max(2, round(STEPS[stage] * share))


def one_seed(folder: Path, seed: int, start: Path, share: float, count: int, shown: Sequence[int]) -> dict[str, Any]:
    """Goes on both ways from the common start, and asks both."""
    for name in SETS:
        write_shards(folder / name, records(name, share, seed))
    many = steps("long", share)
    ends = {
        "with": train("long", folder / "with", folder / "long", many, seed, start),
        "without": train("long", folder / "without", folder / "sft", many, seed, start),
    }
    with ProcessPoolExecutor(len(ends), get_context("spawn")) as pool:  # side by side: an answer takes one core
        found = {way: pool.submit(answered, end, count, shown) for way, end in ends.items()}
        return {way: future.result() for way, future in found.items()}


def means(seeds: Sequence[dict[str, Any]], way: str, what: str) -> dict[str, dict[str, float]]:
    """Mean and spread (largest less smallest) over seeds."""
    found = {}
    for name in seeds[0][way][what]:
        values = [seed[way][what][name] for seed in seeds]
        found[name] = {"mean": round(statistics.mean(values), 4), "spread": round(max(values) - min(values), 4)}
    return found


def draw(result: dict[str, Any], path: Path) -> Path:
    """The columns as bars, and accuracy over inference frames."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), dpi=100)
    for number, way in enumerate(WAYS):
        values = [100 * result["means"][way]["columns"][name]["mean"] for name in COLUMNS]
        left.bar([place + 0.4 * number for place in range(len(COLUMNS))], values, 0.38, label=f"{way} stage 3")
        curve = result["means"][way]["frames"]
        right.plot(range(len(curve)), [100 * v["mean"] for v in curve.values()], "o-", label=f"{way} stage 3")
        right.set_xticks(range(len(curve)), list(curve))
    left.set_xticks([place + 0.2 for place in range(len(COLUMNS))], [name.replace(" ", "\n", 1) for name in COLUMNS])
    left.set_ylabel("score, %")
    right.set_xlabel("inference frames, of films of 128")
    right.set_ylabel("correct, %")
    right.legend(frameon=False)
    figure.suptitle(f"The tiny model with and without stage 3, {len(result['seeds'])} seeds")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--run", type=Path, help="a finished run of recipe=needle (default: its stages are trained)")
    parser.add_argument("--questions", type=int, default=60, help="of each kind, and at each number of frames")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the training: whether it runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    share, count, shown = (0.02, 4, SHOWN[:2]) if args.quick else (1.0, args.questions, SHOWN)
    head, seeds = machine(), []
    with tempfile.TemporaryDirectory(prefix="long-context-") as work:
        start = common_start(Path(work), args.run, share)
        for seed in range(1, args.seeds + 1):
            seeds.append(one_seed(Path(work) / str(seed), seed, start, share, count, shown))
            print(f"seed {seed}: {json.dumps(seeds[-1])}", flush=True)
    result = {
        "machine": head,
        "steps": {name: steps(name, share) for name in STEPS},
        "share": share,
        "questions": count,
        "means": {way: {what: means(seeds, way, what) for what in ("columns", "frames")} for way in WAYS},
        "seeds": seeds,
    }
    path = write_result("long_context_ablation", result, args.out)
    print(draw(result, Path(path).with_suffix(".png")))


if __name__ == "__main__":
    main()
