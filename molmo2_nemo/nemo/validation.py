"""Loss on held-out data as a callback of Lightning; training/validation.py finds it."""

from __future__ import annotations

from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.nemo.between_steps import BetweenSteps
from molmo2_nemo.settings.run import ValidationConfig
from molmo2_nemo.training.validation import HeldOut


class Validation(BetweenSteps):
    """Scores held-out data sets where `HeldOut` says that it is due.

    Args:
        config, data, folder, stage: see `HeldOut`.
    """

    def __init__(self, config: ValidationConfig, data: DataConfig, folder: str, stage: str) -> None:
        super().__init__(HeldOut(config, data, folder, stage))
