"""The parts of a prepared run, in the order of their value: what is started, how long it may take.

What stands in braces in a command is filled in by the runner: {work} is the folder for results, of which a part writes
{work}/NAME.json; {data} has the shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

SECONDS = 590  # of a whole run: machines that are lent end a command after 600
ON_CPU = 10.0  # times its limit that a part may take on a CPU
CLOSING = 8  # of them, for the page
LEAST = 15  # seconds below which a part is not begun


@dataclass(frozen=True)
class Part:
    name: str
    title: str
    expected: int  # seconds on an H100, by estimate
    limit: int  # seconds after which it is stopped
    command: tuple[str, ...]  # arguments of python
    tiny: tuple[str, ...] | None  # the same at small sizes, on a CPU; None: it needs a card
    optional: bool = False  # begun only if all of its expected time is left

    @property
    def module(self) -> str:
        return self.command[1]

    def missing(self) -> str | None:
        """Why it cannot be started in this project at all."""
        return None if find_spec(self.module) else f"there is no {self.module} here"


STEPS = ("--micro-batches", "1", "--steps", "4", "--warmup", "2")  # the first ones compile
PROFILES = ("--profiles", "{work}/profiles")
TINY_STEPS = ("--micro-batches", "1", "--steps", "2", "--warmup", "1")


def steps(name: str, stage: str, layers: Sequence[int], *more: str) -> tuple[str, ...]:
    """Training steps of the 4B at full width."""
    words = ("-m", "benchmarks.train_step", "--model", "4b", "--stages", stage, "--layers", *map(str, layers), *STEPS)
    return (*words, "--out", f"{{work}}/{name}.json", "memory.recompute=full", *more)


def tiny_steps(name: str, stage: str, layers: Sequence[int], *more: str) -> tuple[str, ...]:
    words = ("-m", "benchmarks.train_step", "--tiny", "--stages", stage, "--layers", *map(str, layers), *TINY_STEPS)
    return (*words, "--out", f"{{work}}/{name}.json", *more)


TRAIN = (
    *("-m", "molmo2_nemo.cli.main", "train", "recipe=tiny", "stage=pretrain", "parallel=single", "save_every=2"),
    *("output_dir={work}/run", "data.sources.demo.path={data}/pretrain", "log.tensorboard=false"),
)
BF16 = "cluster.precision=bf16"

PARTS = (
    Part(
        "environment",
        "what is installed here",
        10,
        60,
        ("-m", "benchmarks.gpu.environment", "--out", "{work}/environment.json"),
        ("-m", "benchmarks.gpu.environment", "--out", "{work}/environment.json"),
    ),
    Part(
        "tests",
        "tests/gpu: kernels on the card against the dense oracle",
        60,
        110,
        ("-m", "pytest", "tests/gpu", "-n", "4", "--tb=short", "--color=no"),
        ("-m", "pytest", "tests/gpu", "-rs", "--tb=short", "--color=no"),
    ),
    Part(
        "train_sft",
        "4B steps at stage 2: 16,384 tokens, 128 crops",
        85,
        150,
        steps("train_sft", "sft", (2, 6), "log.profile=[6,6]", *PROFILES),
        tiny_steps("train_sft", "sft", (1, 2), "log.profile=[3,3]", *PROFILES),
    ),
    Part(
        "train_long",
        "4B steps at stage 3: 36,864 tokens, 384 crops",
        90,
        160,
        steps("train_long", "long", (2, 4), "log.profile=[6,6]", *PROFILES),
        tiny_steps("train_long", "long", (1, 2), "log.profile=[3,3]", *PROFILES),
    ),
    Part(
        "kernels",
        "fast pieces against their plain twins",
        60,
        90,
        ("-m", "benchmarks.kernels", "--model", "4b", "--tokens", "36864", "--out", "{work}/kernels.json"),
        ("-m", "benchmarks.kernels", "--tokens", "256", "--repeats", "1", "--out", "{work}/kernels.json"),
    ),
    Part(
        "attention",
        "attention against the dense bias, full flash and flex",
        50,
        90,
        (
            *("-m", "benchmarks.attention", "--sizes", "16384", "--packs", "2", "--video", "36864"),
            *("--repeats", "5", "--out", "{work}/attention.json"),
        ),
        (
            *("-m", "benchmarks.attention", "--sizes", "1024", "--packs", "1", "--video", "1152"),
            *("--repeats", "1", "--out", "{work}/attention.json"),
        ),
    ),
    Part(
        "probe",
        "the card's ceilings: copies, products, full attention",
        35,
        70,
        ("-m", "benchmarks.gpu.probe", "--out", "{work}/probe.json"),
        ("-m", "benchmarks.gpu.probe", "--tiny", "--out", "{work}/probe.json"),
    ),
    Part(
        "curve",
        "20 steps of the tiny model in bf16: the card against the CPU",
        60,
        100,
        ("-m", "benchmarks.gpu.curve", "--data", "{data}", "--work", "{work}/curve", "--out", "{work}/curve.json"),
        (
            *("-m", "benchmarks.gpu.curve", "--data", "{data}", "--work", "{work}/curve", "--steps", "6"),
            *("--out", "{work}/curve.json"),
        ),
    ),
    Part(
        "tiny",
        "the tiny recipe in bf16, from shards, with checkpoints",
        40,
        80,
        (*TRAIN, "cluster=gpu", "stage.max_steps=4"),
        (*TRAIN, BF16, "stage.max_steps=4"),
    ),
    Part(
        "tiny_resume",
        "the same run, resumed",
        30,
        60,
        (*TRAIN, "cluster=gpu", "stage.max_steps=6"),
        (*TRAIN, BF16, "stage.max_steps=6"),
    ),
    Part(
        "depth",
        "one more depth at stage 2: does the line through the others hold?",
        45,
        80,
        steps("depth", "sft", (10,)),
        tiny_steps("depth", "sft", (4,)),
        optional=True,
    ),
    Part(
        "offload",
        "stage 3 with saved activations on the host",
        45,
        70,
        steps("offload", "long", (2,), "memory.offload=true"),
        tiny_steps("offload", "long", (1,), "memory.recompute=full", "memory.offload=true"),
        optional=True,
    ),
)
NAMES = tuple(part.name for part in PARTS)


@dataclass
class Budget:
    """Seconds of a run."""

    total: float = SECONDS
    used: float = 0.0
    patience: float = 1.0  # times a part's limit: on a CPU, whose speed nobody knows

    @property
    def left(self) -> float:
        return self.total - self.used - CLOSING

    def limit(self, part: Part) -> float | str:
        """How long a part may take now, or why it is not begun."""
        wanted = part.expected if part.optional else LEAST
        if self.left < wanted:
            return f"{max(0, self.left):.0f} s are left, {wanted} are needed"
        return min(part.limit * self.patience, self.left)


def chosen(names: Sequence[str]) -> list[Part]:
    """Parts by name, in their own order; what the environment is comes first in any case.

    Raises:
        ValueError: no such part.
    """
    if unknown := [name for name in names if name not in NAMES]:
        raise ValueError(f"{unknown[0]}: no such part; there are {', '.join(NAMES)}")
    return [part for part in PARTS if not names or part.name in names or part is PARTS[0]]
