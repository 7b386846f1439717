"""Questions of frameworks as questions of ours; nothing here needs a framework."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from molmo2_nemo.adapters.exported import checked, ends_of, generation_settings, known_arguments, split_words
from molmo2_nemo.adapters.messages import Asked, of_conversation, of_parts, of_turns
from molmo2_nemo.errors import UserError


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def test_a_conversation_of_lmms_eval() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "url": "a"}, text("One?"), {"type": "image", "url": "b"}]},
        {"role": "assistant", "content": [text("Two.")]},
        {"role": "user", "content": [text("Three"), text("or four?")]},
    ]
    asked = of_conversation(messages)
    assert asked == Asked("Three\nor four?", ["a", "b"], None, None, (("Be brief.\nOne?", "Two."),))


@pytest.mark.parametrize(
    ("times", "clip"),
    [({}, None), ({"start_time": 2.5}, (2.5, float("inf"))), ({"start_time": 1, "end_time": 3}, (1.0, 3))],
)
def test_a_video_of_lmms_eval(times: dict[str, Any], clip: Any) -> None:
    content = [{"type": "video", "url": "film.mp4", **times}, text("What happens?")]
    assert of_conversation([{"role": "user", "content": content}]) == Asked("What happens?", [], "film.mp4", clip)


def test_parts_and_turns_of_vlmevalkit() -> None:
    picture, film = {"type": "image", "value": "a.png"}, {"type": "video", "value": "film.mp4"}
    words = [{"type": "text", "value": word} for word in ("One", "two?")]
    assert of_parts([words[0], picture, words[1], picture]) == Asked("One\ntwo?", ["a.png", "a.png"])
    assert of_parts([film, *words]) == Asked("One\ntwo?", [], "film.mp4")
    answer = [{"type": "text", "value": "three"}]
    assert of_turns([[picture, words[0]], answer, [words[1]]]) == Asked(
        "two?", ["a.png"], None, None, (("One", "three"),)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "audio", "url": "a.wav"}], "has other media"),
        ([{"type": "video", "url": "a"}, {"type": "video", "url": "b"}], "2 videos; molmo2 is shown one"),
        ([{"type": "video", "url": "a"}, {"type": "image", "url": "b"}], "images and a video"),
    ],
)
def test_what_cannot_be_shown(content: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        of_conversation([{"role": "user", "content": content}])


@pytest.mark.parametrize("roles", [[], ["assistant"], ["user", "user"], ["user", "assistant"]])
def test_turns_alternate(roles: list[str]) -> None:
    with pytest.raises(UserError, match="turns must alternate and end with the user's"):
        of_conversation([{"role": role, "content": "words"} for role in roles])


def test_two_turns_of_vlmevalkit_end_with_no_question() -> None:
    turn = [{"type": "text", "value": "words"}]
    with pytest.raises(UserError, match="2 turns; a conversation ends with the user's"):
        of_turns([turn, turn])


def test_generation_settings() -> None:
    """Greedy unless a temperature is given; what transformers does not know is left out."""
    assert generation_settings({}) == {"max_new_tokens": 1024, "do_sample": False}
    task = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": True, "until": ["\n"]}
    assert generation_settings(task) == {"max_new_tokens": 16, "num_beams": 1, "do_sample": False}
    drawn = generation_settings({"temperature": 0.7, "top_p": 0.9})
    assert drawn == {"max_new_tokens": 1024, "temperature": 0.7, "top_p": 0.9, "do_sample": True}


def test_ends() -> None:
    assert ends_of({}) == [] and ends_of({"until": None}) == []
    assert ends_of({"until": "stop"}) == ["stop"] and ends_of({"until": ["a", "", "b"]}) == ["a", "b"]


def test_unknown_arguments() -> None:
    assert known_arguments({"max_frames": 64, "device": None}) == {"max_frames": 64}
    with pytest.raises(UserError, match="unknown model argument 'max_frame': did you mean 'max_frames'?"):
        known_arguments({"max_frame": 64})


def test_a_folder_with_arguments() -> None:
    assert split_words("hf/8b") == ("hf/8b", {}, {})
    text = "hf/8b,max_frames=64,max_fps=0.5,max_new_tokens=32,dtype=float32"
    assert split_words(text) == (
        "hf/8b",
        {"max_new_tokens": 32},
        {"max_frames": 64, "max_fps": 0.5, "dtype": "float32"},
    )
    with pytest.raises(UserError, match="'max_frames' behind the folder: expected KEY=VALUE"):
        split_words("hf/8b,max_frames")
    with pytest.raises(UserError, match="unknown model argument 'frames'"):
        split_words("hf/8b,frames=3")


def test_folders_that_cannot_be_asked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config.json there; name a folder that `molmo2 convert export` wrote"):
        checked(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no tokenizer.json there"):
        checked(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Molmo2ForConditionalGeneration"):
        with pytest.raises(UserError, match="has no Molmo2 of its own; install a newer one"):
            checked(tmp_path)
