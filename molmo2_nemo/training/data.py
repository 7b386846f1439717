"""The packs of a run: opened on this rank, and the loader's state over all data-parallel ranks.

With several processes and `data.share_packs`, one rank of each model-parallel group reads for all of it and a step's
micro-batches are balanced by cost (parallel/packs.py); otherwise every rank reads for itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from molmo2_nemo.cost.flops import forward_flops
from molmo2_nemo.data.balance import CostModel
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.example import Batch
from molmo2_nemo.data.lengths import length_at, micro_batches
from molmo2_nemo.data.tally import Tally
from molmo2_nemo.model.config import Molmo2Config
from molmo2_nemo.parallel.packs import SharedPacks, pack_groups
from molmo2_nemo.training.ahead import Ahead
from molmo2_nemo.training.dynamic_context import DynamicSettings, dynamic_context
from molmo2_nemo.training.step import MicroBatch, MicroBatches
from molmo2_nemo.training.whereabouts import here


class TrainingData:
    """Packs from shards, with exact resume.

    A checkpoint holds, as JSON, the loader state after the last micro-batch that every data-parallel rank has consumed;
    what was prefetched but not consumed is read again.

    Args:
        config: the data settings.
        micro_batch_size, global_batch_size: packs per forward pass and per optimizer step.
        model: the model, by whose FLOPs packs are balanced.
        dynamic: how micro-batches are assigned to blocks of the context group; None: all its ranks share each.
    """

    def __init__(
        self,
        config: DataConfig,
        micro_batch_size: int,
        global_batch_size: int,
        model: Molmo2Config,
        dynamic: DynamicSettings | None = None,
    ) -> None:
        self.config = config
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.model, self.dynamic = model, dynamic
        self.cost = cost_model(model)
        self.shared: SharedPacks | None = None
        self.ahead: Ahead[Batch, MicroBatch] | None = None
        self.restored: list[dict[str, Any]] | None = None
        self._consumed: dict[str, Any] | None = None
        self._asked = 0  # steps whose number of micro-batches was asked for

    def open(self, steps: int, micro_batches: MicroBatches | None = None) -> Iterable[Any]:
        """This rank's micro-batches, once the process groups exist.

        Args:
            steps: optimizer steps still to do.
            micro_batches: makes them ready one ahead; None: they are handed out as they are read.
        """
        batches = self._open(steps)
        if micro_batches is None:
            return batches
        assigned = self.shared is not None and self.shared.dynamic is not None
        most = (
            sum(self._of_step(step) for step in range(steps)) if self.config.lengths else steps * self._micro_batches()
        )
        self.ahead = micro_batches.ahead(batches, None if assigned else most)
        return self.ahead

    def _open(self, steps: int) -> Iterable[Any]:
        if not self.config.share_packs or dist.get_world_size() == 1:
            return self._open_stream()
        size = parallel_state.get_data_parallel_world_size()
        dynamic = None
        if self.dynamic is not None and parallel_state.get_context_parallel_world_size() > 1:
            dynamic = dynamic_context(self.dynamic, self.model)
        self.shared = SharedPacks(
            self._open_stream,
            pack_groups(parallel_state.get_data_parallel_rank(), size),
            micro_batches=self._of_step if self.config.lengths else self._micro_batches(),
            steps=steps,
            cost=self.cost if self.config.packing.balance else None,
            dynamic=dynamic,
        )
        shared = self.shared
        here.reads = lambda: shared.collecting
        return shared

    def upcoming(self) -> int | None:
        """Micro-batches of the next step on this rank, asked once a step; None: as many as in every step."""
        if self.shared is None or self.shared.dynamic is None:
            if not self.config.lengths:
                return None
            self._asked += 1
            return self._of_step(self._asked - 1)
        if self.ahead is None:
            return self.shared.upcoming()
        upcoming = self.ahead.look()
        return 1 if upcoming is None else upcoming.of_step

    def consumed(self, state: dict[str, Any]) -> None:
        """Called for every micro-batch that training takes, with the loader's state after it."""
        self._consumed = state

    @property
    def skipped(self) -> int:
        """Records this data-parallel rank could not use, up to the last micro-batch taken."""
        return sum((self._consumed or {}).get("skipped", {}).values())

    @property
    def reading(self) -> float | None:
        """Seconds that this rank took to read the last step's data, where one rank reads ahead for others (0 on those
        that do not read); None where every rank reads for itself as it trains."""
        return None if self.shared is None else self.shared.reading

    def totals(self) -> Tally:
        """Over all data-parallel ranks: examples read, records skipped, and what was left out or replaced in others,
        for each data set. Called on every rank."""
        tally = Tally()
        for state in self._states():
            if state is not None:
                tally.update(Tally.of_state(state))
        return tally

    def identity(self) -> dict[str, Any] | None:
        """The seed, and of each data set its fingerprint, records and rate, as `ExampleReader.identity` has them; None
        before this rank has read anything."""
        states = [self._consumed, *(self.restored or [])]
        return next((state["identity"] for state in states if state is not None and "identity" in state), None)

    def state(self) -> str:
        """The loader states of all data-parallel ranks as JSON, for a checkpoint. Called on every rank."""
        return json.dumps(self._states())

    def load(self, state: str) -> None:
        """Go on where `state` was taken; before `open`."""
        self.restored = [s for s in json.loads(state) if s is not None] or None

    def _micro_batches(self) -> int:
        """Of a step, on each data-parallel rank, where they are not assigned step by step."""
        return self.global_batch_size // (self.micro_batch_size * parallel_state.get_data_parallel_world_size())

    def _of_step(self, step: int) -> int:
        """The same of a step, counted from where this run began or resumed, with packs of several lengths."""
        before = self.restored[0]["steps"] if self.restored else 0
        return micro_batches(self.config, length_at(self.config, before + step), self._micro_batches())

    def _open_stream(self) -> Any:
        from molmo2_nemo.data.length_stream import LengthStream
        from molmo2_nemo.data.loader import PackStream
        from molmo2_nemo.data.ordering import CostOrder

        size, count = parallel_state.get_data_parallel_world_size(), self._micro_batches()
        kind: type[LengthStream] | type[PackStream] = LengthStream if self.config.lengths else PackStream
        packs = kind(
            self.config,
            micro_batch_size=self.micro_batch_size,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=size,
            batches_per_step=count,
        )
        if dist.get_rank() == 0:
            for words in packs.warnings():
                print(words, flush=True)
        stream: PackStream | CostOrder | LengthStream = packs
        packing = self.config.packing
        ordered = packing.balance and packing.balance_window > 1 and count == 1 and size > 1
        if ordered and not isinstance(packs, LengthStream):
            stream = CostOrder(packs, packing.balance_window, self.cost)
        if self.restored is not None:
            stream.load_states(self.restored)
        return stream

    def _states(self) -> list[dict[str, Any] | None]:
        if self._consumed is None and self.restored is not None:
            return list(self.restored)
        group = parallel_state.get_data_parallel_group()
        states: list[dict[str, Any] | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(states, self._consumed, group=group)
        return states


def cost_model(model_config: Molmo2Config) -> CostModel:
    """The cost of a pack for a model: its FLOPs, which are linear in every count."""

    def one(**counts: int) -> float:
        return forward_flops(model_config, **{"tokens": 0, "pairs": 0, **counts}).total

    return CostModel(
        token=one(tokens=1),
        pair=one(pairs=1),
        crop=one(crops=1),
        pooled_token=one(pooled_tokens=1),
        window_position=one(window_positions=1),
        score=one(scored_tokens=1),
        visual_attention=model_config.visual_attention,
        vocab_size=model_config.text.vocab_size,
    )
