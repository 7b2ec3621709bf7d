"""Text that every machine with Python and torch holds: four domains, no download, no stored file.

`python` is the source of the standard library, `english` the prose of its docstrings and of `pydoc_data.topics`, `c`
the headers of the interpreter, `arithmetic` generated lines. Where the interpreter's own files are missing or used up,
torch's follow: its Python sources, their docstrings, and its C++ headers. Files come in the order of a hash of their
path, so that a few of them are already a fair sample.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import itertools
import os
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from torch import Tensor

from onn import check

DOMAINS = ("python", "english", "c", "arithmetic")

SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "encodings", "idle_test", "idlelib", "lib2to3", "ops", "pydoc_data"}
    | {"site-packages", "test", "testing", "tests"}
)
"""Tests, third parties, tables of characters (`encodings`), generated headers (`ops`), and the text of the topics."""

CODE = re.compile(r"[^\w\s.,;:!?'\"()\-`*]|_|\d")
WORD = re.compile(r"[^\W\d_]{2,}")
SENTENCE_END = re.compile(r"[.!?:]['\")`*]*$")


class Corpus(NamedTuple):
    """Tokens of several domains; every tuple has one entry a domain, in the order of `domains`."""

    domains: tuple[str, ...]
    train: tuple[Tensor, ...]
    """[N] each, of the tokenizer's dtype."""
    held_out: tuple[Tensor, ...]
    """[N] each: whole documents of which no part is in `train`."""
    train_mask: tuple[Tensor, ...]
    """[N] bool each: which tokens are learnt; all of plain text, the assistant's words of a chat."""
    held_out_mask: tuple[Tensor, ...]
    fingerprint: str
    """sha256 of every name and tensor above."""


class Part(NamedTuple):
    """The tokens [N] of one side of one domain, and the bool mask [N] of those that are learnt."""

    tokens: Tensor
    mask: Tensor


class Document(NamedTuple):
    """Text that is kept or held out as a whole."""

    text: str
    key: str
    """What decides which: documents with the same key always go together."""


def build(domains: Sequence[str], train: Sequence[Part], held_out: Sequence[Part]) -> Corpus:
    """A corpus of one part a domain on each side, with its fingerprint."""
    digest = hashlib.sha256()
    for domain, *parts in zip(domains, train, held_out, strict=True):
        for tensor in (tensor for part in parts for tensor in part):
            digest.update(f"{domain!r} {tensor.dtype} {len(tensor)}\n".encode())
            digest.update(tensor.numpy().tobytes())
    return Corpus(
        domains=tuple(domains),
        train=tuple(part.tokens for part in train),
        held_out=tuple(part.tokens for part in held_out),
        train_mask=tuple(part.mask for part in train),
        held_out_mask=tuple(part.mask for part in held_out),
        fingerprint=digest.hexdigest(),
    )


def byte_tensor(data: bytes) -> Tensor:
    """Bytes as uint8 [N]."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def plain_part(tokens: Tensor) -> Part:
    """Tokens [N] that are all learnt."""
    return Part(tokens, torch.ones(tokens.shape, dtype=torch.bool))


def rank(text: str) -> float:
    """A number in [0, 1) that the text alone decides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def check_share(where: str, held_out: float) -> None:
    """Raise `ValueError` unless `0 <= held_out < 1`."""
    check.require(0 <= held_out < 1, f"{where}: expected 0 <= held_out={held_out!r} < 1.")


def embedded_corpus(*, bytes_per_domain: int, held_out: float, seed: int) -> Corpus:
    """Bytes of the four domains `python`, `english`, `c` and `arithmetic` that every machine has.

    Args:
        bytes_per_domain: bytes to train on, exactly, in each domain; no document gives more than an eighth of them.
        held_out: bytes to hold out, exactly, as a share of `bytes_per_domain`, by whole documents: the hash of its
            content decides on which side a document is, so the sides do not change with the sizes.
        seed: of the arithmetic. The other domains depend on the Python and torch installed: compare fingerprints.

    Raises:
        ValueError: an argument is out of range, or a domain has too little text.
    """
    check.at_least("embedded_corpus", "bytes_per_domain", bytes_per_domain, 1)
    check_share("embedded_corpus", held_out)
    sizes = (bytes_per_domain, round(bytes_per_domain * held_out))
    sides = [[plain_part(byte_tensor(side)) for side in _fill(name, sizes, held_out, seed)] for name in DOMAINS]
    return build(DOMAINS, [train for train, _ in sides], [held for _, held in sides])


def _fill(domain: str, sizes: tuple[int, int], held_out: float, seed: int) -> tuple[bytes, bytes]:
    """Documents of a domain until the training bytes and the held-out bytes are full."""
    sides = (bytearray(), bytearray())
    for document in documents(domain, seed=seed):
        side = int(rank(document.key) < held_out)
        if len(sides[side]) < sizes[side]:
            data, most = document.text.encode(), -(-sizes[side] // 8)
            sides[side].extend(data if len(data) <= most else data[: data.rfind(b"\n", 0, most) + 1 or most])
        if all(len(got) >= size for got, size in zip(sides, sizes, strict=True)):
            return bytes(sides[0][: sizes[0]]), bytes(sides[1][: sizes[1]])
    raise ValueError(
        f"embedded_corpus: the domain {domain!r} has too little text on this machine: "
        f"{len(sides[0])} of {sizes[0]} bytes to train on, {len(sides[1])} of {sizes[1]} to hold out."
    )


def documents(domain: str, *, seed: int) -> Iterator[Document]:
    """The documents of one of `DOMAINS`, read lazily; `arithmetic` never ends and alone depends on `seed`.

    Guarantees: the same machine and seed give the same documents in the same order. A file's source and the prose of
    its docstrings share a key. No paragraph of `english` comes twice.
    """
    if domain == "arithmetic":
        return _arithmetic(random.Random(seed))
    library = Path(torch.__file__).parent
    if domain == "c":
        sources = itertools.chain(_files(Path(sysconfig.get_path("include")), ".h"), _files(library / "include", ".h"))
    else:
        sources = itertools.chain(_files(Path(sysconfig.get_path("stdlib")), ".py"), _files(library, ".py"))
    return _english(sources) if domain == "english" else (Document(text.strip("\n") + "\n\n", text) for text in sources)


def _files(root: Path, suffix: str) -> Iterator[str]:
    """The texts of the files below `root`, if it is there; what cannot be read, is not UTF-8 or blank, is skipped."""
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        paths += [Path(folder, name) for name in names if name.endswith(suffix)]
    for path in sorted(paths, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip() and not path.name.startswith("_sysconfigdata"):
            yield text


def _english(sources: Iterable[str]) -> Iterator[Document]:
    """The prose of a topic after that of each source, as long as there are topics."""
    remaining = iter(sorted(topics.values(), key=rank))
    seen: set[str] = set()
    for source in sources:
        texts = [(source, _docstrings(source)), *((topic, iter([topic])) for topic in itertools.islice(remaining, 1))]
        for key, parts in texts:
            fresh = dict.fromkeys(prose for part in parts for prose in _prose(part) if prose not in seen)
            seen.update(fresh)
            yield Document("".join(f"{prose}\n\n" for prose in fresh), key)


def _docstrings(source: str) -> Iterator[str]:
    """The docstrings of a module, its classes and functions; none if they are few or the source cannot be parsed."""
    if sum(map(len, source.split('"""')[1::2])) < 0.2 * len(source):  # parsing takes the time: only where it pays
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = ast.parse(source)
        except (SyntaxError, ValueError):
            return
    pending: list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = [module]
    while pending:
        node = pending.pop()
        pending += [n for n in node.body if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
        if docstring := ast.get_docstring(node):
            yield docstring


def _prose(text: str) -> Iterator[str]:
    """The dedented paragraphs of `text` that are sentences: not code, doctests, tables, titles or markup."""
    for paragraph in map(inspect.cleandoc, re.split(r"\n\s*\n", inspect.cleandoc(text))):
        words = WORD.findall(paragraph)
        sentence = len(words) >= 6 and sum(map(len, words)) > 0.7 * len(paragraph) and SENTENCE_END.search(paragraph)
        plain = "..." not in paragraph and "::" not in paragraph
        if sentence and plain and len(CODE.findall(paragraph)) <= 0.04 * len(paragraph):
            yield paragraph


def _arithmetic(rng: random.Random) -> Iterator[Document]:
    """Lines such as `37 + 45 = 82`, `12 - 40 = -28`, `7 * 86 = 602`, `97 / 8 = 12 r 1`, `3 < 21`, `4 + 9 - 2 = 11`."""

    def number(*limits: int) -> int:
        return int(rng.random() * rng.choice(limits))

    while True:
        a, b = number(10, 100, 1000), number(10, 100, 1000)
        kind = number(6)
        if kind == 0:
            line = f"{a} + {b} = {a + b}"
        elif kind == 1:
            line = f"{a} - {b} = {a - b}"
        elif kind == 2:
            a, b = number(10, 100), number(10, 100)
            line = f"{a} * {b} = {a * b}"
        elif kind == 3:
            b = 1 + number(9, 20)
            line = f"{a} / {b} = {a // b} r {a % b}"
        elif kind == 4:
            line = f"{a} {'<' if a < b else '>' if a > b else '='} {b}"
        else:
            total = number(10, 100)
            line = f"{total}"
            for _ in range(2 + number(2)):
                sign, term = rng.choice((1, -1)), number(10, 100)
                line, total = f"{line} {'+' if sign > 0 else '-'} {term}", total + sign * term
            line = f"{line} = {total}"
        yield Document(f"{line}\n", line)
