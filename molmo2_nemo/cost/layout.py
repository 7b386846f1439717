"""One way to spread a model over GPUs, and what is traded for memory. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from molmo2_nemo.model.config import CANNOT_MERGE
from molmo2_nemo.settings.layout import layout_name


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

    @property
    def model_size(self) -> int:
        """GPUs of one replica."""
        return self.tensor * self.context * self.pipeline

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
        return text + (", offload" if self.offload else "")

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
        text += f" parallel.pipeline={self.pipeline} parallel.data={self.data}"
        text += f" stage.micro_batch_size={self.micro_batch} memory.recompute={self.recompute}"
        text += " memory.recompute_attention=true" if self.recompute_attention else ""
        return text + (" memory.offload=true" if self.offload else "")
