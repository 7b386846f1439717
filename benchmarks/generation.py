"""A generated token from the cache of keys and values against the whole sequence run again for it.

    python -m benchmarks.generation [--lengths 1024,8192,36864] [--preset tiny] [--out benchmarks/results/NAME.json]

A prompt of random text and one of frames with text behind them, of each length, on one process. For each:

cached    the pass over the prompt (once), then the median of TOKENS tokens
rerun     the median of passes over the sequence with the new tokens behind it, vision included: what every token costs
          without a cache. Both use the same model, kernel and threads, in turn.

The ratio is rerun to cached, per token. The prompt's pass costs about as much as one rerun in both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import machine, write_result

TOKENS, RERUNS = 16, 3


def prompt(length: int, model_config: Any, film: bool, seed: int = 0) -> Any:
    """An example of `length` random tokens; with `film`, as many frames as fit come first."""
    from molmo2_nemo.data.example import ROOT_BRANCH, Example

    rng = np.random.default_rng(seed)
    vision, text = model_config.vision, model_config.text
    side = vision.num_patches**0.5
    pooled = int(-(-side // 3)) ** 2
    frames = (length - 64) // (pooled + 2) if film else 0
    ids = rng.integers(10, text.vocab_size - 200, length)
    visual = np.zeros(length, bool)
    for frame in range(frames):
        at = frame * (pooled + 2) + 1
        ids[at : at + pooled], visual[at : at + pooled] = text.vocab_size + 2, True
    windows = np.tile(np.arange(pooled)[:, None] * 9 + np.arange(9), (frames, 1)).clip(max=vision.num_patches - 1)
    windows += np.repeat(np.arange(frames) * vision.num_patches, pooled)[:, None]
    return Example(
        input_ids=ids,
        labels=np.full(length, -1),
        loss_weights=np.zeros(length, np.float32),
        position_ids=np.arange(length),
        branch_ids=np.full(length, ROOT_BRANCH),
        visual=visual,
        crops=rng.integers(0, 255, (frames, vision.num_patches, vision.patch_size**2 * 3), np.uint8),
        pooling=windows.astype(np.int64),
        unit_crops=np.ones(frames, np.int64),
        unit_pooled_tokens=np.full(frames, pooled, np.int64),
        key="made",
    )


def seconds(work: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.no_grad()
def measured(model: Any, example: Any, tokenizer: Any) -> dict[str, Any]:
    from molmo2_nemo.attention.cache import KVCache
    from molmo2_nemo.inference.engine import Generator
    from tests.support.rerun import rerun

    generator = Generator(model, tokenizer, batch_tokens=example.num_tokens)
    device = next(model.parameters()).device
    batch = generator._collated([example])
    cache = KVCache(generator._visible(batch, [example]).to(device), 2 * TOKENS)
    first = seconds(lambda: generator._prefilled(batch, cache, device))
    token = torch.tensor([11], device=device)

    def one(number: int) -> float:
        at = torch.tensor([example.num_tokens + number], device=device)
        return seconds(lambda: generator._logits(model.next_hidden(token, at, cache)).argmax())

    cached, again = [], []
    for number in range(TOKENS):
        cached.append(one(number))
        if number % (TOKENS // RERUNS) == 0 and len(again) < RERUNS:
            again.append(seconds(lambda: rerun(model, example, tokenizer, 1)))
    return {
        "tokens": example.num_tokens,
        "crops": len(example.crops),
        "cache_mib": round(cache.bytes / 2**20, 2),
        "prompt_seconds": round(first, 4),
        "cached_seconds_per_token": round(statistics.median(cached), 5),
        "rerun_seconds_per_token": round(statistics.median(again), 4),
        "rerun_to_cached": round(statistics.median(again) / statistics.median(cached), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,8192,36864")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from molmo2_nemo import cpu
    from molmo2_nemo.inference.load import start_single_process

    start_single_process()
    from molmo2_nemo.data.config import DataConfig
    from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
    from molmo2_nemo.model.config import preset
    from molmo2_nemo.model.decoder import transformer_config
    from molmo2_nemo.model.molmo2 import Molmo2Model

    model_config = preset(args.preset)
    dtype = torch.float32 if cpu.is_cpu_only() else torch.bfloat16
    config = transformer_config(model_config, params_dtype=dtype, use_cpu_initialization=cpu.is_cpu_only())
    model = Molmo2Model(model_config, config, seed=0).eval()
    model = model if cpu.is_cpu_only() else model.cuda()
    tokenizer = Molmo2Tokenizer.load(DataConfig.tokenizer, vocab_size=model_config.text.vocab_size)
    result: dict[str, Any] = {"machine": machine(), "preset": args.preset, "threads": torch.get_num_threads()}
    for kind in ("text", "film"):
        result[kind] = []
        for length in map(int, args.lengths.split(",")):
            line = measured(model, prompt(length, model_config, kind == "film"), tokenizer)
            print(kind, line, flush=True)
            result[kind].append(line)
    write_result("generation", result, args.out)


if __name__ == "__main__":
    main()
