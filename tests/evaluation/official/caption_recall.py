"""Makes caption_recall.json.gz: random captions, and what Google's rouge_score package says of their content words.

    python caption_recall.py    # with the package rouge-score installed

The package gets the content words alone, as they were drawn; the captions have them in plural, in capitals, between
function words and punctuation. So what is a content word is not taken from the code under test.
"""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

from rouge_score.rouge_scorer import RougeScorer

HERE = Path(__file__).parent
CASES = 600
NOUNS = {
    **{"dog": "dogs", "horse": "horses", "berry": "berries", "tree": "tree", "glass": "glass", "bus": "bus"},
    **{"house": "houses", "city": "cities", "boat": "boats", "cloud": "clouds", "red": "red", "blue": "blue"},
    **{"river": "river's", "child": "child’s", "25": "25", "walk": "walks", "table": "tables", "music": "music"},
}
FILLING = ["the", "a", "of", "is", "and", "with", "which", "isn't", "don’t", "it's", "on", "its", "they", ",", ".", "-"]


class Spaces:
    """Words are what spaces separate."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


def drawn(rng: random.Random) -> list[str]:
    return rng.choices(list(NOUNS), k=rng.choice([0, 1, 3, 8, 20]))


def written(rng: random.Random, words: list[str]) -> str:
    """A caption that has these content words, in this order."""
    text = []
    for word in words:
        text += rng.choices(FILLING, k=rng.randint(0, 2))
        form = rng.choice([word, NOUNS[word]])
        text.append(rng.choice([form, form, form.capitalize(), form + ",", f"({form})"]))
    return " ".join(text + rng.choices(FILLING, k=rng.randint(0, 2)))


def main() -> None:
    rng, cases, scorer = random.Random(0), [], RougeScorer(["rouge1"], tokenizer=Spaces())
    while len(cases) < CASES:
        said, expected = drawn(rng), drawn(rng)
        if not expected:
            continue
        found = scorer.score(" ".join(expected), " ".join(said))["rouge1"]
        figures = {"recall": found.recall, "precision": found.precision, "f1": found.fmeasure}
        cases.append({"caption": written(rng, said), "reference": written(rng, expected)} | figures)
    text = json.dumps(cases, separators=(",", ":"))
    with gzip.GzipFile(HERE / "caption_recall.json.gz", "wb", mtime=0) as file:
        file.write(text.encode())


if __name__ == "__main__":
    main()
