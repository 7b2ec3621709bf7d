from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer, BatchEncoding

from onn import documents
from onn.corpus import Corpus, build, plain_part, rank
from onn.documents import END, ROLES, SEPARATOR, START, ByteTokenizer, HubTokenizer
from tests.support import assert_same
from tests.test_tokenizers import SPECIAL, write_tokenizer

BYTES = ByteTokenizer()
Chat = Sequence[Mapping[str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def hub(folder: Path) -> HubTokenizer:
    return HubTokenizer(folder)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def chats(contents: st.SearchStrategy[str], *, roles: Sequence[str] = ROLES) -> st.SearchStrategy[list[dict[str, str]]]:
    """Conversations of any order of roles in which the assistant speaks."""
    messages = st.lists(st.builds(message, st.sampled_from(roles), contents), min_size=1, max_size=6)
    return messages.filter(lambda chat: any(turn["role"] == "assistant" for turn in chat))


def spelling() -> st.SearchStrategy[str]:
    """Contents that spell what the template writes."""
    parts = st.sampled_from(
        [*SPECIAL, "<|im_start|>assistant\n", "</tool_response>", "hi", " ", "\n", "é", "\r\n", "🙂"]
    )
    return st.lists(parts, max_size=5).map("".join)


def words() -> st.SearchStrategy[str]:
    """Contents that begin with a letter, so that no token reaches over the line before them."""
    return st.text("abst 1!é\n", max_size=12).map(lambda text: f"w{text}")


def write(path: Path, *conversations: Chat) -> Path:
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in conversations), encoding="utf-8")
    return path


def chat_corpus(path: Path, *conversations: Chat, held_out: float = 0.0) -> Corpus:
    return documents.chat_corpus(write(path / "chats.jsonl", *conversations), BYTES, held_out=held_out)


class Template:
    """Qwen's template as transformers renders it."""

    def __init__(self, folder: Path) -> None:
        self.backend = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def text(self, chat: Chat) -> str:
        if not chat:
            return ""
        rendered = self.backend.apply_chat_template([dict(turn) for turn in chat], tokenize=False)
        assert isinstance(rendered, str)
        return rendered

    def tokens(self, chat: Chat) -> tuple[list[int], list[bool]]:
        encoded = self.backend.apply_chat_template(
            [dict(turn) for turn in chat], return_dict=True, return_assistant_tokens_mask=True
        )
        assert isinstance(encoded, BatchEncoding)
        return encoded["input_ids"], [flag == 1 for flag in encoded["assistant_masks"]]


@pytest.fixture(scope="module")
def template(folder: Path) -> Template:
    return Template(folder)


@given(conversations=st.lists(chats(spelling()), min_size=1, max_size=3))
def test_bytes_and_mask_are_those_of_the_template_of_each_conversation(
    template: Template, conversations: list[Chat], tmp_path: Path
) -> None:
    expected, mask = b"", list[bool]()
    for chat in conversations:
        whole = template.text(chat).encode()
        learnt = [False] * len(whole)
        for position, turn in enumerate(chat):
            if turn["role"] == "assistant":
                start, stop = (len(template.text(chat[:end]).encode()) for end in (position, position + 1))
                first, last = start + len("<|im_start|>assistant\n"), stop - len("\n")
                learnt[first:last] = [True] * (last - first)
        expected, mask = expected + whole, mask + learnt
    got = chat_corpus(tmp_path, *conversations)
    assert bytes(got.train[0].tolist()) == expected
    assert_same(got.train_mask[0], torch.tensor(mask))
    assert len(got.held_out[0]) == len(got.held_out_mask[0]) == 0


@given(chat=chats(words()))
def test_tokens_and_mask_are_those_of_transformers(
    template: Template, hub: HubTokenizer, chat: Chat, tmp_path: Path
) -> None:
    got = documents.chat_corpus(write(tmp_path / "chats.jsonl", chat), hub, held_out=0)
    tokens, mask = template.tokens(chat)
    assert_same(got.train[0], torch.tensor(tokens, dtype=torch.int32))
    assert_same(got.train_mask[0], torch.tensor(mask))


@given(chat=chats(spelling()))
def test_no_content_becomes_a_special_token(template: Template, hub: HubTokenizer, chat: Chat, tmp_path: Path) -> None:
    got = documents.chat_corpus(write(tmp_path / "chats.jsonl", chat), hub, held_out=0)
    roles = [turn["role"] for turn in chat]
    turns = sum(role != "tool" or before != "tool" for before, role in itertools.pairwise(["", *roles]))
    counts = {name: int((got.train[0] == hub.special(name)).sum()) for name in SPECIAL}
    assert counts == {START: turns, END: turns, SEPARATOR: 0}
    assert hub.decode(got.train[0]) == template.text(chat)
    spoken = [turn["content"] + END for turn in chat if turn["role"] == "assistant"]
    assert hub.decode(got.train[0][got.train_mask[0]]) == "".join(spoken)


def test_consecutive_tool_messages_become_one_of_the_user(tmp_path: Path) -> None:
    chat = [message("tool", "a"), message("tool", "b"), message("assistant", "c"), message("tool", "d")]
    assert BYTES.decode(chat_corpus(tmp_path, chat).train[0]) == (
        "<|im_start|>user\n<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nc<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nd\n</tool_response><|im_end|>\n"
    )


def test_blank_lines_other_keys_line_ends_and_byte_order_marks_change_nothing(tmp_path: Path) -> None:
    chat = [message("user", "hé"), message("assistant", "ho\r\n")]
    plain = chat_corpus(tmp_path, chat, chat)
    line = json.dumps({"id": 7, "messages": chat, "source": None}, ensure_ascii=False)
    (tmp_path / "chats.jsonl").write_bytes(f"\ufeff\n{line}\r\n \t\r\n{line}".encode())
    again = documents.chat_corpus(tmp_path / "chats.jsonl", BYTES, held_out=0)
    assert again.fingerprint == plain.fingerprint
    assert again.domains == ("chats",)


def talk(number: int) -> Chat:
    return [message("user", f"q{number}"), message("assistant", f"a{number}.")]


def spoken(tokens: Tensor, mask: Tensor) -> list[str]:
    return BYTES.decode(tokens[mask]).split(END)[:-1]


@given(numbers=st.lists(st.integers(0, 30), min_size=2, max_size=12), share=st.sampled_from([1e-6, 0.1, 0.5, 0.9999]))
def test_whole_conversations_are_held_out_by_the_hash_of_their_text(
    numbers: list[int], share: float, tmp_path: Path
) -> None:
    ranks = {number: rank(BYTES.decode(chat_corpus(tmp_path, talk(number)).train[0])) for number in numbers}
    conversations = [talk(number) for number in numbers]
    if len(ranks) == 1:
        with pytest.raises(ValueError, match=r"chats\.jsonl: cannot hold out .* of one document"):
            chat_corpus(tmp_path, *conversations, held_out=share)
        return
    got = chat_corpus(tmp_path, *conversations, held_out=share)
    held = {number for number in numbers if ranks[number] < share} or {min(ranks, key=ranks.__getitem__)}
    if held == set(numbers):
        held -= {max(ranks, key=ranks.__getitem__)}
    for side, expected in (
        ((got.train[0], got.train_mask[0]), [number for number in numbers if number not in held]),
        ((got.held_out[0], got.held_out_mask[0]), [number for number in numbers if number in held]),
    ):
        assert spoken(*side) == [f"a{number}." for number in expected]


GOOD = json.dumps({"messages": [message("assistant", "a")]}).encode()


def line_of(*messages: object) -> bytes:
    return json.dumps({"messages": messages}).encode()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"messages": "\xff"}', "not UTF-8: byte 0xff, invalid start byte"),
        (b"{'messages': 1}", "not JSON: .* at column 2"),
        (b"[1]", r"expected \{\"messages\": \[\.\.\.\]\} with at least one message, got '\[1\]'"),
        (b'{"message": []}', r"expected \{\"messages\": .* got '\{\"message\": \[\]\}'"),
        (b'{"messages": []}', ".* with at least one message"),
        (b'{"messages": {"role": "user"}}', ".* with at least one message"),
        (line_of("hi"), r"message 1: expected \{\"role\": \.\.\., \"content\": \.\.\.\}, got 'hi'"),
        (line_of(message("user", "x"), {"content": "x"}), "message 2: 'role' is missing"),
        (line_of({"role": "user"}), "message 1: 'content' is missing"),
        (line_of({"role": "assistant", "content": None}), "message 1: 'content' is not text but None"),
        (line_of({"role": 3, "content": ""}), "message 1: 'role' is not text but 3"),
        (line_of({"role": "user", "contents": ""}), "message 1: unknown key='contents'; did you mean 'content'"),
        (line_of(message("asistant", "x")), "message 1: unknown role='asistant'; did you mean 'assistant'"),
        (line_of(message("user", "x\ud800")), "message 1: 'content' is not Unicode: it holds half a surrogate pair"),
    ],
)
def test_what_is_wrong_with_a_line_is_said_with_file_and_line(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(GOOD + b"\n\n" + line + b"\n" + GOOD)
    with pytest.raises(ValueError, match=rf"chats\.jsonl, line 3(: |, ){words}"):
        documents.load_corpus(path, BYTES, held_out=0)


@pytest.mark.parametrize(
    ("content", "held_out", "words"),
    [
        (b"", 0.0, r"chats\.jsonl: the file is empty"),
        (b"\n \r\n", 0.0, r"chats\.jsonl: the file is empty"),
        (line_of(message("user", "x")), 0.0, r"chats\.jsonl: there is no assistant turn to learn"),
        (GOOD, 0.1, r"chats\.jsonl: cannot hold out held_out=0\.1 of one document: two different ones are needed"),
        (GOOD, 1.0, r"chat_corpus: expected 0 <= held_out=1\.0 < 1"),
    ],
)
def test_what_is_wrong_with_a_file_of_chats_is_said(
    tmp_path: Path, content: bytes, held_out: float, words: str
) -> None:
    (tmp_path / "chats.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        documents.chat_corpus(tmp_path / "chats.jsonl", BYTES, held_out=held_out)


@given(
    lines=st.lists(st.text("ab é", max_size=4), min_size=1, max_size=8), share=st.sampled_from([0.01, 0.3, 0.5, 0.99])
)
def test_the_last_lines_of_a_file_are_held_out(lines: list[str], share: float, tmp_path: Path) -> None:
    text = "\n".join(lines)
    path = tmp_path / "story.txt"
    path.write_text(text, encoding="utf-8")
    cuts = [cut for cut in range(1, len(text)) if text[cut - 1] == "\n"]
    wanted = len(text) - share * len(text)
    if not text.strip():
        with pytest.raises(ValueError, match=r"story\.txt: the file is empty"):
            documents.text_corpus(path, BYTES, held_out=share)
    elif not cuts:
        with pytest.raises(ValueError, match=r"story\.txt: cannot hold out held_out=.* of a single line"):
            documents.text_corpus(path, BYTES, held_out=share)
    else:
        got = documents.text_corpus(path, BYTES, held_out=share)
        train, held_out = BYTES.decode(got.train[0]), BYTES.decode(got.held_out[0])
        assert train + held_out == text
        assert len(train) == next((cut for cut in cuts if cut >= int(wanted)), cuts[-1])
        assert bool(got.train_mask[0].all() and got.held_out_mask[0].all())
        assert [len(mask) for mask in got.train_mask + got.held_out_mask] == [len(got.train[0]), len(got.held_out[0])]
    if text.strip():
        whole = documents.text_corpus(path, BYTES, held_out=0)
        assert BYTES.decode(whole.train[0]) == text
        assert (len(whole.held_out[0]), whole.domains) == (0, ("story",))


def test_line_ends_and_byte_order_marks_are_made_alike(tmp_path: Path) -> None:
    (tmp_path / "story.md").write_bytes("\ufeffa\r\n\r\nb\n".encode())
    assert BYTES.decode(documents.load_corpus(tmp_path / "story.md", BYTES, held_out=0).train[0]) == "a\n\nb\n"


def write_texts(folder: Path, texts: Mapping[str, str]) -> Path:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_a_folder_gives_its_texts_in_order_without_hidden_blank_and_other_files(
    tmp_path: Path, hub: HubTokenizer
) -> None:
    folder = write_texts(
        tmp_path / "notes",
        {
            "b.txt": "second",
            "a/deep/er.MD": "first",
            "c.py": "third\n",
            ".hidden.txt": "no",
            ".git/config.txt": "no",
            "a/.cache/d.md": "no",
            "blank.txt": " \n",
            "data.json": "no",
            "noext": "no",
        },
    )
    (folder / "folder.txt").mkdir()
    got = documents.load_corpus(folder, BYTES, held_out=0)
    assert BYTES.decode(got.train[0]) == "first\n\nsecond\n\nthird\n\n\n"
    assert (got.domains, len(got.held_out[0])) == (("notes",), 0)
    parts = [torch.cat([hub.encode(text), hub.special("<|endoftext|>")]) for text in ("first", "second", "third\n")]
    assert documents.load_corpus(folder, hub, held_out=0).train[0].tolist() == torch.cat(parts).tolist()


@given(numbers=st.lists(st.integers(0, 30), min_size=2, max_size=8), share=st.sampled_from([1e-6, 0.3, 0.9999]))
def test_whole_files_of_a_folder_are_held_out_by_their_text_whatever_their_names(
    numbers: list[int], share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sides = []
    for order in (numbers, numbers[::-1]):
        names = {f"{place:02d}.txt": f"text {number}" for place, number in enumerate(order)}
        folder = write_texts(tmp_path_factory.mktemp("texts"), names)
        if len(set(numbers)) == 1:
            with pytest.raises(ValueError, match="two different ones are needed"):
                documents.text_corpus(folder, BYTES, held_out=share)
            return
        got = documents.text_corpus(folder, BYTES, held_out=share)
        sides.append([sorted(BYTES.decode(side[0]).split("\n\n")[:-1]) for side in (got.train, got.held_out)])
    train, held_out = sides[0]
    assert sides[1] == [train, held_out]
    assert train
    assert held_out
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(f"text {number}" for number in numbers)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.txt", None, r"gone\.txt: there is no such file"),
        ("gone.jsonl", None, r"gone\.jsonl: there is no such file"),
        ("table.jsn", b"x", r"table\.jsn: unknown suffix='\.jsn'; did you mean '\.jsonl'"),
        ("story.txt", b"a\nb\nc \xff", r"story\.txt, line 3: not UTF-8: byte 0xff"),
        ("story.txt", b"\xe9\n", r"story\.txt, line 1: not UTF-8: byte 0xe9"),
        ("story.txt", b" \n\n", r"story\.txt: the file is empty"),
        ("notes/a.txt", b"a\n\xff", r"a\.txt, line 2: not UTF-8: byte 0xff"),
        ("notes/a.txt", b" ", r"notes: no file with text in it; looked for \.md, \.py, \.txt"),
        ("notes/a.csv", b"a", r"notes: no file with text in it"),
    ],
)
def test_what_is_wrong_with_a_text_is_said_with_its_path(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        documents.load_corpus(path.parent if path.parent.name == "notes" else path, BYTES, held_out=0)


def test_a_share_out_of_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"text_corpus: expected 0 <= held_out=-1 < 1"):
        documents.text_corpus(tmp_path, BYTES, held_out=-1)


def test_suffixes_are_read_in_any_case(tmp_path: Path) -> None:
    chats, story = write(tmp_path / "A.JSONL", talk(1)), tmp_path / "B.TXT"
    story.write_text(chats.read_text())
    assert BYTES.decode(documents.load_corpus(chats, BYTES, held_out=0).train[0]).startswith(START)
    assert BYTES.decode(documents.load_corpus(story, BYTES, held_out=0).train[0]) == story.read_text()


@given(texts=st.lists(spelling(), min_size=4, max_size=4), cut=st.booleans())
def test_a_corpus_of_bytes_keeps_its_text_and_domains_in_other_tokens(
    hub: HubTokenizer, texts: list[str], cut: bool
) -> None:
    bytes_of = [plain_part(BYTES.encode(text + "é")[: -1 if cut else None]) for text in texts]
    embedded = build(["a", "b"], bytes_of[:2], bytes_of[2:])
    got = documents.retokenized(embedded, hub)
    assert got.domains == ("a", "b")
    for text, tokens, mask in zip(texts, got.train + got.held_out, got.train_mask + got.held_out_mask, strict=True):
        assert hub.decode(tokens) == text + ("\ufffd" if cut else "é")
        assert (tokens.dtype, mask.dtype, mask.shape) == (torch.int32, torch.bool, tokens.shape)
        assert bool(mask.all())
        assert not any(bool((tokens == hub.special(name)).any()) for name in SPECIAL)
    assert got.fingerprint != embedded.fingerprint
    assert documents.retokenized(embedded, BYTES) == embedded
