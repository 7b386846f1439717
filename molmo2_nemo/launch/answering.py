"""Whether a checkpoint can answer here as asked: its layout, the rotary range, the memory. Found from the checkpoint's
metadata before its weights are read or ranks are started, and said in one message."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.image import TileGeometry
from molmo2_nemo.errors import UserError, plural, sized
from molmo2_nemo.inference.limits import Room, tokens_of_frame
from molmo2_nemo.inference.load import Opened, opened
from molmo2_nemo.inference.prompt import Shown
from molmo2_nemo.launch.capacity import PROCESS, Machine, free_host_memory, gpu_memory
from molmo2_nemo.launch.ranks import is_rank
from molmo2_nemo.launch.reports import ERROR_DIR
from molmo2_nemo.settings.layout import context_problems, tensor_problems
from molmo2_nemo.settings.run import ParallelConfig

BYTES = {True: 2, False: 4}  # of a number: bf16 on GPUs, fp32 on the CPU
COPIES = 2  # of a prompt's crops on the host: in the prompt, and in the batch


def check_answering(
    checkpoint: Path,
    layout: ParallelConfig,
    shown: Shown,
    *,
    frames: Sequence[int | None] = (),
    longest: int | None = None,
    beyond: bool = False,
    more: Callable[[DataConfig], None] = lambda data: None,
) -> None:
    """Refuses answers that cannot be had. Ranks that a launcher of ours has started do not look again.

    Args:
        shown: what is asked for, but for the frames of several passes.
        frames: of each pass; empty: one pass, as in `shown`.
        longest: answer, in tokens; None: as the tasks have it.
        beyond: films may leave the rotary range.
        more: a further check, which raises UserError; called with data settings whose frames are not yet a pass's.

    Raises:
        UserError: not a Molmo2 checkpoint; or every reason why not, what was asked, and what would do.
    """
    if is_rank() and ERROR_DIR in os.environ:
        return
    found = opened(checkpoint, replace(shown, frames=None))
    problems = [*layout_problems(layout, found)]
    passes = [replace(shown, frames=count) for count in frames] or [shown]
    room = Room(found.data, found.tokenizer, found.model_config.text.max_position)
    for one in passes:
        own = room.problems(one, longest=longest, beyond=beyond)
        problems += [problem for problem in own if problem not in problems]
    if not problems:
        try:
            more(found.data)
        except UserError as error:
            problems.append(str(error))
        most = max(passes, key=lambda one: one.frames or 0)
        problems += memory_problems(layout, found, most)
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError("\n  - ".join([f"{len(problems)} things that cannot be had:", *problems]))


def layout_problems(layout: ParallelConfig, found: Opened) -> Iterator[str]:
    """What of a layout does not fit the model, a line each."""
    yield from tensor_problems(layout, found.model_config)
    yield from context_problems(layout, found.model_config, {}, attention=found.model_config.attention)


@dataclass(frozen=True)
class Needs:
    """The least bytes that one process takes, apart from libraries, for a prompt with media of so many crops."""

    weights: int  # on the device
    sequence: int  # on the device, of keys, values and one layer's activations
    crops: int  # on the host

    @classmethod
    def of(cls, layout: ParallelConfig, found: Opened, crops: int, tokens: int, *, gpu: bool) -> Needs:
        """Args: `tokens` are those of the media."""
        text, geometry, size = found.model_config.text, TileGeometry.of(found.data.image), BYTES[gpu]
        stored = sum(math.prod(entry.size) for entry in found.tensors.tensors.values())
        own = -(-tokens // layout.context)
        cache = 2 * text.num_layers * text.num_kv_heads * text.head_dim // layout.tensor
        layer = 2 * text.hidden_size + text.ffn_size // layout.tensor
        pixels = geometry.grid**2 * geometry.patch**2 * 3
        return cls(stored * size // layout.tensor, own * (cache + layer) * size, COPIES * crops * pixels)


def memory_problems(layout: ParallelConfig, found: Opened, shown: Shown, here: Machine | None = None) -> Iterator[str]:
    """Why this machine has not the memory for the longest film or largest image that is asked for, or for the weights
    alone.

    Args:
        here: for tests; None: this machine, of whose GPUs torch is asked.
    """
    here = here or Machine(gpu_memory(), free_host_memory())
    count, gpu = layout.model_size * layout.data, bool(here.gpus)
    crops = shown.frames or 0
    tokens = crops * tokens_of_frame(found.data)
    if not crops and (tiles := shown.max_crops or (found.data.image.high_res_max_crops if shown.high_res else 0)):
        crops = tiles + 1
    if gpu and count > len(here.gpus):
        yield f"the layout takes {plural(count, 'GPU', 'GPUs')}, here: {len(here.gpus)}; use a smaller one (parallel.*)"
        return
    needs = Needs.of(layout, found, crops, tokens, gpu=gpu)
    pools: list[tuple[str, float, float, float]] = []  # of what, free, least for the weights, for all
    if gpu:
        device = needs.weights + needs.sequence
        pools += [("GPU memory", min(here.gpus[:count]), needs.weights, device)]
        pools += [("memory", here.host, 0, count * needs.crops)]
    else:
        fixed = count * (needs.weights + PROCESS)
        rest = count * (needs.sequence + needs.crops)
        pools += [(f"memory in {plural(count, 'process', 'processes')}", here.host, fixed, fixed + rest)]
    media = f"--frames {shown.frames}: such a film" if shown.frames else f"an image of {crops - 1} tiles"
    for where, room, least, whole in pools:
        if least > room:
            share = "; share them with parallel.tensor, or take a larger machine" if gpu else "; take a larger machine"
            yield (
                f"the weights of the {found.model_config.name} model take at least {sized(least)} of {where}, of "
                f"which {sized(room)} are free{share}"
            )
        elif whole > room:
            fits = max(1, int((room - least) / (whole - least) * crops))
            yield (
                f"{media} takes at least {sized(whole)} of {where}, of which {sized(room)} are free, room for "
                f"{fits:,} {'frames' if shown.frames else 'tiles'}; ask for fewer"
            )
