"""The chat template against the training format, and the generation settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer

from molmo2_nemo.convert.companions import write_companions
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.model.config import preset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("hf")
    write_companions(target, preset("tiny"), "native", Molmo2Tokenizer.load("tiny"))
    return target


def render(folder: Path, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
    """As transformers does: a sandboxed environment that trims blocks, with the tokenizer's special tokens."""

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    template = environment.from_string((folder / "chat_template.jinja").read_text())
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt, eos_token="<|im_end|>")


def test_one_turn_is_the_training_prompt(folder: Path) -> None:
    text = render(folder, [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}])
    assert text == "<|image|><|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = Molmo2Tokenizer.load("tiny")
    assert tokenizer.encode_chat(text.removeprefix("<|image|>")) == tokenizer.user_turn("What is it?", first=True)


def test_several_turns_are_the_training_text(folder: Path) -> None:
    """EOS ends the answer, a second chat end opens the next user turn."""
    messages = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three"},
    ]
    tokenizer = Molmo2Tokenizer.load("tiny")
    expected = [*tokenizer.user_turn("One", first=True), *tokenizer.encode("Two"), tokenizer.eos_id]
    expected += tokenizer.user_turn("Three", first=False)
    assert tokenizer.encode_chat(render(folder, messages)) == expected


def test_pictures_films_subtitles_and_styles(folder: Path) -> None:
    question = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?", "style": "vqa2"}]
    text = render(folder, [{"role": "user", "content": question}], add_generation_prompt=False)
    assert text == "Image 1<|image|>Image 2<|image|><|im_start|>user\nvqa2: Which?<|im_end|>\n"
    question = [{"type": "video"}, {"type": "text", "text": "Why?", "style": "user_qa"}]
    messages = [{"role": "subtitle", "content": "0.0 - 1.0 hello\n"}, {"role": "user", "content": question}]
    assert render(folder, messages, add_generation_prompt=False) == (
        "<|video|>0.0 - 1.0 hello\n<|im_start|>user\nWhy?<|im_end|>\n"
    )


def test_roles_must_alternate(folder: Path) -> None:
    with pytest.raises(jinja2.exceptions.TemplateError, match="roles must alternate"):
        render(folder, [{"role": "assistant", "content": "Hello"}])


def test_generation_ids(folder: Path, tmp_path: Path) -> None:
    tokenizer = Molmo2Tokenizer.load("tiny")
    ids = json.loads((folder / "generation_config.json").read_text())
    assert ids["bos_token_id"] == tokenizer.bos_id
    assert ids["eos_token_id"] == tokenizer.eos_id
    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert saved.token_to_id("<im_patch>") == tokenizer.special.im_patch == 1026
    tokenizer.config["pad_token"] = {"content": saved.id_to_token(7)}
    write_companions(tmp_path, preset("tiny"), "native", tokenizer)
    assert json.loads((tmp_path / "generation_config.json").read_text())["pad_token_id"] == 7
