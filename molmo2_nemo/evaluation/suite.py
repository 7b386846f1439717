"""Several tasks, each in one pass or in several with more and more frames: opened before a model is there, then run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.prompt_file import refuse
from molmo2_nemo.evaluation.results import called, result_of
from molmo2_nemo.evaluation.scorers import find_scorer
from molmo2_nemo.evaluation.shard_task import OwnData
from molmo2_nemo.evaluation.task import Items, Task, TaskSettings
from molmo2_nemo.evaluation.tasks import AUTO, find_task
from molmo2_nemo.settings.run import EvaluationConfig

if TYPE_CHECKING:
    from molmo2_nemo.data.build import ExampleBuilder
    from molmo2_nemo.data.config import DataConfig
    from molmo2_nemo.evaluation.kept import KeptAnswers
    from molmo2_nemo.evaluation.run import Leaves
    from molmo2_nemo.inference.engine import Generator
    from molmo2_nemo.inference.sampling import Sampling


def chosen(names: Sequence[str], data: str | None) -> list[Task]:
    """The tasks of these names.

    Args:
        data: shards of the user's own, for the task auto.

    Raises:
        UserError: no name, an unknown or a repeated one, or `data` without auto or the other way round.
    """
    if not names:
        raise UserError("no tasks: name some (molmo2 evaluate --list shows them), or shards with --data DIR")
    if len(set(names)) < len(names):
        raise UserError(f"{','.join(names)}: name tasks, each once; molmo2 evaluate --list shows them")
    tasks = [OwnData(data or "") if name == AUTO else find_task(name) for name in names]
    own = next((task.name for task in tasks if isinstance(task, OwnData)), None)
    if own in names:
        raise UserError(
            f"{data}: its results get the folder's name, which the task {own} has; evaluate them one after the other, "
            "with an --out for each"
        )
    if (AUTO in names) != (data is not None):
        raise UserError("the task auto and the data belong together: they name the shards that auto scores by style")
    return tasks


@dataclass(frozen=True)
class Pass:
    """A task, how it is run, and its items."""

    task: Task
    settings: TaskSettings
    items: Items

    def run(
        self,
        generator: Generator,
        builder: ExampleBuilder,
        sampling: Sampling,
        made_with: dict[str, Any],
        advance: Callable[[int], None] = lambda item: None,
        leaves: Leaves | None = None,
        kept: KeptAnswers | None = None,
    ) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """The task's result and its lines (run.evaluate); None where a signal came. A collective of all ranks.

        Args:
            builder: with the run's number of frames, which the pass replaces by its own.
            made_with: settings to note beside the figures.
            kept: not opened yet.
        """
        from molmo2_nemo.data.build import ExampleBuilder
        from molmo2_nemo.evaluation.run import evaluate

        frames = self.settings.frames
        if frames is not None:
            video = replace(builder.config.video, max_frames=frames)
            builder = ExampleBuilder(replace(builder.config, video=video), builder.tokenizer, training=False)
        if kept is not None:
            kept.open(builder.config, sampling)
        lines = evaluate(self.task, self.items, self.count, generator, builder, sampling, advance, leaves, kept)
        if lines is None:
            return None
        noted = {
            "frames": frames,
            "limit": self.settings.limit,
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop": list(sampling.stop),
            "seed": self.settings.seed,
        }
        return result_of(self.task.name, self.task.group, lines, made_with | noted), lines

    @property
    def name(self) -> str:
        """That of its result."""
        return called({"task": self.task.name, "settings": {"frames": self.settings.frames}})

    @property
    def count(self) -> int:
        """Items that are asked."""
        return min(len(self.items), self.settings.limit or len(self.items))


def check_passes(passes: Sequence[Pass], data: DataConfig) -> None:
    """Raises UserError: a task that cannot ask anything with the media shown as `data` says, and its pass as it says
    itself."""
    for one in passes:
        video = data.video if one.settings.frames is None else replace(data.video, max_frames=one.settings.frames)
        one.task.check(one.settings, replace(data, video=video))


def passes_of_run(config: EvaluationConfig, root: str) -> list[Pass]:
    """The tasks that a run evaluates while it trains, with their items.

    Args:
        root: `data.root`, where the settings name no other.

    Raises:
        UserError: an unknown task, or data that are not there.
    """
    settings = TaskSettings(Path(config.root or root), config.limit, depths=config.depths)
    return opened(chosen(config.tasks, config.data), settings, [config.frames])


def opened(tasks: Sequence[Task], settings: TaskSettings, frames: Sequence[int | None] = (None,)) -> list[Pass]:
    """Every pass of every task; a task without videos has one.

    Raises:
        UserError: data that are not there, or a scorer that is not.
    """
    found, missing = [], []
    for task in tasks:
        for name in task.scorers:
            find_scorer(name)
        try:
            for most in frames if task.video else [None]:
                own = replace(settings, frames=most)
                found.append(Pass(task, own, task.open(own)))
        except UserError as error:
            missing.append(str(error))
    refuse(missing, "tasks cannot be asked")
    return found


def said_of_media(generator: Generator) -> list[str]:
    """How many media were decoded and crops encoded, and for how many questions that was done before; nothing where
    there were none. A collective of all ranks."""
    from molmo2_nemo.inference.ranks import summed

    seen = summed({"decoded": generator.seen.decoded, "reused": generator.seen.reused}, replicas=True)
    crops = summed({"encoded": generator.media.encoded, "reused": generator.media.reused}, replicas=False)
    if not seen["decoded"]:
        return []
    return [
        f"media: {seen['decoded']:,} decoded, for {seen['reused']:,} further questions not again",
        f"crops: {crops['encoded']:,} encoded, {crops['reused']:,} of earlier questions not again",
    ]
