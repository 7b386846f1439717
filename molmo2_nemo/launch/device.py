"""Whether this machine can compute as a run asks (`cluster.precision=fp8`, `model.attention`, `kernels.*`,
`data.video.decoder`, `memory.optimizer_offload`) and log where it asks: found before a folder is made or anything is
loaded.

Only what is asked for by name is looked at: what `auto` and `plain` take runs anywhere. To find out takes torch, and on
a GPU a context and a small compilation, which a launcher would hold for as long as the run lasts. So a process of its
own does it, and ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from molmo2_nemo.compat import logger_problems
from molmo2_nemo.errors import UserError
from molmo2_nemo.model.config import PRESETS, preset
from molmo2_nemo.processes import as_parent, die_with_parent, quiet
from molmo2_nemo.settings.run import RunConfig

ANYWHERE = ("auto", "plain", "blocks", "pyav")


@dataclass(frozen=True)
class Asked:
    """What a run asks of its device."""

    precision: str  # cluster.precision
    attention: str  # model.attention
    head_size: int
    decoder: str  # data.video.decoder
    kernels: dict[str, str]  # of `kernels.*`, those that name a way
    optimizer_offload: bool = False  # memory.optimizer_offload

    @classmethod
    def by(cls, cfg: RunConfig) -> Asked:
        ways = {piece: way for piece, way in vars(cfg.kernels).items() if way not in ANYWHERE}
        text = preset(cfg.model.preset).text
        decoder, on_host = cfg.data.video.decoder, cfg.memory.optimizer_offload
        return cls(cfg.cluster.precision, cfg.model.attention, text.head_dim, decoder, ways, on_host)

    @property
    def special(self) -> bool:
        """Whether there is anything that some machine cannot do."""
        named = {self.attention, self.decoder} - set(ANYWHERE)
        return self.precision == "fp8" or bool(named or self.kernels or self.optimizer_offload)


def device_problems(cfg: RunConfig) -> Iterator[str]:
    """Why the machine of this process cannot compute as the run asks, one line for each setting; nothing where it can.
    Of several processes on a node only the first looks."""
    yield from logger_problems({"wandb": cfg.log.wandb, "mlflow": cfg.log.mlflow})
    if cfg.model.preset not in PRESETS or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    asked = Asked.by(cfg)
    if not asked.special:
        return
    command = [sys.executable, "-m", "molmo2_nemo.launch.device", json.dumps(asdict(asked))]
    done = subprocess.run(command, env={**os.environ, **as_parent()}, capture_output=True, text=True)
    if done.returncode == 0:
        yield from json.loads(done.stdout.splitlines()[-1])
        return
    said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    yield (
        f"whether this machine can run {', '.join(_named(asked))} was not found out: the process that tried ended with "
        f"exit code {done.returncode} ({said[:200]}); leave these settings at their defaults"
    )


def _named(asked: Asked) -> Iterator[str]:
    if asked.precision == "fp8":
        yield "cluster.precision=fp8"
    if asked.attention not in ANYWHERE:
        yield f"model.attention={asked.attention}"
    if asked.decoder not in ANYWHERE:
        yield f"data.video.decoder={asked.decoder}"
    if asked.optimizer_offload:
        yield "memory.optimizer_offload=true"
    yield from (f"kernels.{piece}={way}" for piece, way in asked.kernels.items())


def problems_here(asked: Asked) -> Iterator[str]:
    """The same, found in this process."""
    import torch

    from molmo2_nemo.attention.kernels import choose as choose_attention
    from molmo2_nemo.data.video.decoders import check_decoder
    from molmo2_nemo.fused.choice import choose
    from molmo2_nemo.training.precision import check_precision

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if asked.precision == "fp32" else torch.bfloat16
    if asked.optimizer_offload and device == "cpu":
        yield (
            "memory.optimizer_offload=true moves the optimizer's state from a GPU to its host, and there is no GPU "
            "here: it is in host memory anyway; set memory.optimizer_offload=false"
        )
    tries: list[Callable[[], Any]] = [
        lambda: check_precision(asked.precision),  # type: ignore[arg-type]
        lambda: choose_attention(asked.attention, device, dtype, asked.head_size),
        lambda: check_decoder(asked.decoder),
    ]
    tries += [lambda p=p, w=w: choose(p, w, device, dtype) for p, w in asked.kernels.items()]  # type: ignore[misc]
    for attempt in tries:
        try:
            attempt()
        except UserError as error:
            yield str(error)


if __name__ == "__main__":
    die_with_parent()
    quiet()
    print(json.dumps(list(problems_here(Asked(**json.loads(sys.argv[1]))))))
