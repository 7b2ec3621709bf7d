"""What fuzzing found, and what it was made to look for: files that once raised, or would raise, something else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from experiments import presets
from onn import check, config, data, documents, storage, weights
from onn.corpus import Part, build
from onn.documents import ByteTokenizer, HubTokenizer
from tests.checkpoints import (
    SMALL,
    config_json,
    hub_tensors,
    manifest_of,
    manifest_text,
    write_checkpoint,
    write_shards,
)
from tests.test_tokenizers import write_tokenizer

DEEP = "[" * 100_000
LONG = "9" * 5000
HIDDEN = '"hidden_size": 16'


def refused(call: Callable[[], object], *words: str) -> None:
    """A plain `ValueError` of at most a screen that holds the words."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the words are looked for below
        call()
    assert type(caught.value) is ValueError
    assert len(str(caught.value)) < 4000
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("{", "column 2"),
        ("[1,\n2,\n}", "line 3, column 1"),
        (DEEP, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        (LONG, "not JSON"),
        ("NaN", "NaN is not a finite number"),
        ("[-Infinity]", "-Infinity is not a finite number"),
        ("1e999", "1e999 is not a finite number"),
        ('{"a": 1, "b": 2, "a": 1}', "'a' comes twice"),
        ("\ufeff{}", "not JSON"),
        ("'a'", "not JSON"),
    ],
)
def test_what_is_not_strict_json_is_refused_with_the_place(text: str, words: str) -> None:
    refused(lambda: config.parse_json(text, where="file"), "file: not JSON", words)


def test_json_that_is_strict_is_read_as_python_reads_it() -> None:
    value = {"a": [1, -2.5, True, None, "é\ud800"], "b": {"a": {}}, "": 10**300}
    assert config.parse_json(json.dumps(value), where="file") == value


def test_a_number_too_large_for_a_float_is_refused_by_name(tmp_path: Path) -> None:
    values = config_json(SMALL) | {"rms_norm_eps": 10**400}
    (tmp_path / "config.json").write_text(json.dumps(values))
    refused(
        lambda: weights.read_config(tmp_path / "config.json"), "config.json: rms_norm_eps", "expected a finite number"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_not_saved_either(value: float) -> None:
    broken = replace(presets.TINY, data=replace(presets.TINY.data, held_out=value))
    refused(lambda: presets.save(broken), repr(value))


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('license = "Apache-2.0"', f"license = {DEEP}", ("not TOML", "deeply")),
        ("tensors = ", f"tensors = 0x{'f' * 9000} #", ("a value of type int",)),
        ("rope_theta = ", "rope_theta = nan #", ("rope_theta", "finite")),
        ("rms_norm_eps = ", "rms_norm_eps = inf #", ("rms_norm_eps", "finite")),
        ('license = "Apache-2.0"', "license = 1979-05-27", ("license", "expected str")),
        ('license = "Apache-2.0"', f"license = {LONG}", ("not TOML",)),
        ('files."model.safetensors"', 'files.""', ("expected plain names, got ''",)),
        ('files."model.safetensors"', 'files.".."', ("expected plain names, got '..'",)),
        ('files."model.safetensors"', 'files."a\\\\b"', ("expected plain names",)),
        ('files."model.safetensors"', 'files."a\\u0000"', ("expected plain names",)),
        ('files."model.safetensors"', f'files."{"x" * 5000}"', ("expected plain names, got 'xxx",)),
    ],
)
def test_a_manifest_is_refused_with_the_file_and_the_key(
    tmp_path: Path, before: str, after: str, words: tuple[str, ...]
) -> None:
    folder = write_checkpoint(tmp_path / "folder", SMALL, hub_tensors(SMALL))
    text, path = manifest_text(folder, SMALL, tensors=len(hub_tensors(SMALL))), tmp_path / "manifest.toml"
    assert before in text
    path.write_text(text.replace(before, after, 1))
    refused(lambda: weights.read_manifest(path, "small"), "manifest.toml", *words)
    path.write_bytes(text.encode() + b"\n# \xff")
    refused(lambda: weights.read_manifest(path, "small"), f"line {text.count(chr(10)) + 2}: not UTF-8: byte 0xff")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../outside.safetensors", "/etc/passwd", "a/b", "\0", "\ud800", "x" * 300, 7]
)
def test_an_index_names_files_of_its_folder_and_nothing_else(tmp_path: Path, name: object) -> None:
    folder = write_shards(tmp_path / "folder", SMALL, hub_tensors(SMALL))
    save_file(hub_tensors(SMALL), tmp_path / "outside.safetensors")
    index = json.loads((folder / weights.INDEX_FILE).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / weights.INDEX_FILE).write_text(json.dumps(index))
    refused(lambda: weights.load(folder, config=SMALL), weights.INDEX_FILE, "expected plain file names")


def with_header(header: str, body: bytes = bytes(16)) -> bytes:
    return len(header.encode()).to_bytes(8, "little") + header.encode() + body


ENTRY = '{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes(7),
        bytes(8),
        (2**64 - 1).to_bytes(8, "little") + b"{}",
        (2**40).to_bytes(8, "little") + b"{}",
        with_header(DEEP),
        with_header("[]"),
        with_header(f'{{"a": {ENTRY}, "a": {ENTRY}}}', bytes(8)),
        with_header(f'{{"a": {ENTRY}, "b": {ENTRY}}}', bytes(8)),
        with_header(f'{{"a": {ENTRY.replace("[0, 8]", "[0, 80]")}}}'),
        with_header(f'{{"a": {ENTRY.replace("[0, 8]", "[8, 0]")}}}'),
        with_header(f'{{"a": {ENTRY.replace("[2]", "[-2]")}}}'),
        with_header(f'{{"a": {ENTRY.replace("[2]", f"[{2**62}, {2**62}]")}}}'),
        with_header(f'{{"a": {ENTRY.replace("F32", "F31")}}}', bytes(8)),
        with_header(f'{{"a": {ENTRY}}}', bytes(99)),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tree.safetensors"
    path.write_bytes(content)
    refused(lambda: storage.restore(path, like={"a": torch.zeros(2)}), "tree.safetensors")


def test_a_header_that_holds_a_name_twice_never_gives_both(tmp_path: Path) -> None:
    path = tmp_path / "tree.safetensors"
    path.write_bytes(with_header(f'{{"a": {ENTRY}, "a": {ENTRY.replace("[0, 8]", "[8, 16]")}}}'))
    refused(lambda: storage.restore(path, like={"a": torch.zeros(2)}), "tree.safetensors")


def test_tensors_are_not_of_another_kind_than_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "tree.safetensors"
    path.write_bytes(save({"a": torch.zeros(2, dtype=torch.int64)}))
    refused(lambda: storage.restore(path, like={"a": torch.zeros(2)}), "a: expected torch.float32, found dtype I64")
    path.write_bytes(save({"a": torch.zeros(2)}))
    refused(lambda: storage.restore(path, like={"a": torch.zeros(2, dtype=torch.bool)}), "expected torch.bool")
    path.write_bytes(save({"a": torch.zeros(2, dtype=torch.complex64)}))
    refused(lambda: storage.restore(path, like={"a": torch.zeros(2)}), "'a': dtype C64 is not supported")
    path.write_bytes(save({"\x1b[2J": torch.zeros(2), "a": torch.zeros(2)}))
    refused(lambda: storage.restore(path, like={"a": torch.zeros(2)}), r"'\x1b[2J' [2] is not expected")


def test_a_checkpoint_has_one_floating_dtype(tmp_path: Path) -> None:
    mixed = hub_tensors(SMALL) | {"model.norm.weight": torch.ones(SMALL.hidden_size)}
    folder = write_checkpoint(tmp_path / "mixed", SMALL, mixed)
    refused(lambda: weights.load(folder, config=SMALL), "expected tensors of one floating dtype", "model.norm.weight")
    whole = {name: tensor.to(torch.int8) for name, tensor in hub_tensors(SMALL).items()}
    folder = write_checkpoint(tmp_path / "whole", SMALL, whole)
    refused(lambda: weights.load(folder, config=SMALL), "expected tensors of one floating dtype", "I8")


def chat(content: str) -> str:
    return f'{{"messages": [{{"role": "assistant", "content": {content}}}]}}'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (DEEP, "nested too deeply"),
        (chat(LONG), "not JSON"),
        (chat("1e999"), "not a finite number"),
        (chat('"x", "role": "user"'), "'role' comes twice"),
        (chat('"\\ud800"'), "half a surrogate pair"),
        (chat(f'["{"x" * 10**6}"]'), "'content' is not text but ['xxx"),
        (chat(f'"x", "{"k" * 10**6}": 1'), "unknown key='kkk"),
        (f'{{"messages": "{"x" * 10**6}"}}', "expected"),
        ('{"messages": [null]}', "message 1"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": [{}]}', "'role' is missing"),
    ],
)
def test_a_chat_is_refused_with_the_line_in_a_message_of_one_screen(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(f"{chat(chr(34) * 2)}\n{line}\n", encoding="utf-8")
    refused(lambda: documents.load_corpus(path, ByteTokenizer(), held_out=0.0), "chat.jsonl, line 2", words)


def test_a_gigantic_line_is_read(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(chat(json.dumps("word " * 400_000)), encoding="utf-8")
    corpus = documents.load_corpus(path, ByteTokenizer(), held_out=0.0)
    assert int(corpus.train_mask[0].sum()) == 2_000_000 + len("<|im_end|>")


def test_paths_that_no_file_can_have_are_refused(tmp_path: Path) -> None:
    for name in ("x" * 300 + ".txt", "a\0b.txt", "x" * 300 + ".jsonl"):
        refused(partial(documents.load_corpus, tmp_path / name, ByteTokenizer(), held_out=0.0), "no such file")
    refused(lambda: storage.headers([tmp_path / ("x" * 300)]), "no such file")
    refused(lambda: weights.read_manifest(tmp_path, "small"), "no such file")


def test_a_folder_of_text_is_not_left(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "a.txt").write_text("a")
    (folder / "b.txt").symlink_to(tmp_path / "secret.txt")
    refused(lambda: documents.text_corpus(folder, ByteTokenizer(), held_out=0.0), "b.txt: leads out of the folder")
    (folder / "b.txt").unlink()
    (folder / "b.txt").symlink_to(folder / "a.txt")
    documents.text_corpus(folder, ByteTokenizer(), held_out=0.0)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", DEEP, '{"model": {"type": "Unigram"}}'])
def test_a_tokenizer_that_cannot_be_read_is_refused_with_its_folder(tmp_path: Path, content: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    refused(lambda: HubTokenizer(tmp_path), str(tmp_path))


def test_a_corpus_of_tokens_that_a_model_cannot_embed_is_refused() -> None:
    def corpus(*tokens: int) -> data.Corpus:
        part = Part(torch.tensor(tokens), torch.ones(len(tokens), dtype=torch.bool))
        return build(["d"], [part], [Part(part.tokens[:0], part.mask[:0])])

    data.check_vocabulary(corpus(0, 7), vocab_size=8)
    refused(lambda: data.check_vocabulary(corpus(0, 8), vocab_size=8), "d has tokens from 0 to 8", "vocab_size=8")
    refused(lambda: data.check_vocabulary(corpus(-1, 3), vocab_size=8), "from -1 to 3")


def test_verification_of_a_damaged_manifest_names_what_is_wrong(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "folder", SMALL, hub_tensors(SMALL))
    manifest = manifest_of(folder, SMALL, tensors=len(hub_tensors(SMALL)))
    (folder / "config.json").write_text(DEEP)
    refused(lambda: weights.verify(folder, manifest), "config.json: damaged")


def test_a_message_shows_at_most_the_beginning_of_a_value() -> None:
    values: list[object] = [10**5000, "x" * 10**6, [[]] * 10**5]
    assert all(len(check.shown(value)) < 100 for value in values)
    assert check.shown("a") == "'a'"
