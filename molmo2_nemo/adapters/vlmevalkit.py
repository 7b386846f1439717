"""A model of VLMEvalKit. It knows no plugins, so this module is started in place of its run.py, in its checkout:

    python -m molmo2_nemo.adapters.vlmevalkit hf/8b --data ChartQA_TEST Video-MME --work-dir outputs
    torchrun --nproc-per-node=8 -m molmo2_nemo.adapters.vlmevalkit hf/8b --data ChartQA_TEST

    python -m molmo2_nemo.adapters.vlmevalkit hf/8b,max_frames=64,max_new_tokens=32 --data Video-MME

It makes the exported folder known under its own name, and hands all other words to run.py. Behind a comma may stand
arguments of `exported.Exported` and generation settings.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

try:
    from vlmeval.vlm.base import BaseModel
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"molmo2: {error}; start this in a checkout of VLMEvalKit whose requirements are installed")

from molmo2_nemo.adapters.exported import Exported, known_arguments, split_words
from molmo2_nemo.adapters.messages import of_parts, of_turns
from molmo2_nemo.errors import UserError, user_message


class Molmo2(BaseModel):
    """An exported Molmo2.

    Args:
        model_path: the exported folder.
        generation: `max_new_tokens`, `temperature` and others of `Exported.answers`.
        arguments: those of `Exported`.

    Raises:
        UserError: see `Exported`.
    """

    INSTALL_REQ = False
    INTERLEAVE = True
    VIDEO_LLM = True

    def __init__(self, model_path: str, generation: dict[str, Any] | None = None, **arguments: Any) -> None:
        super().__init__()
        self.generation = generation or {}
        self.exported = Exported(model_path, **known_arguments(arguments))

    def generate_inner(self, message: Sequence[dict[str, Any]], dataset: str | None = None) -> str:
        return self.exported.answers([of_parts(message)], self.generation)[0].text

    def chat_inner(self, message: Sequence[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to the last of several turns."""
        return self.exported.answers([of_turns([turn["content"] for turn in message])], self.generation)[0].text


def register(folder: str | Path, generation: dict[str, Any] | None = None, **arguments: Any) -> str:
    """Makes an exported folder known to VLMEvalKit, with arguments of `Molmo2`; gives the name to ask for."""
    from vlmeval.config import supported_VLM

    name = Path(folder).resolve().name
    supported_VLM[name] = partial(Molmo2, model_path=str(folder), generation=generation, **arguments)
    return name


def main(words: Sequence[str]) -> None:
    """Runs VLMEvalKit's run.py of the folder that this is started in.

    Raises:
        UserError: no folder is named, or there is no run.py.
    """
    if not words or words[0].startswith("-"):
        raise UserError("name an exported folder first: python -m molmo2_nemo.adapters.vlmevalkit hf/8b --data NAME")
    folder, generation, arguments = split_words(words[0])
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: no config.json there; name a folder that `molmo2 convert export` wrote")
    script = Path("run.py")
    if not script.is_file():
        raise UserError(f"no run.py in {Path.cwd()}; start this in a checkout of VLMEvalKit")
    name = register(folder, generation, **arguments)
    sys.path.insert(0, os.getcwd())
    sys.argv = [str(script), "--model", name, *words[1:]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"molmo2: {user_message(error)}")
