"""A-OKVQA (arXiv 2206.01718), multiple choice of four: questions that need knowledge; the validation split.

Data: the Hub's questions, COCO's images of 2017 by hand: `molmo2 prepare a_okvqa_mc --split validation`.
Score: nearest_option, as published; beside it multiple_choice, which guesses nothing.
"""

from __future__ import annotations

from molmo2_nemo.evaluation.choice_records import ChoiceTask


class AokVqa(ChoiceTask):
    name = "aokvqa"
    title = "questions that need knowledge, multiple choice (A-OKVQA, validation)"
    group = "image QA"
    scorers = ("nearest_option", "multiple_choice")
    max_new_tokens = 32
    folder = "a_okvqa_mc-validation"
    prepare = "molmo2 prepare a_okvqa_mc --split validation"


TASK = AokVqa()
