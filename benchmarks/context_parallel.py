"""Bytes and messages of context-parallel attention, counted at the collectives, against the formulas.

    python -m benchmarks.context_parallel [--tokens 1024] [--out benchmarks/results/context_parallel-DATE.json]

One attention layer, forward and backward, on 2, 4 and 8 processes, for every split of the ranks into Ulysses and key
exchange, both exchanges, 16 query heads with 8 and with 2 key heads, over two packs: mixed examples of stage 2, and one
long video, which shows nearly every key to every rank.

sent      bytes that leave a rank, largest over the ranks; messages: collectives and point-to-point sends of that rank
formula   what cost/traffic.py says; for the ring with the runs that are visible in this pack
bound     what it says before the pack is known
work      allowed (query, key) pairs times heads of the busiest rank over the mean
same      largest difference of output and gradients from one process

The head size and the packs are small to keep the run short; bytes are proportional to both. Times are not measured:
eight processes share this machine's cores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import machine, write_result
from molmo2_nemo.attention.across import attend_across
from molmo2_nemo.attention.kernels import attend, choose
from molmo2_nemo.attention.mask import TokenMask
from molmo2_nemo.attention.regions import region_of
from molmo2_nemo.cost.traffic import AttentionShape, context_traffic
from molmo2_nemo.parallel.context import ContextSettings, block_groups, group_rank, group_size
from tests.support.light import run_light
from tests.support.traffic import Counter, exact, steps
from tests.support.trees import long_video_pack, mixed_pack, token_mask

HEADS, HEAD, RANKS = 16, 4, 8
METHODS = [
    (context, ulysses, cp_comm_type)
    for context in (2, 4, 8)
    for ulysses in (8, 4, 2, 1)
    for cp_comm_type in ("ring", "all_gather")
    if ulysses <= context and (ulysses < context or cp_comm_type == "ring")
]


def masks(tokens: int) -> dict[str, TokenMask]:
    mixed = mixed_pack(np.random.default_rng(3), tokens)
    return {
        "mixed": token_mask([mixed], tokens),
        "video": token_mask([long_video_pack(tokens, (tokens - 64) // 89)], tokens),
    }


def tensors(mask: TokenMask, kv_heads: int) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output: none on padding, which is not shown to other ranks."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(mask.size, 1, n, HEAD, generator=generator) for n in (HEADS, kv_heads, kv_heads, HEADS)]
    found[3][(mask.example_ids < 0).T] = 0
    return found


def measure(tokens: int) -> list[dict[str, Any]]:
    """On each of 8 ranks: messages, bytes, formulas, work and this rank's part of output and gradients."""
    counter, ready, rows = Counter(), {}, []
    packs = masks(tokens)
    for context, ulysses, cp_comm_type in METHODS:
        groups = block_groups(context, list(range(RANKS)), 1, ContextSettings(ulysses, cp_comm_type), ready)
        for name, mask in packs.items():
            for kv_heads in (8, 2):
                shape = AttentionShape(tokens, HEADS, kv_heads, HEAD, 4)
                *qkv, grad = tensors(mask, kv_heads)
                mine = slice(groups.rank * tokens // context, (groups.rank + 1) * tokens // context)
                q, k, v = (t[mine].clone().requires_grad_() for t in qkv)
                kernel = choose("auto", "cpu", q.dtype, HEAD, merged=True)
                counter.take()
                out = attend_across(q, k, v, mask, 0.5, kernel, groups)
                forward = counter.take()
                out.backward(grad[mine])
                backward = counter.take()
                chunk, size = group_rank(groups.ring), tokens * ulysses // context
                region = region_of(mask, (chunk * size, (chunk + 1) * size))
                rows.append(
                    {
                        "method": (context, ulysses, cp_comm_type if ulysses < context else ""),
                        "pack": name,
                        "kv_heads": kv_heads,
                        "forward": forward,
                        "backward": backward,
                        "formula": exact(shape, context, ulysses, cp_comm_type, mask, chunk),
                        "bound": [
                            (t.messages, t.bytes) for t in steps(context_traffic(shape, context, ulysses, cp_comm_type))
                        ],
                        "work": region.pairs * HEADS // ulysses,
                        "parts": [t.detach().numpy() for t in (out, q.grad, k.grad, v.grad)],
                        "chunks": group_size(groups.ring),
                    }
                )
    return rows


def summarise(per_rank: list[list[dict[str, Any]]], tokens: int) -> list[dict[str, Any]]:
    """One row per case: the busiest rank, whether every rank sent what the formula says, and the difference."""
    real = {name: (mask.example_ids >= 0).T.numpy()[..., None, None] for name, mask in masks(tokens).items()}
    single = {key: on_one(tokens, *key) for key in ((p, kv) for p in ("mixed", "video") for kv in (8, 2))}
    table = []
    for ranks in zip(*per_rank, strict=True):
        first = ranks[0]
        context = first["method"][0]
        difference = 0.0
        for n, whole in enumerate(single[first["pack"], first["kv_heads"]]):
            joined = np.concatenate([rank["parts"][n] for rank in ranks[:context]])
            difference = max(difference, float(np.abs((joined - whole) * real[first["pack"]]).max()))
        work = np.array([rank["work"] for rank in ranks[:context]], float)
        row: dict[str, Any] = {
            "context": context,
            "ulysses": first["method"][1],
            "cp_comm_type": first["method"][2],
            "pack": first["pack"],
            "kv_heads": first["kv_heads"],
        }
        for way, place in (("forward", 0), ("backward", 1)):
            row[f"{way}_messages"] = max(rank[way][0] for rank in ranks)
            row[f"{way}_bytes"] = max(rank[way][1] for rank in ranks)
            row[f"{way}_bytes_bound"] = max(rank["bound"][place][1] for rank in ranks)
            row[f"{way}_as_formula"] = all(tuple(rank[way]) == tuple(rank["formula"][place]) for rank in ranks)
        row |= {"work_imbalance": float(work.max() / work.mean()), "largest_difference": difference}
        table.append(row)
    return table


def on_one(tokens: int, name: str, kv_heads: int) -> list[np.ndarray]:
    """Output and gradients on one process."""
    mask = masks(tokens)[name]
    *qkv, grad = tensors(mask, kv_heads)
    q, k, v = (t.requires_grad_() for t in qkv)
    out = attend(q, k, v, region_of(mask), 0.5, choose("auto", "cpu", q.dtype, HEAD))
    out.backward(grad)
    return [t.detach().numpy() for t in (out, q.grad, k.grad, v.grad)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.context_parallel", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024, help="of a pack, a multiple of 8")
    parser.add_argument(
        "--out", type=Path, help="result file; default: benchmarks/results/context_parallel-<date>.json"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    table = summarise(run_light(measure, args.tokens, ranks=RANKS), args.tokens)
    for row in table:
        print(
            f"CP {row['context']} = {row['ulysses']} x {row['context'] // row['ulysses']} {row['cp_comm_type']:>10} "
            f"{row['pack']:>5} {row['kv_heads']} key heads: forward {row['forward_messages']} messages "
            f"{row['forward_bytes'] / 2**20:7.2f} MiB (bound {row['forward_bytes_bound'] / 2**20:7.2f}), backward "
            f"{row['backward_messages']} messages {row['backward_bytes'] / 2**20:7.2f} MiB (bound "
            f"{row['backward_bytes_bound'] / 2**20:7.2f}); as formula {row['forward_as_formula']} "
            f"{row['backward_as_formula']}; work {row['work_imbalance']:.2f}; same to {row['largest_difference']:.1e}"
        )
    settings = {"tokens": args.tokens, "heads": HEADS, "head_size": HEAD, "bytes_per_element": 4, "ranks": RANKS}
    write_result("context_parallel", {"machine": machine(), "settings": settings, "results": table}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
