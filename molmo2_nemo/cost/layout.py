"""One way to spread a model over GPUs, and what is traded for memory. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from molmo2_nemo.model.config import CANNOT_MERGE
from molmo2_nemo.settings.layout import layout_name

# (query, key) pairs of the busiest rank over the mean, by ranks of the ring: mixed packs of stage 2's and 3's lengths,
# counted (benchmarks/results/ring_balance-2026-11-29.json). Consecutive runs; beyond the last a ring is as the last.
RING_BUSIEST = {1: 1.0, 2: 1.18, 4: 1.49, 8: 1.63, 16: 1.67}
RING_BALANCED = 1.01  # with ring_balance=cost


@dataclass(frozen=True)
class Layout:
    """Sizes of the groups; ranks of tensor, then context, are neighbours (Megatron's order)."""

    tensor: int = 1
    context: int = 1
    ulysses: int = 1  # of the context ranks, those that shard heads; where there are more, they show each other keys
    pipeline: int = 1
    data: int = 1
    micro_batch: int = 1
    recompute: str = "none"  # none, selective (the MLPs), full
    offload: bool = False
    cp_comm_type: str = "ring"  # how context ranks with the same heads see each other's keys: ring, all_gather
    recompute_attention: bool = False  # with full: attention too
    ring_balance: str = "none"  # what context ranks that show each other keys hold of a pack: none (runs), cost
    optimizer_offload: bool = False
    fsdp: bool = False  # parameters and gradients sharded over data and context ranks

    @property
    def may_shard(self) -> bool:
        """Whether Megatron-FSDP can be used (settings/fsdp.py)."""
        alone = self.tensor == self.pipeline == 1 and not self.offload and not self.optimizer_offload
        return alone and self.data * self.context > 1

    @property
    def model_size(self) -> int:
        """GPUs of one replica."""
        return self.tensor * self.context * self.pipeline

    @property
    def busiest_of_ring(self) -> float:
        """Attention of the busiest context rank over the mean."""
        ranks = self.context // self.ulysses
        if ranks > 1 and self.ring_balance == "cost":
            return RING_BALANCED
        return RING_BUSIEST[min(max(RING_BUSIEST), 1 << (ranks - 1).bit_length())]

    @property
    def sequence(self) -> bool:
        """Sequence parallelism comes with tensor parallelism: it saves memory and costs nothing."""
        return self.tensor > 1

    @property
    def name(self) -> str:
        return layout_name(
            self.tensor,
            sequence=self.sequence,
            context=self.context,
            ulysses=self.ulysses,
            pipeline=self.pipeline,
            data=self.data,
        )

    @property
    def recomputed(self) -> str:
        """What is recomputed, as tables say it."""
        text = self.recompute + (" with attention" if self.recompute_attention else "")
        text += ", offload" if self.offload else ""
        text += ", FSDP" if self.fsdp else ""
        return text + (", host optimizer" if self.optimizer_offload else "")

    def keeps_attention(self, attention: str) -> bool:
        """Whether recomputed layers are given attention's results; `attention` is the kernel's name. A kernel without a
        backward of its own has none to be given."""
        return self.recompute == "full" and not self.recompute_attention and attention not in CANNOT_MERGE

    @property
    def settings(self) -> str:
        """As overrides of `molmo2 train`."""
        text = f"parallel.tensor={self.tensor} parallel.sequence={str(self.sequence).lower()}"
        text += f" parallel.context={self.context}"
        if self.ulysses < self.context:
            text += f" parallel.context_ulysses={self.ulysses}"
            text += f" parallel.ring_balance={self.ring_balance}" if self.ring_balance != "none" else ""
        text += f" parallel.pipeline={self.pipeline} parallel.data={self.data}"
        text += " parallel.fsdp=megatron" if self.fsdp else ""
        text += f" stage.micro_batch_size={self.micro_batch} memory.recompute={self.recompute}"
        text += " memory.recompute_attention=true" if self.recompute_attention else ""
        text += " memory.offload=true" if self.offload else ""
        return text + (" memory.optimizer_offload=true" if self.optimizer_offload else "")
