"""Tokenizers, and a user's text and chats as a corpus: token sequences with the mask of what is learnt.

Shape letter: N tokens of a sequence.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from onn import check
from onn.config import parse_json, read_text
from onn.corpus import Corpus, Part, build, byte_tensor, check_share, plain_part, rank

START, END, SEPARATOR = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
ROLES = ("system", "user", "assistant", "tool")
TEXT_SUFFIXES = (".md", ".py", ".txt")


class Tokenizer(Protocol):
    """Text to tokens and back."""

    @property
    def vocabulary(self) -> int:
        """How many tokens there are: every token is smaller."""
        ...

    @property
    def separator(self) -> Tensor:
        """What stands after each of several documents, [n]."""
        ...

    def encode(self, text: str) -> Tensor:
        """Tokens [N] of an integer dtype; what looks like a special token is read as plain text."""
        ...

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens [N], special ones included."""
        ...

    def special(self, name: str) -> Tensor:
        """The token of a special name such as `<|im_start|>`, [1]; where there are no such tokens, its letters, [n]."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8, as uint8. It has no special tokens: their names are spelt out."""

    @property
    def vocabulary(self) -> int:
        """256."""
        return 256

    @property
    def separator(self) -> Tensor:
        """An empty line."""
        return self.encode("\n\n")

    def encode(self, text: str) -> Tensor:
        """UTF-8 bytes, uint8 [N]."""
        return byte_tensor(text.encode())

    def decode(self, tokens: Tensor) -> str:
        """The text of bytes [N]; where they are not UTF-8, U+FFFD. The inverse of `encode`."""
        return bytes(tokens.tolist()).decode(errors="replace")

    def special(self, name: str) -> Tensor:
        """The letters of the name, uint8 [n]."""
        return self.encode(name)


class HubTokenizer:
    """A tokenizer of transformers, read from a local folder; tokens are int32."""

    def __init__(self, folder: Path) -> None:
        """Read `tokenizer.json` and `tokenizer_config.json`; never asks the network and runs no code from the folder.

        Raises:
            ValueError: `folder` holds no `tokenizer.json`, or transformers cannot read it.
        """
        from tokenizers import Tokenizer as Reader
        from transformers import AutoTokenizer  # seconds, which bytes need not pay

        check.require((folder / "tokenizer.json").is_file(), f"HubTokenizer: {folder} holds no tokenizer.json.")
        self._folder = folder
        try:
            Reader.from_file(str(folder / "tokenizer.json"))  # where this fails transformers looks for other files
            self._backend = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the library underneath raises plain ones
            reason = check.shown(f"{type(error).__name__}: {error}", quoted=False)
            raise ValueError(f"HubTokenizer: {folder} holds no tokenizer that can be read: {reason}.") from error

    @property
    def vocabulary(self) -> int:
        """Tokens, special ones included; a model's embedding may have more rows."""
        return len(self._backend)

    @property
    def separator(self) -> Tensor:
        """`<|endoftext|>`, [1]."""
        return self.special(SEPARATOR)

    def encode(self, text: str) -> Tensor:
        """Tokens [N], none of them special, whatever `text` says."""
        ids = self._backend.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return torch.tensor(ids, dtype=torch.int32)

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens [N], special ones included; where it is not UTF-8, U+FFFD."""
        ids = tokens.tolist()
        text = self._backend.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str), "one sequence is one text"
        return text

    def special(self, name: str) -> Tensor:
        """The token of a special name, [1].

        Raises:
            ValueError: the tokenizer has no such token.
        """
        known = self._backend.added_tokens_encoder
        check.one_of(f"{self._folder}", "special token", name, known)
        return torch.tensor([known[name]], dtype=torch.int32)


def load_corpus(path: Path, tokenizer: Tokenizer, *, held_out: float) -> Corpus:
    """A user's corpus: `chat_corpus` of a `.jsonl` file, `text_corpus` of a `.txt`, `.md` or `.py` file or a folder.

    Raises:
        ValueError: the path does not exist, has another suffix, or its content is wrong.
    """
    known = (".jsonl", *TEXT_SUFFIXES)
    if os.path.isfile(path):
        check.one_of(f"{path}", "suffix", path.suffix.lower(), known)
    return (chat_corpus if path.suffix.lower() == ".jsonl" else text_corpus)(path, tokenizer, held_out=held_out)


def retokenized(corpus: Corpus, tokenizer: Tokenizer) -> Corpus:
    """A corpus of plain bytes, such as `embedded_corpus`, in the tokens of another tokenizer; all of it is learnt.

    A letter that was cut in two at the end of a sequence becomes U+FFFD.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return corpus
    read = ByteTokenizer()
    sides = (
        [plain_part(tokenizer.encode(read.decode(tokens))) for tokens in side]
        for side in (corpus.train, corpus.held_out)
    )
    return build(corpus.domains, *sides)


def text_corpus(path: Path, tokenizer: Tokenizer, *, held_out: float) -> Corpus:
    """A text file, or every `.txt`, `.md` and `.py` file below a folder, as one domain named after the path.

    In a folder each file is a document, followed by the tokenizer's separator; hidden and blank files are left out; a
    hash of a document's content decides whether it is held out, and at least one is, and one is not. Of a single file
    the last lines are held out.

    Args:
        path: file or folder.
        tokenizer: as it will be used by the model.
        held_out: share to hold out: of the letters of a file, of the files of a folder. 0 holds out nothing.

    Raises:
        ValueError: nothing there, not UTF-8 (names file and line), nothing but blanks, or too little to hold some out.
    """
    check_share("text_corpus", held_out)
    if not os.path.isdir(path):
        sides = ([plain_part(tokenizer.encode(side))] for side in _split_lines(path, held_out))
        return build([path.stem], *sides)
    hits = (file for file in sorted(path.rglob("*")) if file.suffix.lower() in TEXT_SUFFIXES and file.is_file())
    files = [file for file in hits if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    for file in files:
        outside = not file.resolve().is_relative_to(path.resolve())
        check.require(not outside, f"{file}: leads out of the folder, to {file.resolve()}.")
    texts = [text for file in files if (text := _read(file)).strip()]
    check.require(bool(texts), f"{path}: no file with text in it; looked for {', '.join(TEXT_SUFFIXES)}.")
    parts = [plain_part(torch.cat([tokenizer.encode(text), tokenizer.separator])) for text in texts]
    return _split_documents(path, texts, parts, held_out)


def chat_corpus(path: Path, tokenizer: Tokenizer, *, held_out: float) -> Corpus:
    r"""Conversations as ChatML, as one domain named after the file; learnt are the assistant's words and their end.

    Each line of the file is `{"messages": [{"role": ..., "content": ...}, ...]}`, with the roles system, user,
    assistant and tool; blank lines and other keys beside `messages` are ignored. A message becomes
    `<|im_start|>{role}\n{content}<|im_end|>\n`; as in Qwen's template, consecutive tool messages become one of the
    user, each content in `<tool_response>`. Content is taken word for word: nothing in it becomes a special token.

    Guarantees: the mask is true on exactly the tokens of the assistant's contents and of the `<|im_end|>` after each.

    Args:
        path: file.
        tokenizer: as it will be used by the model.
        held_out: share of the conversations to hold out, by the hash of their text: at least one is, and one is not. 0
            holds out nothing.

    Raises:
        ValueError: names file and line: not UTF-8, not JSON, a missing or wrong key, an unknown role, no messages. Also
            an empty file, one in which the assistant never speaks, or too few conversations to hold some out.
    """
    check_share("chat_corpus", held_out)
    chats = [
        _pieces(_turns(line, f"{path}, line {number}"))
        for number, line in enumerate(_read(path).split("\n"), start=1)
        if line.strip()
    ]
    check.require(bool(chats), f"{path}: the file is empty.")
    check.require(any(piece.learn for chat in chats for piece in chat), f"{path}: there is no assistant turn to learn.")
    texts = ["".join(piece.text for piece in chat) for chat in chats]
    return _split_documents(path, texts, [_encode(chat, tokenizer) for chat in chats], held_out)


class _Piece(NamedTuple):
    text: str
    special: bool
    learn: bool


def _turns(line: str, where: str) -> list[tuple[str, str]]:
    """The checked `(role, content)` of one line of a chat file."""
    chat = parse_json(line, where=where)
    messages = chat.get("messages") if isinstance(chat, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{where}: expected {{"messages": [...]}} with at least one message, got {check.shown(line)}.')
    turns = []
    for number, message in enumerate(messages, start=1):
        at = f"{where}, message {number}"
        if not isinstance(message, dict):
            raise ValueError(f'{at}: expected {{"role": ..., "content": ...}}, got {check.shown(message)}.')
        for key in message:
            check.one_of(at, "key", key, ("role", "content"))
        for key in ("role", "content"):
            check.require(key in message, f"{at}: {key!r} is missing.")
            check.require(isinstance(message[key], str), f"{at}: {key!r} is not text but {check.shown(message[key])}.")
        check.one_of(at, "role", message["role"], ROLES)
        surrogate = any("\ud800" <= letter <= "\udfff" for letter in message["content"])
        check.require(not surrogate, f"{at}: 'content' is not Unicode: it holds half a surrogate pair.")
        turns.append((message["role"], message["content"]))
    return turns


def _pieces(turns: Iterable[tuple[str, str]]) -> list[_Piece]:
    """A conversation cut where the mask changes and where a special token stands."""
    merged: list[tuple[str, str]] = []
    for role, content in turns:
        if role == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if merged and merged[-1][0] == "tool":
                content = f"{merged.pop()[1]}\n{content}"
        merged.append((role, content))
    pieces = []
    for role, content in merged:
        learn = role == "assistant"
        head = "user\n" if role == "tool" else f"{role}\n"
        texts = [(head, False), (content, True)] if learn else [(head + content, False)]
        pieces.append(_Piece(START, special=True, learn=False))
        pieces += [_Piece(text, special=False, learn=counted) for text, counted in texts]
        pieces += [_Piece(END, special=True, learn=learn), _Piece("\n", special=False, learn=False)]
    return pieces


def _encode(pieces: Iterable[_Piece], tokenizer: Tokenizer) -> Part:
    encoded = [
        (tokenizer.special(text) if special else tokenizer.encode(text), learn) for text, special, learn in pieces
    ]
    tokens = torch.cat([ids for ids, _ in encoded])
    return Part(tokens, torch.cat([torch.full(ids.shape, learn) for ids, learn in encoded]))


def _read(path: Path) -> str:
    """A UTF-8 file without its byte order mark and with `\\n` at the end of every line."""
    check.require(os.path.isfile(path), f"{path}: there is no such file.")
    return read_text(path).removeprefix("\ufeff").replace("\r\n", "\n")


def _split_lines(path: Path, held_out: float) -> tuple[str, str]:
    """A file cut at the end of the line in which the share to hold out begins, or else before that line."""
    text = _read(path)
    check.require(bool(text.strip()), f"{path}: the file is empty.")
    if held_out == 0:
        return text, ""
    wanted = int(len(text) * (1 - held_out))
    after, before = text.find("\n", max(wanted - 1, 0)) + 1, text.rfind("\n", 0, wanted) + 1
    cut = after if 0 < after < len(text) else before
    check.require(cut > 0, f"{path}: cannot hold out held_out={held_out} of a single line.")
    return text[:cut], text[cut:]


def _split_documents(path: Path, texts: Sequence[str], parts: Sequence[Part], held_out: float) -> Corpus:
    ranks = [rank(text) for text in texts]
    held = [rank < held_out for rank in ranks]
    if held_out > 0 and not any(held):
        held = [rank == min(ranks) for rank in ranks]
    elif all(held):
        held = [rank != max(ranks) for rank in ranks]
    check.require(
        held_out == 0 or any(held) != all(held),
        f"{path}: cannot hold out held_out={held_out} of one document: two different ones are needed.",
    )
    sides = [[part for part, on in zip(parts, held, strict=True) if on == side] for side in (False, True)]
    empty = Part(parts[0].tokens[:0], parts[0].mask[:0])
    joined = [[Part(*(torch.cat(column) for column in zip(empty, *side, strict=True)))] for side in sides]
    return build([path.resolve().stem], *joined)
