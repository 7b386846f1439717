"""Tasks evaluated during training on the run's own ranks, without any effect on it: data, random states and weights
stay theirs.

A signal that ends the run is noticed after every few items. What was due is then done when the run resumes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.evaluation.results import called, groups_of, main_score, table, write_result
from molmo2_nemo.evaluation.suite import Pass, passes_of_run, said_of_media
from molmo2_nemo.inference.engine import Generator
from molmo2_nemo.inference.sampling import Sampling
from molmo2_nemo.model.molmo2 import Molmo2Model
from molmo2_nemo.rundir.lines import append_line
from molmo2_nemo.rundir.paths import EVALUATION, EVALUATIONS
from molmo2_nemo.settings.run import EvaluationConfig
from molmo2_nemo.training.between_steps import Leaves, left_to_do, say_left
from molmo2_nemo.training.overlap import finish_gathers
from molmo2_nemo.training.whereabouts import Work, here

COUNTED = ("questions", "failed", "unscored")


class Evaluating:
    """Evaluates every task after every `config.every` steps and after the last; writes evaluation.jsonl, and the
    answers to evaluation/step=N. A run that resumes at a step where it was due but not done begins with it.

    Args:
        data: the run's data settings.
        folder: the stage's folder.
        stage: name shown with the scores.
    """

    def __init__(self, config: EvaluationConfig, data: DataConfig, folder: str, stage: str) -> None:
        self.config, self.data, self.stage, self.folder = config, data, stage, Path(folder)
        self.path = self.folder / EVALUATIONS
        self.passes: list[Pass] = []

    def start(self, step: int, last_step: int) -> bool:
        """Open the tasks; whether they are still to be evaluated at this step. A collective of all ranks.

        Raises:
            UserError: data that are not there.
        """
        self.passes = passes_of_run(self.config, self.data.root)
        tokenizer = Molmo2Tokenizer.load(self.data.tokenizer, vocab_size=self.data.vocab_size)
        self.builder = ExampleBuilder(self.data, tokenizer, training=False)
        left = left_to_do(self.path, step)
        return self.due(step, last_step) and step > 0 and left

    def due(self, step: int, last_step: int) -> bool:
        return step % self.config.every == 0 or step == last_step

    def score(self, step: int, chunks: list[Any], leaves: Leaves) -> dict[str, float]:
        """Evaluate all tasks and write down what came of it, unless a signal ends the run meanwhile. A collective of
        all ranks.

        Args:
            chunks: this rank's parts of the model, as Megatron's schedules take them: one.

        Returns:
            The scores, for loggers, on rank 0.
        """
        start, results = time.perf_counter(), []
        (chunk,) = chunks

        def goes_on(wish: bool = False) -> tuple[bool, bool]:
            here.at(Work.EVALUATING)
            return leaves(wish)

        here.at(Work.EVALUATING)
        with answering(chunk) as model:
            generator = Generator(model, self.builder.tokenizer, batch_tokens=self.config.batch_tokens)
            for one in self.passes:
                longest = Sampling(self.config.max_new_tokens or one.task.max_new_tokens)
                found = one.run(generator, self.builder, longest, {"step": step}, leaves=goes_on)
                if found is None:
                    say_left(f"{self.stage} step {step}  scores")
                    return {}
                results.append(found[0])
                if dist.get_rank() == 0:
                    write_result(self.folder / EVALUATION / f"step={step}", *found)
            media = said_of_media(generator)
        if dist.get_rank() != 0:
            return {}
        scores = {called(result): main_score(result) for result in results}
        groups = groups_of(scores, {called(result): result["group"] for result in results})
        counts = {
            called(result): {kind: result[kind] for kind in ("questions", "failed", "unscored")} for result in results
        }
        line = {"step": step, "time": time.time(), "tasks": scores, "groups": groups, "counts": counts}
        append_line(self.path, line | {"seconds": time.perf_counter() - start})
        print(f"{self.stage} step {step}  scores:", table(results), *media, sep="\n", flush=True)
        return {f"evaluation/{name}": score for name, score in scores.items() if score is not None}


@contextmanager
def answering(chunk: Any) -> Iterator[Any]:
    """The Molmo2Model in a part of the model that is being trained, in evaluation mode, with all of its parameters."""
    (model,) = (module for module in chunk.modules() if isinstance(module, Molmo2Model))
    finish_gathers([part for part in chunk.modules() if isinstance(part, DistributedDataParallel)])
    chunk.eval()
    try:
        yield model
    finally:
        chunk.train()
