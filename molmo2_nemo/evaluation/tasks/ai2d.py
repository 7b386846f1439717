"""AI2D (arXiv 1603.07396): multiple choice about diagrams; images held out as the released loader does.

Data: files of the data set, fetched by hand: `molmo2 prepare ai2_diagram_v2_mix_transparent --split validation`.
Score: nearest_option, as published; beside it multiple_choice, which guesses nothing. The released
loader's two figures, of opaque and transparent boxes, are not told apart. The paper's column is the test split.
"""

from __future__ import annotations

from molmo2_nemo.evaluation.choice_records import ChoiceTask


class Ai2d(ChoiceTask):
    name = "ai2d"
    title = "multiple choice about diagrams (AI2D, held out)"
    group = "image QA"
    scorers = ("nearest_option", "multiple_choice")
    max_new_tokens = 32
    folder = "ai2_diagram_v2_mix_transparent-validation"
    prepare = "molmo2 prepare ai2_diagram_v2_mix_transparent --split validation"


TASK = Ai2d()
