"""One way to spread a model over a cluster, and what is traded for memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from molmo2_nemo.cost.hardware import Cluster
from molmo2_nemo.model.config import Molmo2Config
from molmo2_nemo.settings.layout import layout_name

RECOMPUTE_MODES = (("none", False), ("selective", False), ("full", False), ("full", True))  # and whether to offload


@dataclass(frozen=True)
class Layout:
    """Sizes of the groups; ranks of tensor, then context, are neighbours (Megatron's order)."""

    tensor: int = 1
    context: int = 1
    ulysses: int = 1  # of the context ranks, those of a node, which deal heads; the nodes' groups form a ring
    pipeline: int = 1
    data: int = 1
    micro_batch: int = 1
    recompute: str = "none"  # none, selective, full
    offload: bool = False

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
    def again(self) -> str:
        """What is computed again, as tables say it."""
        return self.recompute + (", offload" if self.offload else "")

    @property
    def settings(self) -> str:
        """As overrides of `molmo2 train`."""
        text = f"parallel.tensor={self.tensor} parallel.sequence={str(self.sequence).lower()}"
        text += f" parallel.context={self.context}"
        if self.ulysses < self.context:
            text += f" parallel.context_ulysses={self.ulysses}"
        text += f" parallel.pipeline={self.pipeline} parallel.data={self.data}"
        text += f" stage.micro_batch_size={self.micro_batch} memory.recompute={self.recompute}"
        return text + (" memory.offload=true" if self.offload else "")


def layouts(model: Molmo2Config, cluster: Cluster, packs: int, length: int) -> Iterator[Layout]:
    """Every layout that the model, the cluster and the batch allow.

    Args:
        packs: per optimizer step.
        length: tokens of a pack.
    """
    text = model.text
    for tensor in _powers(cluster.per_node):
        if text.num_heads % tensor or text.num_kv_heads % tensor or text.ffn_size % tensor:
            continue
        for context in _powers(min(32, cluster.gpus // tensor)):
            for pipeline in _powers(min(8, cluster.gpus // (tensor * context))):
                data, left = divmod(cluster.gpus, tensor * context * pipeline)
                ulysses = min(context, max(1, cluster.per_node // tensor))
                if left or packs % data or text.num_layers % pipeline or length % (context * tensor):
                    continue
                if not fits_heads(model, tensor, ulysses):
                    continue
                for micro_batch in (1, 2, 4):
                    if packs % (data * micro_batch):
                        continue
                    for recompute, offload in RECOMPUTE_MODES:
                        yield Layout(tensor, context, ulysses, pipeline, data, micro_batch, recompute, offload)


def fits_heads(model: Molmo2Config, tensor: int, ulysses: int) -> bool:
    """Whether the heads of a tensor-parallel rank can be dealt over `ulysses` ranks."""
    queries, keys = model.text.num_heads // tensor, model.text.num_kv_heads // tensor
    return queries % ulysses == 0 and (keys % ulysses == 0 or ulysses % keys == 0)


def _powers(most: int) -> Iterator[int]:
    size = 1
    while size <= most:
        yield size
        size *= 2
