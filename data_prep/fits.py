"""What of a record does not fit a sequence: its texts worded as in training, and counted with the run's tokenizer where
that is here, else estimated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from data_prep.estimate import PROMPT_TOKENS, TURN_TOKENS, image_cost, visual_cost
from data_prep.text_length import Length, estimated, tokenizer_at
from molmo2_nemo.data.check import View, worded
from molmo2_nemo.data.config import DataConfig
from molmo2_nemo.data.image import TileGeometry
from molmo2_nemo.data.prompts import Turn
from molmo2_nemo.data.record import Record
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.data.video.sampling import TimeSampler
from molmo2_nemo.data.video.tokens import subtitle_text, subtitles_shown, video_token_ids

DRAWS = 4  # wordings of a record that are tried
BY_ESTIMATE, AT_MOST = ", by estimate", ", by the highest estimate"
PLACE = re.compile(r"(annotations|variants\[\d+\])\[(\d+)\](?:\.either\[(\d+)\])?(?:\.turns\[(\d+)\])?")
ONE = Length(1, 1)
Worded = Iterable[tuple[str, list[Turn]]]  # see `worded`


def too_long(record: Record, view: View, config: DataConfig, document: str | None = None) -> dict[str, str]:
    """Kinds (tally.py) of what training may cut or leave out, with the branches in the worst of their orders, each
    with what the summaries add to its words.

    Args:
        document: the raw text that the record is, if it is one.
    """
    texts = _Texts(tokenizer_at(config.tokenizer))
    limit = config.packing.sequence_length
    if document is not None:
        said = texts.over(texts.of(document) + ONE, limit)
        return {} if said is None else {"documents_split": said}
    found: dict[str, str] = {}
    root = texts.root(record, view, config, found)
    first = list(worded(record, view, config))
    if root.most + sum(_bytes(turns) for _, turns in first) <= limit:
        return found  # not even with a token for each byte
    for seed in range(DRAWS):
        for branches in _trees(worded(record, view, config, seed) if seed else first, texts):
            for kind, tokens in _needs(root, branches).items():
                said = texts.over(tokens, limit)
                if said is not None:
                    found[kind] = min(said, found.get(kind, said), key=[BY_ESTIMATE, AT_MOST, ""].index)
                    break
    return found


@dataclass(frozen=True, slots=True)
class _Texts:
    """Lengths of texts, counted with a tokenizer or estimated."""

    tokenizer: Molmo2Tokenizer | None

    def of(self, text: str) -> Length:
        if self.tokenizer is None:
            return estimated(text)
        count = len(self.tokenizer.encode_document(text))
        return Length(count, count)

    def turn(self, turn: Turn, *, first: bool) -> tuple[Length, Length]:
        """Tokens of the user's message with its scaffolding, and of the answer with its end."""
        if self.tokenizer is None:
            return estimated(turn.user) + Length(TURN_TOKENS - 1, TURN_TOKENS + PROMPT_TOKENS), self.of(
                turn.answer
            ) + ONE
        asked = len(self.tokenizer.user_turn(turn.user, first=first))
        return Length(asked, asked), self.of(turn.answer) + ONE

    def over(self, tokens: Length, limit: float) -> str | None:
        """What is added to the words of that these are more than the limit; None: they are not."""
        if tokens.most <= limit:
            return None
        return "" if self.tokenizer is not None else BY_ESTIMATE if tokens.likely > limit else AT_MOST

    def root(self, record: Record, view: View, config: DataConfig, found: dict[str, str]) -> Length:
        """Tokens of BOS, media and subtitles; `found` gets subtitles that are cut."""
        if record.video is None:
            visual = 1 + self._images(view, config)
            return Length(visual, visual)
        times = TimeSampler.of(config.video, record.sampling, view.fps)(view.duration)
        visual = 1 + visual_cost(view, record.sampling, config)
        if self.tokenizer is not None:
            side = math.ceil(TileGeometry.of(config.image).grid / config.video.pool)
            visual = 1 + len(video_token_ids(times, side * side, config.video, self.tokenizer))
        subtitles = self.of(subtitle_text(subtitles_shown(record.subtitles, times, config.video.subtitle_mode)))
        limit = _subtitle_limit(config)
        if (said := self.over(subtitles, limit)) is not None:
            found["subtitle_tokens_cut"] = said
        return Length(visual + min(subtitles.likely, limit), visual + min(subtitles.most, limit))

    def _images(self, view: View, config: DataConfig) -> int:
        image = config.image
        if image.p_high_res > 0 and len(view.image_sizes) == 1:
            image = replace(image, max_crops=image.high_res_max_crops)
        used = min(len(view.image_sizes), image.max_images)
        names = [f"Image {i + 1}" for i in range(used)] if used > 1 else []
        return (image_cost(view.image_sizes, image)[0] if used else 0) + int(sum(self.of(n).most for n in names))


@dataclass(frozen=True, slots=True)
class _Branch:
    """Tokens up to the first answer, and of the whole annotation with the ends of its turns."""

    asked: Length = field(default_factory=Length)
    whole: Length = field(default_factory=Length)


def _needs(root: Length, branches: list[_Branch]) -> dict[str, Length]:
    """Kind -> what must fit a sequence so that it does not happen; see tree.py. The first that does not is what
    happens."""

    def tokens(name: str) -> tuple[float, float]:
        whole = [getattr(branch.whole, name) - 1 for branch in branches]
        total = getattr(root, name) + sum(whole)
        last = max(getattr(b.asked, name) + 1 - own for b, own in zip(branches, whole, strict=True))
        return total, total + last

    (likely, likely_last), (most, most_last) = tokens("likely"), tokens("most")
    dropped = {"branches_dropped": Length(likely_last, most_last)} if len(branches) > 1 else {}
    return dropped | {"tokens_cut": Length(likely, most)}


def _bytes(turns: list[Turn]) -> int:
    """At least the tokens of turns under any byte-level tokenizer, in another wording too."""
    spare = 2 * TURN_TOKENS + 20 * PROMPT_TOKENS
    return sum(len((turn.user + turn.answer).encode("utf-8", "replace")) + spare for turn in turns)


def _trees(said: Worded, texts: _Texts) -> list[list[_Branch]]:
    """The branches of each tree, each in the longest of its forms: per form the turns, per turn the longest answer."""
    trees: dict[str, dict[str, dict[str, dict[str, _Branch]]]] = {}  # tree -> branch -> form -> turn
    for path, turns in said:
        place = PLACE.match(path)
        assert place is not None
        tree, branch, form, number = (part or "" for part in place.groups())
        parts = trees.setdefault(tree, {}).setdefault(branch, {}).setdefault(form, {})
        made = _branch(texts.turn(turn, first=number in ("", "0") and i == 0) for i, turn in enumerate(turns))
        parts[number] = max(parts.get(number, made), made, key=_most)
    return [[max(map(_joined, forms.values()), key=_most) for forms in tree.values()] for tree in trees.values()]


def _branch(turns: Iterator[tuple[Length, Length]]) -> _Branch:
    said = list(turns)
    return _Branch(said[0][0], sum((user + answer for user, answer in said), Length()))


def _joined(turns: dict[str, _Branch]) -> _Branch:
    parts = list(turns.values())
    return _Branch(parts[0].asked, sum((part.whole for part in parts), Length()))


def _most(branch: _Branch) -> float:
    return branch.whole.most


def _subtitle_limit(config: DataConfig) -> float:
    mode, most = config.video.subtitle_mode, config.video.max_subtitle_tokens
    own = float(mode.removeprefix("truncate_")) if mode.startswith("truncate_") else math.inf
    return min(own, math.inf if most is None else most)
