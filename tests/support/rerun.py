"""Generation without a cache: every new token runs the whole sequence again, vision included."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from molmo2_nemo.data.collate import collate
from molmo2_nemo.data.example import Example
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.model.inputs import PackInputs


@torch.no_grad()
def rerun(model: Any, prompt: Example, tokenizer: Molmo2Tokenizer, max_new_tokens: int) -> list[int]:
    """Greedy continuation of a prompt, up to the end token (left out), on one process."""
    new: list[int] = []
    device = next(model.parameters()).device
    while len(new) < max_new_tokens:
        longer = extended(prompt, new)
        batch = collate([[longer]], sequence_length=longer.num_tokens, im_patch_id=tokenizer.special.im_patch)
        inputs = PackInputs.from_batch(batch, device)
        inputs.labels = inputs.loss_weights = None
        token = int(model(inputs)[0, -1, : model.model_config.text.vocab_size].argmax())
        if token == tokenizer.eos_id:
            break
        new.append(token)
    return new


def extended(prompt: Example, new: list[int]) -> Example:
    """The prompt with generated tokens behind it."""
    count = len(new)
    following = int(prompt.position_ids[-1]) + 1

    def grown(values: np.ndarray, tail: Any) -> np.ndarray:
        return np.concatenate([values, np.asarray(tail, dtype=values.dtype)])

    return Example(
        input_ids=grown(prompt.input_ids, new),
        labels=grown(prompt.labels, [-1] * count),
        loss_weights=grown(prompt.loss_weights, [0.0] * count),
        position_ids=grown(prompt.position_ids, range(following, following + count)),
        branch_ids=grown(prompt.branch_ids, [prompt.branch_ids[-1]] * count),
        visual=grown(prompt.visual, [False] * count),
        crops=prompt.crops,
        pooling=prompt.pooling,
        unit_crops=prompt.unit_crops,
        unit_pooled_tokens=prompt.unit_pooled_tokens,
        key=prompt.key,
    )
