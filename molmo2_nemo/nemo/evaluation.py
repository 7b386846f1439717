"""Tasks evaluated during training as a callback of Lightning; training/evaluating.py does it."""

from __future__ import annotations

from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.nemo.between_steps import BetweenSteps
from molmo2_nemo.settings.run import EvaluationConfig
from molmo2_nemo.training.evaluating import Evaluating


class Evaluation(BetweenSteps):
    """Evaluates tasks where `Evaluating` says that it is due.

    Args:
        config, data, folder, stage: see `Evaluating`.
    """

    def __init__(self, config: EvaluationConfig, data: DataConfig, folder: str, stage: str) -> None:
        super().__init__(Evaluating(config, data, folder, stage))
