"""What of a record does not fit a sequence: its texts worded as in training, and counted with the run's tokenizer where
that is here, else estimated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product

from data_prep.estimate import PROMPT_TOKENS, TURN_TOKENS, image_cost, visual_cost
from data_prep.text_length import Length, estimated, tokenizer_at
from molmo2_nemo.data.check import View, worded
from molmo2_nemo.data.config import DataConfig, ImageConfig
from molmo2_nemo.data.image import TileGeometry
from molmo2_nemo.data.json_values import Fault
from molmo2_nemo.data.prompts import Turn
from molmo2_nemo.data.record import BadRecord, Record
from molmo2_nemo.data.tally import KINDS
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.data.video.sampling import TimeSampler
from molmo2_nemo.data.video.tokens import subtitle_text, subtitles_shown, video_token_ids

DRAWS = 4  # wordings of a record that are tried
BY_ESTIMATE, AT_MOST = ", by estimate", ", by the highest estimate"
PLACE = re.compile(r"(annotations|variants\[\d+\])\[(\d+)\](?:\.either\[(\d+)\])?(?:\.turns\[(\d+)\])?")
ONE = Length.counted(1)
SURE_DRAWS = 32  # wordings that are tried before a record is refused
MANY = 32  # branches, or forms of one, up to which all combinations are tried
SOMETIMES = "records skipped at some accesses, as no answer begins within a sequence"
PERHAPS = "records that may be skipped, as no answer may begin within a sequence"
Options = set[tuple[float, float]]  # tokens up to the first answer, and of the whole with the ends of its turns
Worded = Iterable[tuple[str, list[Turn]]]  # see `worded`


def too_long(record: Record, view: View, config: DataConfig, document: str | None = None) -> dict[str, str]:
    """Kinds (tally.py, and `SOMETIMES`, `PERHAPS`) of what training may cut, leave out or skip, with the branches in
    the worst of their orders, each with what the summaries add to its words.

    Args:
        document: the raw text that the record is, if it is one.
    Raises:
        BadRecord: training skips it at every access, as no answer begins within a sequence.
    """
    texts = _Texts(tokenizer_at(config.tokenizer))
    limit = config.packing.sequence_length
    if document is not None:
        over = texts.over(texts.of(document) + ONE, limit)
        return {} if over is None else {"documents_split": over}
    found: dict[str, str] = {}
    roots = texts.roots(record, view, config, found)
    if min(root.least for root in roots) >= limit:
        raise _unusable(record, texts, roots, limit, _media_field(record), min(root.least for root in roots))
    first = list(worded(record, view, config))
    if max(root.most for root in roots) + sum(_bytes(turns) for _, turns in first) <= limit:
        return found  # not even with a token for each byte
    drawn = _Drawn(texts)
    for seed in range(DRAWS):
        drawn.add(worded(record, view, config, seed) if seed else first)
    if drawn.least(roots) > limit:
        for seed in range(DRAWS, SURE_DRAWS):  # a shorter wording may be drawn
            drawn.add(worded(record, view, config, seed))
        if drawn.least(roots) > limit:
            raise _unusable(record, texts, roots, limit, _media_field(record, drawn.first), drawn.least(roots))
    likely = happening([root.likely for root in roots], drawn.trees("likely"), limit)
    most = likely if texts.exact else happening([root.most for root in roots], drawn.trees("most"), limit)
    for kind in sorted(likely | most):
        found[kind] = "" if texts.exact else BY_ESTIMATE if kind in likely else AT_MOST
    if SOMETIMES in found and not texts.exact:
        found[PERHAPS] = found.pop(SOMETIMES)
    return found


def said(kind: str, config: DataConfig) -> str:
    """The words of what `too_long` found."""
    if kind in KINDS:
        return KINDS[kind].said(config)
    return f"{kind} (data.packing.sequence_length={config.packing.sequence_length})"


def happening(roots: Iterable[float], trees: Iterable[list[Options]], limit: int) -> set[str]:
    """What happens to a record in one of the orders of its branches; see tree.py.

    Args:
        roots: tokens of BOS, media and subtitles.
        trees: of each list of annotations that may be drawn, of each annotation the forms that it may have.
        limit: tokens of a sequence.
    """
    found: set[str] = set()
    for root, tree in product(roots, list(trees)):
        begins = [root + asked for options in tree for asked, _ in options]
        if max(begins) > limit:
            found.add(SOMETIMES)
        if min(begins) > limit:
            continue
        longest = [max(whole - 1 for _, whole in options) for options in tree]
        before = [root + sum(longest) - own for own in longest]
        last = max(b + asked for b, options in zip(before, tree, strict=True) for asked, _ in options)
        if len(tree) > 1 and last >= limit:
            found.add("branches_dropped")
        if root + sum(longest) > limit and _may_be_cut(root, tree, limit):
            found.add("tokens_cut")
    return found


def _may_be_cut(root: float, tree: list[Options], limit: int) -> bool:
    """Whether a branch begins its answer within the sequence and ends beyond it, after some of the others: sums of
    their lengths are bits of an integer."""
    room = int(limit - root)  # tokens for branches
    everything = (1 << (room + 1)) - 1
    many = len(tree) > MANY
    shared = _sums(tree, everything) if many else 0
    for number, options in enumerate(tree):
        before = shared if many else _sums(tree[:number] + tree[number + 1 :], everything)
        for asked, whole in options:
            if asked <= room < whole - 1:
                return True  # it comes first
            low, high = max(room - whole + 2, 1), room - math.ceil(asked)  # sum + own > room, sum + asked < room
            if high > low and (before & ((1 << high) - 1)) >> math.ceil(low):
                return True
    return False


def _sums(tree: Iterable[Options], everything: int) -> int:
    """The sums that some of the branches may have, as bits."""
    sums = 1
    for options in tree:
        reached = sums
        for whole in {math.ceil(whole) - 1 for _, whole in options}:
            reached |= (sums << whole) & everything
        sums = reached
    return sums


def _media_field(record: Record, first: str = "") -> str:
    """The field at fault: that of the text which begins earliest, or of the media."""
    if first:
        return first
    return "subtitles" if record.subtitles else "video" if record.video is not None else "images"


def _unusable(record: Record, texts: _Texts, roots: list[Length], limit: int, place: str, least: float) -> BadRecord:
    tokens = "tokens" if texts.exact else "tokens by the lowest estimate"
    of_media = f"{math.ceil(min(root.least for root in roots)):,} of them of its media and subtitles"
    seen = f"{math.ceil(least):,} {tokens} before the first answer, {of_media}"
    expected = f"an answer that begins within the {limit:,} tokens of a sequence (data.packing.sequence_length)"
    return BadRecord(record.key, "too long", f"{place}: {seen}; expected {expected}", Fault(place, seen, expected))


@dataclass(frozen=True, slots=True)
class _Texts:
    """Lengths of texts, counted with a tokenizer or estimated."""

    tokenizer: Molmo2Tokenizer | None

    @property
    def exact(self) -> bool:
        return self.tokenizer is not None

    def of(self, text: str) -> Length:
        return estimated(text) if self.tokenizer is None else Length.counted(len(self.tokenizer.encode_document(text)))

    def turn(self, turn: Turn, *, first: bool) -> tuple[Length, Length]:
        """Tokens of the user's message with its scaffolding, and of the answer with its end."""
        if self.tokenizer is None:
            return estimated(turn.user) + Length(TURN_TOKENS - 1, TURN_TOKENS + PROMPT_TOKENS), self.of(
                turn.answer
            ) + ONE
        asked = len(self.tokenizer.user_turn(turn.user, first=first))
        return Length.counted(asked), self.of(turn.answer) + ONE

    def over(self, tokens: Length, limit: float) -> str | None:
        """What is added to the words of that these are more than the limit; None: they are not."""
        if tokens.most <= limit:
            return None
        return "" if self.tokenizer is not None else BY_ESTIMATE if tokens.likely > limit else AT_MOST

    def roots(self, record: Record, view: View, config: DataConfig, found: dict[str, str]) -> list[Length]:
        """Tokens of BOS, media and subtitles, of each resolution that may be drawn; `found` gets subtitles that are
        cut."""
        if record.video is None:
            images = [config.image]
            if config.image.p_high_res > 0 and len(view.image_sizes) == 1:
                images.append(replace(config.image, max_crops=config.image.high_res_max_crops))
            return [Length.counted(1 + self._images(view, image)) for image in images]
        times = TimeSampler.of(config.video, record.sampling, view.fps)(view.duration)
        side = math.ceil(TileGeometry.of(config.image).grid / config.video.pool)
        visual, least = 1 + visual_cost(view, record.sampling, config), 1 + len(times) * side * side
        if self.tokenizer is not None:
            visual = least = 1 + len(video_token_ids(times, side * side, config.video, self.tokenizer))
        subtitles = self.of(subtitle_text(subtitles_shown(record.subtitles, times, config.video.subtitle_mode)))
        limit = _subtitle_limit(config)
        if (over := self.over(subtitles, limit)) is not None:
            found["subtitle_tokens_cut"] = over
        seen = [min(tokens, limit) for tokens in (subtitles.likely, subtitles.most, subtitles.least)]
        return [Length(visual + seen[0], visual + seen[1], least + seen[2])]

    def _images(self, view: View, image: ImageConfig) -> int:
        used = min(len(view.image_sizes), image.max_images)
        names = [f"Image {i + 1}" for i in range(used)] if used > 1 else []
        return (image_cost(view.image_sizes, image)[0] if used else 0) + int(sum(self.of(n).likely for n in names))


@dataclass(frozen=True, slots=True)
class _Part:
    """Tokens of some turns: up to the first answer, and of all with the ends of the turns."""

    asked: Length = field(default_factory=Length)
    whole: Length = field(default_factory=Length)


@dataclass(slots=True)
class _Drawn:
    """What may be drawn of a record: tree -> branch -> form -> turn -> its alternatives, answers and wordings."""

    texts: _Texts
    found: dict[str, dict[str, dict[str, dict[str, set[_Part]]]]] = field(default_factory=dict)
    first: str = ""  # the place of the shortest first question
    shortest: float = math.inf  # its tokens

    def add(self, said: Worded) -> None:
        for path, turns in said:
            place = PLACE.match(path)
            assert place is not None
            tree, branch, form, number = (part or "" for part in place.groups())
            parts = self.found.setdefault(tree, {}).setdefault(branch, {}).setdefault(form, {})
            opens = number in ("", "0")
            part = _part(self.texts.turn(turn, first=opens and i == 0) for i, turn in enumerate(turns))
            parts.setdefault(number, set()).add(part)
            if opens and part.asked.least < self.shortest:
                self.first, self.shortest = path, part.asked.least

    def least(self, roots: Iterable[Length]) -> float:
        """The fewest tokens before a first answer."""
        return min(root.least for root in roots) + self.shortest

    def trees(self, name: str) -> list[list[Options]]:
        """Of each tree, of each branch: tokens before its first answer and of the whole, of each form it may have."""
        return [
            [{o for turns in forms.values() for o in _options(list(turns.values()), name)} for forms in tree.values()]
            for tree in self.found.values()
        ]


def _part(turns: Iterator[tuple[Length, Length]]) -> _Part:
    said = list(turns)
    return _Part(said[0][0], sum((user + answer for user, answer in said), Length()))


def _options(turns: list[set[_Part]], name: str) -> Options:
    """The forms of one conversation; of very many combinations of later turns the shortest and the longest."""
    later = {0.0}
    for parts in turns[1:]:
        later = {tokens + getattr(part.whole, name) for tokens in later for part in parts}
        later = later if len(later) <= MANY else {min(later), max(later)}
    return {(getattr(p.asked, name), getattr(p.whole, name) + tokens) for p in turns[0] for tokens in later}


def _bytes(turns: list[Turn]) -> int:
    """At least the tokens of turns under any byte-level tokenizer, in another wording too."""
    spare = 2 * TURN_TOKENS + 20 * PROMPT_TOKENS
    return sum(len((turn.user + turn.answer).encode("utf-8", "replace")) + spare for turn in turns)


def _subtitle_limit(config: DataConfig) -> float:
    mode, most = config.video.subtitle_mode, config.video.max_subtitle_tokens
    own = float(mode.removeprefix("truncate_")) if mode.startswith("truncate_") else math.inf
    return min(own, math.inf if most is None else most)
