"""The command that trains a plan: the user's own settings, with the plan's cluster and layout in place of theirs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from molmo2_nemo.cost.hardware import Cluster
from molmo2_nemo.cost.layout import Layout
from molmo2_nemo.settings.renamed import new_name
from molmo2_nemo.settings.run import RunConfig
from molmo2_nemo.settings.schema import by_dotted_key, to_dict


def train_command(
    overrides: Sequence[str],
    cfg: RunConfig,
    cluster: Cluster,
    layout: Layout,
    config_dir: str | None = None,
    config_name: str | None = None,
) -> list[str]:
    """Words of a `molmo2 train` command.

    Args:
        overrides: what the user asked for, without the plan's own `cluster=` and `nodes=`.
        cfg: what they compose to.
        config_dir: the user's own configurations.
        config_name: the one among them that composition starts from.
    """
    slurm = cluster.nodes > 1 or cfg.cluster.kind == "slurm" and any(_key(o).startswith("cluster.") for o in overrides)
    settings = [f"cluster={'slurm' if slurm else 'gpu'}"]
    settings += [f"cluster.nodes={cluster.nodes}", f"cluster.devices={cluster.per_node}"]
    settings += layout.settings.split()
    settings += _as_planned(cfg, layout, {_key(s) for s in settings})
    replaced = {_key(s) for s in settings} | {"cluster.kind"}
    start = ["molmo2", "train"] + (["--config-dir", config_dir] if config_dir else [])
    start += ["--config-name", config_name] if config_name else []
    return start + [o for o in overrides if _key(o) not in replaced] + settings


# What a plan chooses, whatever the run's settings are
FREE = (
    "parallel.*",
    "stage.micro_batch_size",
    "memory.recompute",
    "memory.recompute_attention",
    "memory.offload",
    "memory.optimizer_offload",
)


def asked_otherwise(overrides: Sequence[str], cfg: RunConfig, layout: Layout) -> list[str]:
    """What the user named and the plan's command sets otherwise: "memory.offload=false, not true"."""
    planned = dict(word.split("=", 1) for word in layout.settings.split())
    planned |= dict(word.split("=", 1) for word in _as_planned(cfg, layout, set(planned)))
    asked = by_dotted_key(to_dict(cfg))
    named = {_key(override) for override in overrides}
    found = []
    for key, value in planned.items():
        was = "null" if asked[key] is None else str(asked[key]).lower().replace(" ", "").replace("'", "")
        group = key.partition(".")[0]
        if was != value and (key in named or group in named and group in ("parallel", "memory")):
            found.append(f"{key}={value}, not {was}")
    return found


def _as_planned(cfg: RunConfig, layout: Layout, given: set[str]) -> list[str]:
    """Overrides for what plans assume, where the run is set otherwise; keys in `given` have an override already."""
    wanted = {
        "parallel.context_ulysses": (cfg.parallel.context_ulysses is None, "null"),
        "parallel.fsdp": (layout.fsdp or cfg.parallel.fsdp == "none", "none"),
        "parallel.distributed_optimizer": (cfg.parallel.distributed_optimizer, "true"),
        "memory.offload": (not cfg.memory.offload, "false"),
        "memory.recompute_attention": (not cfg.memory.recompute_attention, "false"),
        "memory.recompute_layers": (cfg.memory.recompute_layers is None, "null"),
    }
    if layout.ulysses == layout.context:
        wanted["parallel.cp_comm_type"] = (cfg.parallel.cp_comm_type == "ring", "ring")
        wanted["parallel.ring_balance"] = (cfg.parallel.ring_balance == "none", "none")
    if layout.recompute == "selective":
        wanted["memory.recompute_modules"] = (cfg.memory.recompute_modules == ["mlp"], "[mlp]")
    return [f"{key}={value}" for key, (same, value) in wanted.items() if not same and key not in given]


def _key(override: str) -> str:
    """The current name of the setting that an override sets."""
    return new_name(override.lstrip("+~").split("=", 1)[0])


def lines(words: Sequence[str], width: int = 78) -> list[str]:
    """The command quoted for a shell, on lines of at most `width` columns unless one word is longer."""
    found, line = [], ""
    for word in map(shlex.quote, words):
        if line and len(line) + len(word) + 3 > width:  # for a space, and for the backslash and the space before it
            found.append(line + " \\")
            line = "    " + word
        else:
            line = f"{line} {word}" if line else "  " + word
    return [*found, line]
