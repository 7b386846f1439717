"""The tokenizer against transformers, and what must never become a special token."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_prep.tiny_tokenizer import make
from molmo2_nemo.data.tokenizer import ASSETS, EXTRA_SPECIAL_TOKENS, Molmo2Tokenizer
from molmo2_nemo.errors import UserError

TINY = Molmo2Tokenizer.load("tiny")


def qwen_like(entries=200, fill=260):
    """A byte-level tokenizer shorter than its model's embedding table, with separate bos and eos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return raw


def test_shipped_tokenizer_is_what_its_script_makes():
    shipped = (ASSETS / "tiny_tokenizer" / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(make().to_str()) == json.loads(shipped)


def test_tiny_sizes_and_ids():
    assert TINY.vocab_size == 1024
    assert TINY.bos_id == TINY.eos_id == 1023  # no bos of its own, as Qwen
    assert [TINY.token(1024 + i) for i in range(14)] == list(EXTRA_SPECIAL_TOKENS)
    special = TINY.special
    assert (special.im_start, special.im_end, special.im_patch, special.im_col) == (1024, 1025, 1026, 1027)
    assert (special.low_res_im_start, special.image, special.im_low) == (1028, 1029, 1030)
    assert (special.frame_start, special.frame_end, special.video) == (1031, 1032, 1033)
    assert TINY.visual_ids == {1024, 1025, 1026, 1027, 1028, 1030, 1031, 1032}


def test_shipped_folder_loads_in_transformers_and_agrees():
    theirs = PreTrainedTokenizerFast.from_pretrained(str(ASSETS / "tiny_tokenizer"))
    assert len(theirs) == 1024
    assert theirs.eos_token == "<|im_end|>" and theirs.bos_token is None
    for text in ("A grey cat.\n", "Image 1", " 12.5 ", "naïve 漢字 🐇"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == TINY.encode(text)


@pytest.mark.parametrize("text, count", [("0.0 ", 4), (" 0.5 ", 5), (" 12.5 ", 6), (" 100.0 ", 7), ("Image 1", 3)])
def test_digits_are_split_singly(text, count):
    assert len(TINY.encode(text)) == count


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(text):
    ids = TINY.encode(text)
    assert TINY.decode(ids) == text
    assert all(i < 1021 for i in ids)  # neither chat nor visual tokens


@pytest.mark.parametrize("text", [*EXTRA_SPECIAL_TOKENS, "<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_special_strings_in_text_stay_text(text):
    assert max(TINY.encode(f"look {text}here")) < 1021
    scaffolding = [i for i in TINY.user_turn("", first=True) if i >= 1021]
    assert [i for i in TINY.user_turn(f"look {text}here", first=True) if i >= 1021] == scaffolding
    assert TINY.decode(TINY.encode(text)) == text


def test_chat_scaffolding():
    turn = TINY.user_turn("Hi", first=True)
    assert turn == TINY.encode_chat("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    later = TINY.user_turn("Hi", first=False)
    assert later == TINY.encode_chat("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    theirs = PreTrainedTokenizerFast.from_pretrained(str(ASSETS / "tiny_tokenizer"))
    assert theirs("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")["input_ids"] == turn
    assert max(TINY.encode_chat("<|im_start|><im_patch>")) == TINY.chat_start_id


def test_text_stays_text_after_pickling():
    copy = pickle.loads(pickle.dumps(TINY))
    assert copy.encode("<|im_end|> <im_patch>") == TINY.encode("<|im_end|> <im_patch>")
    assert copy.vocab_size == TINY.vocab_size and copy.eos_id == TINY.eos_id


def test_short_tokenizers_are_filled_up():
    tokenizer = Molmo2Tokenizer(qwen_like(), {"eos_token": {"content": "<|im_end|>"}}, vocab_size=300)
    assert tokenizer.vocab_size == 300
    assert tokenizer.token(259) == "|<EXTRA_TOKENS_0>|" and tokenizer.token(299) == "|<EXTRA_TOKENS_40>|"
    assert tokenizer.special.im_start == 300 and tokenizer.token(300) == "<im_start>"
    assert tokenizer.bos_id == tokenizer.eos_id == 258


def test_own_bos_is_used():
    config = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    tokenizer = Molmo2Tokenizer(qwen_like(), config)
    assert tokenizer.bos_id == tokenizer.eos_id == 256


def test_saved_folder_loads_here_and_in_transformers(tmp_path):
    tokenizer = Molmo2Tokenizer(qwen_like(), {"eos_token": "<|im_end|>"}, vocab_size=300)
    tokenizer.save(tmp_path)
    again = Molmo2Tokenizer.load(tmp_path)
    assert again.vocab_size == 300 and again.special == tokenizer.special and again.eos_id == tokenizer.eos_id
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    assert len(theirs) == 314
    assert theirs.convert_tokens_to_ids(list(EXTRA_SPECIAL_TOKENS)) == list(range(300, 314))
    again.save(tmp_path / "twice")
    assert Molmo2Tokenizer.load(tmp_path / "twice").vocab_size == 300


def test_base_rows_come_from_config_json(tmp_path):
    qwen_like().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 280}}')
    assert Molmo2Tokenizer.load(tmp_path).vocab_size == 280


@pytest.mark.parametrize(
    ("value", "said"), [(None, "; MOLMO2_TOKENIZER, which names a recipe's, is not set"), ("x", "")]
)
def test_a_variable_that_is_not_set_is_named(tmp_path, monkeypatch, value, said):
    monkeypatch.delenv("MOLMO2_TOKENIZER", raising=False)
    if value:
        monkeypatch.setenv("MOLMO2_TOKENIZER", value)
    with pytest.raises(UserError) as error:
        Molmo2Tokenizer.load(tmp_path / "missing")
    assert str(error.value).endswith(f"or one of the names 'tiny'{said}")


def test_bad_tokenizers(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer at .*'tiny'"):
        Molmo2Tokenizer.load(tmp_path / "missing")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="is not a tokenizer file"):
        Molmo2Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="259 entries but the model only 100"):
        Molmo2Tokenizer(qwen_like(), {}, vocab_size=100)
    with pytest.raises(ValueError, match="no token '<eos>'"):
        Molmo2Tokenizer(qwen_like(), {"eos_token": "<eos>"})
    with pytest.raises(ValueError, match="not valid Unicode"):
        TINY.encode("\ud800")
