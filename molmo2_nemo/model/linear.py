"""torch's linear layer without fresh weights."""

from __future__ import annotations

from torch import nn


class Linear(nn.Linear):
    """nn.Linear whose parameters are whatever lay in memory, until model/init.py or a checkpoint fills them.

    torch would draw them first, which takes a few seconds for an encoder, and nothing would read what it drew.
    """

    def reset_parameters(self) -> None:
        pass
