"""Molmo2 training on NVIDIA NeMo and Megatron-core.

Importing this package is cheap on purpose: neither torch nor NeMo is imported here, so that `molmo2 --help`
answers at once. Reach for the sub-packages: `model`, `attention`, `parallel`, `data`, `convert`, `nemo`, `cli`.
"""

from molmo2_nemo import differences

differences.install()  # before anybody imports Megatron-core or NeMo through this package

__version__ = "0.1.0"
