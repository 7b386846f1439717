"""Tasks of multiple choice whose items are the records of a data set of ours, asked in the layout of evaluation."""

from __future__ import annotations

from molmo2_nemo.data.annotations import Annotation, MultipleChoice
from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.multiple_choice import standard_choice
from molmo2_nemo.data.record import Record, parse_record
from molmo2_nemo.errors import DataError
from molmo2_nemo.evaluation.choice import choice_reference
from molmo2_nemo.evaluation.records import RecordItems, entries, settled
from molmo2_nemo.evaluation.shard_task import ShardTask
from molmo2_nemo.evaluation.task import Question, TaskSettings
from molmo2_nemo.inference.prompt import Prompt


class ChoiceItems(RecordItems):
    """The records of a data set; each question of multiple choice is asked in one fixed layout (`standard_choice`), in
    a conversation of its own, the options in their order, and its reference has all of them."""

    def questions(self, number: int, builder: ExampleBuilder) -> list[Question]:
        """See `Items`.

        Raises:
            BadRecord: the record cannot be used, or has no question of multiple choice.
        """
        key, members = self.dataset.read(number)
        record = settled(parse_record(key, members, max_json_bytes=builder.config.limits.json_bytes))
        turns = [turn for a in record.annotations if isinstance(a, Annotation) for turn in entries(a)]
        asked = [turn for turn in turns if isinstance(turn, MultipleChoice)]
        if not asked:
            raise DataError(f"record {key}: no question of multiple choice")
        return [self._question(f"{key}/{place}", record, entry) for place, entry in enumerate(asked)]

    def _question(self, key: str, record: Record, entry: MultipleChoice) -> Question:
        text, _ = standard_choice(entry.question, entry.options, entry.answer, unlabelled=entry.unlabelled)
        prompt = Prompt(text, record.images, record.video, entry.style.name, clip=record.clip, sampling=record.sampling)
        reference = choice_reference(entry.answer, entry.options, unlabelled=entry.unlabelled)
        return Question(key, prompt, (reference,), self.scorers, {"style": entry.style.name})


class ChoiceTask(ShardTask):
    """A task of multiple choice on a data set that `molmo2 prepare` wrote."""

    def open(self, settings: TaskSettings) -> ChoiceItems:
        return ChoiceItems(self.found(settings), self.name, self.scorers)
