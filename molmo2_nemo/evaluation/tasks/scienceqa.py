"""ScienceQA (arXiv 2209.09513): multiple choice of school questions with an image; the validation split.

Data: the Hub's derek-thomas/ScienceQA: `molmo2 prepare science_qa_img --split validation`.
Score: nearest_option, as published; beside it multiple_choice, which guesses nothing.
"""

from __future__ import annotations

from molmo2_nemo.evaluation.choice_records import ChoiceTask


class ScienceQa(ChoiceTask):
    name = "scienceqa"
    title = "multiple choice of school questions with an image (ScienceQA, validation)"
    group = "image QA"
    scorers = ("nearest_option", "multiple_choice")
    max_new_tokens = 32
    folder = "science_qa_img-validation"
    prepare = "molmo2 prepare science_qa_img --split validation"


TASK = ScienceQa()
