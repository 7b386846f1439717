"""The name of a layout, and problems of tensor and context parallelism, found before anything starts. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from molmo2_nemo.model.config import CANNOT_MERGE, Molmo2Config
from molmo2_nemo.parallel.partition import can_shard_heads
from molmo2_nemo.settings.run import ParallelConfig


def layout_name(
    tensor: int = 1,
    *,
    sequence: bool = False,
    context: int = 1,
    ulysses: int | None = None,
    pipeline: int = 1,
    data: int = 1,
) -> str:
    """A layout in a few letters, such as "DP2", "TP2+SP", "CP4x2" (4 Ulysses ranks, 2 of their groups in a ring);
    "1 process" when nothing is split.

    Args:
        ulysses: how many of the context ranks form a Ulysses group; default: all.
    """
    parts = [f"TP{tensor}"] if tensor > 1 else []
    parts += ["SP"] if sequence else []
    if context > 1:
        parts.append(f"CP{context}" if ulysses in (None, context) else f"CP{ulysses}x{context // ulysses}")
    parts += [f"{name}{size}" for name, size in (("PP", pipeline), ("DP", data)) if size > 1]
    return "+".join(parts) or "1 process"


def layout_of_run(parallel: ParallelConfig, processes: int | None = None) -> str:
    """`layout_name` of a run's settings.

    Args:
        processes: of the run, where their number is known; default: what `parallel.data` asks for.
    """
    return layout_name(
        parallel.tensor,
        sequence=parallel.sequence,
        context=parallel.context,
        ulysses=parallel.context_ulysses,
        pipeline=parallel.pipeline,
        data=parallel.data if processes is None else processes // parallel.model_size,
    )


def tensor_problems(parallel: ParallelConfig, model_config: Molmo2Config) -> Iterator[str]:
    """What of a model tensor parallelism does not divide, one line each."""
    text = model_config.text
    for what, size in (
        ("query heads", text.num_heads),
        ("key/value heads", text.num_kv_heads),
        ("feed-forward columns", text.ffn_size),
    ):
        if size % parallel.tensor:
            yield (
                f"parallel.tensor={parallel.tensor} does not divide the {size} {what} of the "
                f"{model_config.name} model; use a divisor of {size}"
            )


def context_problems(
    parallel: ParallelConfig,
    model_config: Molmo2Config,
    lengths: Mapping[str, int],
    *,
    crops: int = 0,
    attention: str = "auto",
) -> Iterator[str]:
    """Problems of context parallelism, one line for each setting, with what to choose instead.

    Args:
        lengths: config key -> tokens of a pack, for every length that the run uses.
        crops: of a pack, at most.
        attention: the kernel asked for.
    """
    context, ulysses = parallel.context, parallel.context_ulysses
    if ulysses is not None and (ulysses < 1 or context % ulysses):
        yield (
            f"parallel.context_ulysses={ulysses} does not divide parallel.context={context}: it is the number of those "
            f"ranks that shard heads (Ulysses); use one of {_divisors(context)}"
        )
        return
    yield from _heads(parallel, model_config)
    shards = context * (parallel.tensor if parallel.sequence else 1)
    what = f"context{' * tensor' if parallel.sequence else ''} = {shards}"
    for key, length in lengths.items():
        if length < shards:
            yield (
                f"{key}={length} tokens cannot be shared by {what} ranks: more ranks than tokens; lower "
                f"parallel.context or use longer packs"
            )
        elif length % shards:
            yield f"{key}={length} is not a multiple of {what}; {length // shards * shards} is"
    if attention in CANNOT_MERGE and ulysses is not None and ulysses < context:
        yield (
            f"model.attention={attention} cannot merge attention over keys of several ranks, which "
            f"parallel.context_ulysses={ulysses} below parallel.context={context} needs; use model.attention=auto, or "
            f"context_ulysses={context}"
        )
    if parallel.dynamic_context:
        yield from _dynamic(parallel, max(lengths.values(), default=1), crops)
    elif parallel.context_crops is not None:
        yield (
            f"parallel.context_crops={parallel.context_crops} has no effect without parallel.dynamic_context=true; set "
            "that, or parallel.context_crops=null"
        )


def crop_limit(parallel: ParallelConfig, max_crops: int, vision_chunk: int | None) -> int | None:
    """Most crops of a pack that one rank may get under dynamic context parallelism; None: any number.

    Unless set, what the static split of a full pack gives, as a rank's memory is only known to suffice for that. With
    crops encoded in chunks the encoder's memory does not grow with their number, so nothing is limited.
    """
    if parallel.context_crops is not None or vision_chunk is not None:
        return parallel.context_crops
    return -(-max_crops // (parallel.context * parallel.tensor))


def _heads(parallel: ParallelConfig, model_config: Molmo2Config) -> Iterator[str]:
    text, tensor, context = model_config.text, parallel.tensor, parallel.context
    ulysses = parallel.context_ulysses or context
    if text.num_heads % tensor or text.num_kv_heads % tensor:
        return  # reported elsewhere
    heads, kv_heads = text.num_heads // tensor, text.num_kv_heads // tensor
    works = [u for u in _divisors(context) if can_shard_heads(heads, kv_heads, u)]
    if ulysses in works:
        return
    key = "parallel.context" if parallel.context_ulysses is None else "parallel.context_ulysses"
    yield (
        f"{key}={ulysses} ranks would shard the {heads} query heads and {kv_heads} key/value heads that a "
        f"tensor-parallel rank of the {model_config.name} model has, which does not come out even; set "
        f"parallel.context_ulysses to one of {works}: the other ranks then show each other their keys"
    )


def _dynamic(parallel: ParallelConfig, longest: int, crops: int) -> Iterator[str]:
    context, tokens, limit = parallel.context, parallel.context_tokens, parallel.context_crops
    shards = context * parallel.tensor
    if context == 1:
        yield (
            "parallel.dynamic_context=true with parallel.context=1: there is nothing to choose; set parallel.context "
            "to the most ranks that may share a pack, or turn it off"
        )
    elif tokens is None:
        yield (
            "parallel.dynamic_context=true needs parallel.context_tokens: the most tokens of one pack that a rank has "
            f"memory for (static context parallelism gives it {longest // context} of packs of {longest})"
        )
    elif tokens * context < longest:
        yield (
            f"parallel.context_tokens={tokens}: packs of {longest} tokens do not fit on {context} ranks; set it to at "
            f"least {-(-longest // context)} or raise parallel.context"
        )
    if limit is not None and limit < max(1, -(-crops // shards)):
        yield (
            f"parallel.context_crops={limit}: packs of {crops} crops do not fit on context * tensor = {shards} ranks; "
            f"set it to at least {max(1, -(-crops // shards))} or raise parallel.context"
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
