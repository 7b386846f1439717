"""The optimizer's groups: which parameters are in each, and how checkpoints know them.

Groups `vit`, `connector` (with the 128 extra embedding rows) and `llm` are the fields of OptimConfig, which also says
how the names of their parameters begin; a parameter group knows its own by "name". Beside adapters the whole weights of
`llm` that train are a fourth group, `beside_adapters`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from molmo2_nemo.settings.run import BESIDE_ADAPTERS, OPTIMIZER_GROUPS, OptimConfig

# Megatron's checkpoints match parameter groups by lr_mult, among fields that are alike for all of ours. Nothing
# multiplies by it: lr_schedule.py sets the rates.
LR_MULT = {name: float(number) for number, name in enumerate((*OPTIMIZER_GROUPS, BESIDE_ADAPTERS), start=1)}
UNNAMED = {"vit": 1.0, "connector": 2.0, "llm": 3.0}  # lr_mult in checkpoints from before groups had names


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to a LoRA adapter."""
    return "lora_" in name


def group_of(name: str, adapters: bool = False) -> str:
    """The optimizer group of a parameter, by its canonical (or wrapped) name.

    Args:
        adapters: the model has some.
    """
    while name.startswith("module."):
        name = name.removeprefix("module.")
    group = next(group for group, beginnings in OPTIMIZER_GROUPS.items() if name.startswith(beginnings))
    return BESIDE_ADAPTERS if group == "llm" and adapters and not is_adapter(name) else group


def trained_groups(trained: Iterable[str]) -> tuple[str, ...]:
    """The groups that are judged and logged, in this order: those of every run, and of the others what is trained."""
    return (*OPTIMIZER_GROUPS, *(name for name in trained if name not in OPTIMIZER_GROUPS))


def group_overrides(optim: OptimConfig, adapters: bool = False) -> dict[ParamKey, dict[str, Any]]:
    """The groups as Megatron's optimizer wants them: which parameters, and what their group is called.

    Args:
        adapters: the model has some.
    """
    overrides: dict[ParamKey, dict[str, Any]] = {}
    for group in LR_MULT:
        predicate = ParamWithNamePredicate(
            name=group, fn=lambda p, name, group=group: group_of(name, adapters) == group
        )
        overrides[ParamKey(with_name_predicate=predicate)] = dict(
            name=group,
            max_lr=getattr(optim, group).lr,
            min_lr=getattr(optim, group).lr * optim.final_lr_fraction,
            lr_mult=LR_MULT[group],
            wd_mult=1.0,
        )
    return overrides


def name_saved_groups(state_dict: Any) -> None:
    """Give every parameter group of a checkpoint its name, where it has none, and the lr_mult of that name, in place.

    So a checkpoint is read whatever the order of OPTIMIZER_GROUPS was when it was written.
    """
    for state in state_dict if isinstance(state_dict, list) else [state_dict]:
        for group in state.get("optimizer", state)["param_groups"]:
            key = "lr_mult" if "lr_mult" in group else "pre_lr_mult"  # NeMo's name for it
            named = next((name for name, number in UNNAMED.items() if number == group[key]), None)
            group.setdefault("name", named)
            group[key] = LR_MULT[group["name"]]
