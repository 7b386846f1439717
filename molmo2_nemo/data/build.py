"""A record -> an `Example`: decode the visual input, write the conversations, flatten the tree."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from molmo2_nemo.data.annotations import Alternatives, Annotation
from molmo2_nemo.data.check import checked_count, checked_document, checked_text
from molmo2_nemo.data.config import DataConfig, VideoConfig
from molmo2_nemo.data.example import PAD_TOKEN, ROOT_BRANCH, Example
from molmo2_nemo.data.image import TileGeometry, VisualInput, image_crops, images_layout, no_visual
from molmo2_nemo.data.image_size import image_size
from molmo2_nemo.data.joining import HEAD, TAIL, Mark
from molmo2_nemo.data.picture_decoder import TRUNCATED
from molmo2_nemo.data.pictures import decode_image
from molmo2_nemo.data.prompts import PromptFormatter, Turn, VisualContext
from molmo2_nemo.data.raw_text import RawText, document_tokens
from molmo2_nemo.data.record import BadRecord, Record, Subtitle
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.data.tree import Branch, FlatTree, WeightRule, flatten
from molmo2_nemo.data.video.decoders import check_decoder
from molmo2_nemo.data.video.read import VideoPlan, decode_crops, plan_video
from molmo2_nemo.data.video.sampling import film_lost
from molmo2_nemo.data.video.tokens import video_layout
from molmo2_nemo.errors import DataError, UserError


class Decoded(NamedTuple):
    """What decoding the media of an example gave."""

    crops: np.ndarray  # uint8 [C, P, D_p]
    info: dict[str, Any]  # what there is to say about it, for `Example.info`


@dataclass(slots=True)
class _Root:
    """The visual input of an example, and what its texts may refer to."""

    visual: VisualInput
    context: VisualContext = field(default_factory=VisualContext)


class ExampleBuilder:
    """Builds examples with the settings of a stage. Holds no state between calls: all randomness is the caller's."""

    def __init__(self, config: DataConfig, tokenizer: Molmo2Tokenizer, *, training: bool = True):
        """Raises UserError for settings that contradict each other (see `TileGeometry` and `PromptFormatter`), and for
        a decoder of videos that is not installed.
        """
        TileGeometry.of(config.image)
        check_decoder(config.video.decoder)
        self.config = config
        self.tokenizer = tokenizer
        self.training = training
        self.formatter = PromptFormatter(config.text, training=training)

    def build(
        self,
        record: Record,
        rng: np.random.Generator,
        *,
        weight: float | None = None,
        p_high_res: float | None = None,
        max_tokens: int | None = None,
    ) -> Example:
        """The training example of a record: `plan`, with its crops decoded."""
        example = self.plan(record, rng, weight=weight, p_high_res=p_high_res, max_tokens=max_tokens)
        example.make_room()
        example.info |= self.decode(record, example.info.get("images"), example.crops)
        return example

    def plan(
        self,
        record: Record,
        rng: np.random.Generator,
        *,
        weight: float | None = None,
        p_high_res: float | None = None,
        max_tokens: int | None = None,
    ) -> Example:
        """The training example of a record without its crops, whose number follows from the headers of its media.

        Args:
            rng: decides wordings, branch order and resolution; nothing else does.
            weight: the data set's flat loss weight; overrides the record's own weight and factor.
            p_high_res: the data set's chance of many tiles for a single image; default `image.p_high_res`.
            max_tokens: longest sequence; branches beyond it are dropped, and the last one kept may be cut. Documents
                (raw text) come whole; pieces.py splits them.
        Raises:
            BadRecord: the media or an annotation cannot be used; names the record's key.
        """
        if (document := _document(record)) is not None:
            return self._raw_text(record, document, weight)
        cause = "bad media"
        try:
            root = self._root(record.images, record.video, rng, record=record, p_high_res=p_high_res)
            cause = "bad annotation"
            conversations = self._conversations(_tree(record, rng), root.context, rng)
            branches = [self._branch(turns) for turns in conversations]
            cause = "too long"
            tree = flatten(
                [self.tokenizer.bos_id, *root.visual.token_ids],
                branches,
                eos_id=self.tokenizer.eos_id,
                rule=self._rule(record.weight if weight is None else weight, record.weight_factor),
                max_tokens=max_tokens,
            )
        except BadRecord:
            raise
        except UserError as error:
            raise BadRecord(record.key, cause, str(error)) from error
        info = {
            **root.visual.info,
            "conversations": [[(turn.user, turn.answer) for turn in turns] for turns in conversations[: tree.kept]],
            "root_tokens": 1 + len(root.visual.token_ids),
            "branches_kept": tree.kept,
            "branches_dropped": tree.dropped,
            "tokens_cut": tree.cut,
            **_lost(conversations[: tree.kept]),
        }
        return self._example(tree, root.visual, record.key, info)

    def decode(self, record: Record, images: list[dict[str, Any]] | None, out: np.ndarray) -> dict[str, Any]:
        """Decode the media of a record to the crops of its example.

        Args:
            images: `info["images"]` of the example that `plan` made: the size and tiling of each image.
            out: uint8 [C, P, D_p], all of which is written.

        Returns:
            What there is to say about it, for `Example.info`.
        Raises:
            BadRecord: the media cannot be decoded, or are not what their headers said.
        """
        config = self.config
        try:
            if record.video is not None:
                plan = plan_video(
                    record.video, config.video, clip=record.clip, sampling=record.sampling, limits=config.limits
                )
                _same_count(len(plan.times), len(out))
                geometry = TileGeometry.of(config.image)
                decoding = decode_crops(
                    record.video, plan, geometry, out, decoder=config.video.decoder, limits=config.limits
                )
                return decoding.info
            return self._decode_images(record.images, images or [], out)
        except BadRecord:
            raise
        except UserError as error:
            raise BadRecord(record.key, "bad media", str(error)) from error

    def prompt(
        self,
        images: Sequence[bytes] = (),
        video: bytes | None = None,
        question: str = "",
        style: str | None = "user_qa",
        *,
        options: Sequence[str] | None = None,
        history: Sequence[tuple[str, str]] = (),
        subtitles: Sequence[Subtitle] | str = (),
        clip: tuple[float, float] | None = None,
        sampling: dict[str, Any] | None = None,
        once: Callable[[Callable[[], Decoded]], Decoded] | None = None,
    ) -> Example:
        """What the model reads before it answers `question`: labels are padding and all weights are 0.

        Args:
            style: of the answer, which the conversation's first question names; None: the questions are read as they
                are.
            history: earlier (question, answer) turns, the first of which opens the conversation.
            once: is called with what decodes the media, and gives that or what it gave for the same media before.

        Raises:
            DataError: media that cannot be read, or images and a video together.
        """
        rng = np.random.default_rng(0)  # only stage-1 prefixes in training mode draw from it
        lines = subtitles if isinstance(subtitles, str) else list(subtitles)
        extra = Record("", subtitles=lines, clip=clip, sampling=sampling or {})
        root = self._root(images, video, rng, record=extra, p_high_res=0.0)
        formatter = self.formatter if not self.training else PromptFormatter(self.config.text, training=False)
        questions = [*(asked for asked, _ in history), question]
        if style is not None:
            questions[0] = formatter.question(questions[0], style, rng, options=options if not history else None)
        ids = [self.tokenizer.bos_id, *root.visual.token_ids]
        for number, text in enumerate(questions):
            ids += self.tokenizer.user_turn(self._checked_text(text), first=number == 0)
            if number < len(history):
                ids += [*self.tokenizer.encode(self._checked_text(history[number][1])), self.tokenizer.eos_id]
        count = len(ids)
        tree = FlatTree(
            input_ids=np.array(ids, dtype=np.int64),
            labels=np.full(count, PAD_TOKEN, np.int64),
            loss_weights=np.zeros(count, np.float32),
            position_ids=np.arange(count),
            branch_ids=np.full(count, ROOT_BRANCH, np.int64),
            kept=1,
            dropped=0,
            cut=0,
        )
        info = {**root.visual.info, "conversations": [[(text, "") for text in questions]]}
        example = self._example(tree, root.visual, "", info)
        extra.images, extra.video = list(images), video

        def decode() -> Decoded:
            example.make_room()
            return Decoded(example.crops, self.decode(extra, info.get("images"), example.crops))

        found = decode() if once is None else once(decode)
        _same_count(len(found.crops), example.num_crops)
        example.crops = found.crops
        example.info |= found.info
        return example

    # --- parts ------------------------------------------------------------------------------------------------------

    def _root(
        self,
        images: Sequence[bytes],
        video: bytes | None,
        rng: np.random.Generator,
        *,
        record: Record,
        p_high_res: float | None,
    ) -> _Root:
        config = self.config
        if images and video is not None:
            raise DataError("images and a video in one example; Molmo2 takes either images or one video")
        if video is not None:
            plan = plan_video(video, config.video, clip=record.clip, sampling=record.sampling, limits=config.limits)
            visual = video_layout(plan, config.image, config.video, self.tokenizer, subtitles=record.subtitles)
            visual.info |= _not_shown(plan, record, config.video)
            return _Root(visual, VisualContext(video_size=plan.size, frame_times=plan.times))
        if not images:
            return _Root(no_visual(config.image))
        chance = config.image.p_high_res if p_high_res is None else p_high_res
        high_res = bool(self.training and chance > 0 and len(images) == 1 and rng.random() < chance)
        sizes = [image_size(data, self._pixels, config.limits) for data in images[: config.image.max_images]]
        visual = images_layout(sizes, config.image, self.tokenizer, high_res=high_res)
        visual.info["ignored"] = len(images) - len(sizes)
        return _Root(visual, VisualContext(image_sizes=tuple(sizes)))

    def _pixels(self, data: bytes, notes: list[str] | None = None) -> np.ndarray:
        config = self.config
        return decode_image(data, limits=config.limits, truncated=config.image.truncated, notes=notes)

    def _decode_images(self, images: Sequence[bytes], infos: list[dict[str, Any]], out: np.ndarray) -> dict[str, Any]:
        geometry, end = TileGeometry.of(self.config.image), 0
        notes: list[str] = []
        for data, info in zip(images[: len(infos)], infos, strict=True):
            pixels = self._pixels(data, notes)
            size = [pixels.shape[1], pixels.shape[0]]
            if size != info["size"]:
                raise DataError(f"the header of an image says {info['size']} pixels, its content has {size}")
            start, end = end, end + 1 + math.prod(info["tiling"])
            image_crops(pixels, info["tiling"], geometry, out[start:end])
        _same_count(end, len(out))
        return {"truncated": notes.count(TRUNCATED)}

    def _conversations(
        self, annotations: Sequence[Annotation | Alternatives], context: VisualContext, rng: np.random.Generator
    ) -> list[list[Turn]]:
        """One conversation per annotation, in random order."""
        checked_count(annotations, self.config.limits.annotations)
        conversations = [self.formatter.conversation(annotation, context, rng) for annotation in annotations]
        order = rng.permutation(len(conversations)) if self.training and len(conversations) > 1 else None
        return conversations if order is None else [conversations[i] for i in order]

    def _branch(self, turns: Sequence[Turn]) -> Branch:
        tokenizer = self.tokenizer
        return Branch(
            [
                (
                    tokenizer.user_turn(self._checked_text(turn.user), first=number == 0),
                    tokenizer.encode(self._checked_text(turn.answer)),
                )
                for number, turn in enumerate(turns)
            ]
        )

    def _raw_text(self, record: Record, document: RawText, weight: float | None) -> Example:
        """The whole document, every target with the same weight: 1 unless the data set or the record has another."""
        try:
            ids = self.tokenizer.encode_document(checked_document(document.text, self.config))
        except UserError as error:
            raise BadRecord(record.key, "bad annotation", str(error)) from error
        flat = record.weight if weight is None else weight
        factor = 1.0 if record.weight_factor is None else record.weight_factor
        tree = document_tokens(ids, self.tokenizer.document_id, factor if flat is None else flat)
        info = {"raw_text": True, "root_tokens": 0, "branches_kept": 1, "branches_dropped": 0, "tokens_cut": 0}
        return self._example(tree, no_visual(self.config.image), record.key, info)

    def marks(self, count: int) -> list[Mark]:
        """The marks of a document's chunks (joining.py)."""
        encode = self.tokenizer.encode_document
        return [Mark(encode(HEAD.format(n)), encode(TAIL.format(n))) for n in range(1, count + 1)]

    def _checked_text(self, text: str) -> str:
        return checked_text(text, self.config.limits.text_chars)

    def _rule(self, flat: float | None, factor: float | None) -> WeightRule:
        text = self.config.text
        if flat is not None:
            return WeightRule.flat(flat)
        return WeightRule(
            1.0 if factor is None else factor, text.root_length_weight, text.root_branches_weight, text.weight_scale
        )

    def _example(self, tree: FlatTree, visual: VisualInput, key: str, info: dict[str, Any]) -> Example:
        special = self.tokenizer.special
        patches = int(np.count_nonzero(tree.input_ids == special.im_patch))
        if patches != len(visual.pooling):
            raise AssertionError(f"{patches} <im_patch> tokens for {len(visual.pooling)} pooled tokens")
        return Example(
            input_ids=tree.input_ids,
            labels=tree.labels,
            loss_weights=tree.loss_weights,
            position_ids=tree.position_ids,
            branch_ids=tree.branch_ids,
            visual=np.isin(tree.input_ids, sorted(self.tokenizer.visual_ids)),
            crops=visual.crops,
            pooling=visual.pooling,
            unit_crops=np.array(visual.unit_crops, dtype=np.int64),
            unit_pooled_tokens=np.array(visual.unit_pooled_tokens, dtype=np.int64),
            key=key,
            info=info,
        )


def _not_shown(plan: VideoPlan, record: Record, config: VideoConfig) -> dict[str, int]:
    """What of a film, or of its clip, the sampled frames do not show, by kind."""
    kind = film_lost(config, record.sampling, plan.fps, plan.duration)
    found = {kind: 1} if kind else {}
    frame = 1 / plan.fps if plan.fps > 0 else 0.0
    if record.clip is not None and record.clip[1] - record.clip[0] > plan.duration + frame:
        found["clips_cut"] = 1
    return found


def _lost(conversations: Sequence[Sequence[Turn]]) -> Counter[str]:
    """What the texts lack of their annotations, by kind."""
    lost: Counter[str] = Counter()
    for turns in conversations:
        for turn in turns:
            lost.update(turn.lost)
    return lost


def _same_count(found: int, planned: int) -> None:
    if found != planned:
        raise DataError(f"the media give {found} crops; their headers promised {planned}")


def _document(record: Record) -> RawText | None:
    """The document of a record of raw text."""
    first = record.annotations[0] if record.annotations else None
    return first.content if isinstance(first, Annotation) and isinstance(first.content, RawText) else None


def _tree(record: Record, rng: np.random.Generator) -> Sequence[Annotation | Alternatives]:
    """The annotations to use: the record's only list, or the variant drawn at this access."""
    if not record.variants:
        return record.annotations
    if record.variant_weights is None:
        return record.variants[int(rng.integers(len(record.variants)))]
    edges = np.cumsum(record.variant_weights)
    drawn = int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))
    return record.variants[min(drawn, len(edges) - 1)]
