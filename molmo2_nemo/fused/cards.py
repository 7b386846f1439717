"""Which GPUs the libraries under `model.attention=flash` are written for. No torch here: the planner asks too."""

from __future__ import annotations

LIBRARIES = {  # value of kernels.flash -> what it is, and major compute capabilities
    "fa3": ("FlashAttention-3", (9,)),
    "fa4": ("FlashAttention-4", (9, 10)),
    "cudnn": ("cuDNN's attention", (9, 10)),
}
GENERATIONS = {8: "Ampere or Ada", 9: "Hopper", 10: "Blackwell"}  # by major compute capability


def written_for(library: str) -> str:
    """The generations of GPUs that a library of LIBRARIES is for, in words."""
    return " and ".join(GENERATIONS[major] for major in LIBRARIES[library][1])
