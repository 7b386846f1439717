"""Text tokens and the visual special tokens, over a `tokenizer.json` of any byte-level model.

The base vocabulary ends where the extra embedding rows begin. Extra special tokens are added in a fixed order, so
that token number `vocab_size + i` is always `EXTRA_SPECIAL_TOKENS[i]`; a tokenizer shorter than the embedding table is
first filled up with dummy entries.

Text from a user or a data set can never become a special token: `encode` reads `<im_patch>` or `<|im_end|>` in a text
as ordinary characters. Only `encode_chat` (trusted scaffolding) and `user_turn` make chat tokens, and visual tokens are
made from ids by `image.py` and `video.py`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from molmo2_nemo.data.json_values import show
from molmo2_nemo.data.special_tokens import EXTRA_SPECIAL_TOKENS, SpecialIds
from molmo2_nemo.errors import UserError

ASSETS = Path(__file__).parent / "assets"
FILE = "tokenizer.json"
SHIPPED = {"tiny": ASSETS / "tiny_tokenizer"}

DUMMY_TOKEN = "|<EXTRA_TOKENS_{}>|"
CHAT_START, CHAT_END = "<|im_start|>", "<|im_end|>"
DOCUMENT_END = "<|endoftext|>"  # of Qwen3 and OLMo
WINDOW = 1 << 18  # characters of a document that are encoded together
AROUND = 64  # characters before and after a place where a text is taken apart
PLACES_TRIED = 100
_WORD_END = re.compile(r"(?<=[^\W_])(?= [^\W_])|(?<=\n)(?=[^\W_])")
_CHAT_SPLIT = re.compile(f"({re.escape(CHAT_START)}|{re.escape(CHAT_END)})")


class Molmo2Tokenizer:
    """A tokenizer whose extra special tokens follow directly after the base vocabulary."""

    def __init__(self, tokenizer: Tokenizer, config: dict[str, Any], *, vocab_size: int | None = None, name: str = ""):
        """Args: `vocab_size` is the number of base embedding rows; by default what the tokenizer itself has.

        Raises:
            UserError: more entries than embedding rows, extra tokens at other ids, or no end-of-text token.
        """
        self.name = name
        self.config = dict(config)
        self.vocab_size = _add_extra_tokens(tokenizer, vocab_size, name)
        self.special = SpecialIds.at(self.vocab_size)
        self.visual_ids = self.special.visual
        self._special_aware = tokenizer
        self._plain = Tokenizer.from_str(tokenizer.to_str())  # as the switch is not per call
        self._plain.encode_special_tokens = True
        self.chat_start_id = self._required(CHAT_START)
        self.chat_end_id = self._required(CHAT_END)
        eos = _token_text(config.get("eos_token")) or CHAT_END
        bos = _token_text(config.get("bos_token")) or eos  # Qwen has none: its sequences start with EOS
        self.eos_id = self._required(eos)
        self.bos_id = self._required(bos)
        found = tokenizer.token_to_id(DOCUMENT_END)
        self.document_id = self.eos_id if found is None else found  # between documents, as in pre-training
        # Chat scaffolding, encoded once.
        self._newline = self.encode("\n")
        self._assistant = [self.chat_end_id, *self._newline, self.chat_start_id, *self.encode("assistant\n")]

    def __reduce__(self) -> tuple[Any, ...]:
        # The library's own pickling drops `encode_special_tokens`, which keeps user text from becoming special tokens.
        return _rebuild, (self._special_aware.to_str(), self.config, self.vocab_size, self.name)

    @staticmethod
    def exists(name: str | Path) -> bool:
        """Whether `load` finds something under this name."""
        return (SHIPPED.get(str(name), Path(name)) / FILE).is_file()

    @classmethod
    def load(cls, name: str | Path, *, vocab_size: int | None = None) -> Molmo2Tokenizer:
        """Open "tiny", or a folder with `tokenizer.json` (and normally `tokenizer_config.json`).

        The number of base rows is `vocab_size` if given, else what a `config.json` in the folder says, else the
        tokenizer's own size.

        Raises:
            UserError: no such tokenizer, or a file that is not one.
        """
        folder = SHIPPED.get(str(name), Path(name))
        path = folder / FILE
        if not path.is_file():
            known = ", ".join(repr(n) for n in SHIPPED)
            unset = "" if "MOLMO2_TOKENIZER" in os.environ else "; MOLMO2_TOKENIZER, which names a recipe's, is not set"
            raise UserError(f"no tokenizer at {folder}: expected {path.name} there, or one of the names {known}{unset}")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a tokenizer file: {error}") from error
        config = _read_json(folder / "tokenizer_config.json")
        if vocab_size is None:
            model = _read_json(folder / "config.json")
            text = model.get("text_config", model)
            vocab_size = text.get("vocab_size") if isinstance(text, dict) else None
            if vocab_size is not None and type(vocab_size) is not int:
                raise UserError(f"{folder}/config.json has vocab_size {show(vocab_size)}, expected a whole number")
        return cls(tokenizer, config, vocab_size=vocab_size, name=str(name))

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; special strings inside it stay text.

        Raises:
            UserError: the text holds lone surrogates, which no tokenizer can read.
        """
        try:
            return self._plain.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise UserError(f"text is not valid Unicode: {text[:40]!r}...") from error

    def encode_document(self, text: str, window: int = WINDOW) -> np.ndarray:
        """Token ids of a text of any length, int64 [n]: those of `encode`, some `window` characters at a time.

        The library keeps some hundred bytes for each token that it makes. Byte-level tokenizers do not merge over the
        end of a word, so the text is taken apart there; each such place is tried on the characters around it.

        Raises:
            UserError: as `encode`.
        """
        ids, start = [], 0
        while start < len(text):
            end = self._apart(text, start + window)
            ids.append(np.array(self.encode(text[start:end]), dtype=np.int64))
            start = end
        return np.concatenate(ids) if ids else np.zeros(0, np.int64)

    def _apart(self, text: str, start: int) -> int:
        """The first place from `start` on where the text can be taken apart; its end, where none is found."""
        for found in itertools.islice(_WORD_END.finditer(text, start), PLACES_TRIED):
            at = found.start()
            before, after = text[max(at - AROUND, 0) : at], text[at : at + AROUND]
            if self.encode(before) + self.encode(after) == self.encode(before + after):
                return at
        return len(text)

    def encode_chat(self, text: str) -> list[int]:
        """Token ids of trusted scaffolding: `<|im_start|>` and `<|im_end|>` become the chat tokens, nothing else."""
        ids: list[int] = []
        for piece in _CHAT_SPLIT.split(text):
            if piece == CHAT_START:
                ids.append(self.chat_start_id)
            elif piece == CHAT_END:
                ids.append(self.chat_end_id)
            elif piece:
                ids.extend(self.encode(piece))
        return ids

    def user_turn(self, text: str, *, first: bool) -> list[int]:
        """A user message and the opening of the assistant's, in the `qwen3` chat format; `text` stays plain text.

        Later turns open with a second `<|im_end|>` (the first is the EOS of the answer before it), as in training.
        """
        lead = [] if first else [self.chat_end_id, *self._newline]
        return [*lead, self.chat_start_id, *self.encode("user\n" + text), *self._assistant]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of token ids; special tokens are written out unless `skip_special`. Padding (negative) is left out."""
        return self._special_aware.decode([int(i) for i in ids if i >= 0], skip_special_tokens=skip_special)

    def token(self, token_id: int) -> str:
        """The vocabulary entry of one id, for messages and previews; "" if there is none."""
        return self._special_aware.id_to_token(int(token_id)) or ""

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, extra tokens included, for a Hugging Face folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._special_aware.save(str(folder / FILE))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self.config}
        config["eos_token"] = self.token(self.eos_id)
        config["additional_special_tokens"] = list(EXTRA_SPECIAL_TOKENS)
        config.pop("added_tokens_decoder", None)  # lists only the original tokens; tokenizer.json has them all
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def _required(self, token: str) -> int:
        token_id = self._special_aware.token_to_id(token)
        if token_id is None:
            raise UserError(
                f"tokenizer {self.name!r} has no token {token!r}; Molmo2 needs the chat tokens {CHAT_START} and "
                f"{CHAT_END} and the eos_token that tokenizer_config.json names"
            )
        return token_id


def _rebuild(text: str, config: dict[str, Any], vocab_size: int, name: str) -> Molmo2Tokenizer:
    return Molmo2Tokenizer(Tokenizer.from_str(text), config, vocab_size=vocab_size, name=name)


def _add_extra_tokens(tokenizer: Tokenizer, vocab_size: int | None, name: str) -> int:
    """Fill `tokenizer` up to `vocab_size` and append the extra special tokens; returns the base size."""
    present = tokenizer.token_to_id(EXTRA_SPECIAL_TOKENS[0])
    if present is None:
        entries = tokenizer.get_vocab_size(with_added_tokens=True)
        base = entries if vocab_size is None else vocab_size
        if entries > base:
            raise UserError(
                f"tokenizer {name!r} has {entries} entries but the model only {base} base embedding rows; "
                "use the model's own tokenizer"
            )
        dummies = [DUMMY_TOKEN.format(i) for i in range(base - entries)]
        new = [*dummies, *EXTRA_SPECIAL_TOKENS]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in new])
    else:
        base = present
        if vocab_size is not None and vocab_size != base:
            raise UserError(
                f"tokenizer {name!r} was saved with extra tokens at {base}, but the model has {vocab_size} base rows"
            )
    for i, token in enumerate(EXTRA_SPECIAL_TOKENS):
        if tokenizer.token_to_id(token) != base + i:
            found = tokenizer.token_to_id(token)
            raise UserError(f"tokenizer {name!r}: {token} has id {found}, expected {base + i}; its ids have gaps")
    return base


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(read, dict):
        raise UserError(f"{path} holds {show(read)}, expected a JSON object")
    return read


def _token_text(entry: Any) -> str | None:
    """The string of a special-token entry, which may be a string, a dict with "content", or absent.

    Raises:
        UserError: it is something else.
    """
    text = entry.get("content") if isinstance(entry, dict) else entry
    if text is not None and not isinstance(text, str):
        raise UserError(f"tokenizer_config.json names the special token {show(entry)}, expected a string")
    return text
