from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from onn.documents import END, SEPARATOR, START, ByteTokenizer, HubTokenizer, Tokenizer

SPECIAL = (SEPARATOR, START, END)
ADDED = ("<tool_response>", "</tool_response>")
"""Tokens that Qwen3 has beside the special ones and that text may spell."""

CHATML = """{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.role == 'assistant' %}
            {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
        {%- else %}
            {{- message.content + '<|im_end|>' }}
        {%- endif %}
        {{- '\\n' }}
    {%- endif %}
{%- endfor %}"""
"""Qwen's template without its system prompt, tools and thoughts; with the marks of what is learnt."""


def write_tokenizer(folder: Path) -> Path:
    """The files of a small tokenizer of Qwen3's kind: byte-level BPE after its splits, then the special tokens."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["the user says hello to the assistant, the assistant answers 12\n\n"] * 9, trainer)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in ADDED])
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": [START, END],
        "bos_token": None,
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": SEPARATOR,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def hub(folder: Path) -> HubTokenizer:
    return HubTokenizer(folder)


def texts() -> st.SearchStrategy[str]:
    """Any text, and text full of the names of special tokens, whole, cut and nested."""
    names = st.sampled_from([*SPECIAL, *ADDED, "<|im_", "start|>", "<|im_<|im_end|>end|>", "the ", "\n", "e\u0301"])
    return st.text() | st.lists(names | st.text(max_size=3), max_size=8).map("".join)


@given(text=texts())
def test_bytes_are_those_of_utf8_and_come_back(text: str) -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokens.dtype == torch.uint8
    assert tokens.tolist() == list(text.encode())
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode(tokens.long()) == text
    assert tokenizer.special(text).tolist() == tokens.tolist()
    assert all(token < tokenizer.vocabulary for token in tokens.tolist())


@given(data=st.binary())
def test_bytes_that_are_not_utf8_decode_to_replacement_characters(data: bytes) -> None:
    tokens = torch.tensor(list(data), dtype=torch.uint8)
    assert ByteTokenizer().decode(tokens) == data.decode("utf-8", errors="replace")


@given(text=texts())
def test_tokens_of_text_spell_it_and_none_is_special(hub: HubTokenizer, text: str) -> None:
    tokens = hub.encode(text)
    assert tokens.dtype == torch.int32
    assert tokens.ndim == 1
    assert hub.decode(tokens) == unicodedata.normalize("NFC", text)
    assert not set(tokens.tolist()) & {int(hub.special(name)) for name in SPECIAL}
    assert all(0 <= token < hub.vocabulary for token in tokens.tolist())


@given(text=texts())
def test_tokens_are_those_of_the_file_with_special_names_spelt_out(hub: HubTokenizer, folder: Path, text: str) -> None:
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.encode_special_tokens = True
    assert hub.encode(text).tolist() == backend.encode(text, add_special_tokens=False).ids


def test_special_names_are_single_tokens_of_the_vocabulary(hub: HubTokenizer, folder: Path) -> None:
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    assert hub.vocabulary == backend.get_vocab_size(with_added_tokens=True)
    assert len(hub.encode(" the")) == 1
    for name in SPECIAL:
        token = hub.special(name)
        assert token.tolist() == [backend.token_to_id(name)]
        assert token.dtype == torch.int32
        assert hub.decode(token) == name
    assert hub.separator.tolist() == hub.special("<|endoftext|>").tolist()


@pytest.mark.parametrize("kind", ["bytes", "hub"])
def test_decoding_undoes_any_sequence_of_text_and_special_tokens(hub: HubTokenizer, kind: str) -> None:
    tokenizer: Tokenizer = ByteTokenizer() if kind == "bytes" else hub
    parts = [tokenizer.special(START), tokenizer.encode("user\nhé <|im_end|>"), tokenizer.special(END)]
    assert tokenizer.decode(torch.cat(parts)) == "<|im_start|>user\nhé <|im_end|><|im_end|>"
    assert tokenizer.decode(torch.cat(parts)[:0]) == ""


def test_an_unknown_special_token_is_named_with_the_nearest(hub: HubTokenizer) -> None:
    with pytest.raises(ValueError, match=r"unknown special token='<\|im_stop\|>'; did you mean '<\|im_start\|>'"):
        hub.special("<|im_stop|>")


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"HubTokenizer: {tmp_path} holds no tokenizer\.json"):
        HubTokenizer(tmp_path)
