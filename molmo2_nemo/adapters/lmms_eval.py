"""A model of lmms-eval: `lmms-eval --model molmo2 --model_args pretrained=hf/8b --tasks chartqa,videomme`.

lmms-eval finds it by itself where this package is installed beside it (entry point `lmms_eval.models`). Answers are
those of the exported folder, through `exported.Exported`; the arguments of that class may stand in `--model_args`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from molmo2_nemo.adapters.exported import Exported, known_arguments
from molmo2_nemo.adapters.messages import Asked, of_conversation
from molmo2_nemo.errors import UserError

MANIFEST = ModelManifest("molmo2", chat_class_path="molmo2_nemo.adapters.lmms_eval.Molmo2")


class Molmo2(lmms):
    """An exported Molmo2.

    Args:
        pretrained: the exported folder.
        batch_size: questions that are worked on together.
        arguments: those of `Exported`.

    Raises:
        UserError: see `Exported`.
    """

    is_simple = False  # lmms-eval hands over conversations, not a text beside pictures

    def __init__(
        self, pretrained: str, batch_size: int | str = 1, max_batch_size: Any = None, **arguments: Any
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size={batch_size}: expected a number of at least 1")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1:
            arguments["device"] = str(self.accelerator.device)
        self.exported = Exported(pretrained, **known_arguments(arguments))

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests."""
        found: dict[int, GenerationResult] = {}
        for rows in batches(requests, self.batch_size):
            settings = requests[rows[0]].args[2]
            asked = [self.asked(requests[row]) for row in rows]
            for row, answer in zip(rows, self.exported.answers(asked, settings), strict=True):
                found[row] = GenerationResult(answer.text, TokenCounts(output_tokens=answer.tokens))
                self.cache_hook.add_partial("generate_until", (requests[row].args[0], settings), answer.text)
        return [found[row] for row in range(len(requests))]

    def asked(self, request: Instance) -> Asked:
        """The question of one request."""
        _, messages_of, _, number, task, split = request.args
        return of_conversation(messages_of(self.task_dict[task][split][number]))

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise UserError("molmo2 generates answers; tasks that compare likelihoods are not supported")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise UserError("tasks of several rounds are not supported")


def batches(requests: Sequence[Instance], most: int) -> Iterator[list[int]]:
    """Numbers of requests that ask for the same generation settings, at most `most` together."""
    kinds: dict[str, list[int]] = {}
    for row, request in enumerate(requests):
        kinds.setdefault(repr(sorted(request.args[2].items())), []).append(row)
    for rows in kinds.values():
        yield from (rows[first : first + most] for first in range(0, len(rows), most))
