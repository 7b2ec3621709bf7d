from __future__ import annotations

import ast
import itertools
import operator
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onn import corpus
from onn.corpus import DOMAINS, Corpus, Document, Part, embedded_corpus
from tests.support import assert_same

SIZE, SHARE = 4000, 0.2


@pytest.fixture(scope="module")
def embedded() -> Corpus:
    return embedded_corpus(bytes_per_domain=SIZE, held_out=SHARE, seed=0)


def text(tokens: Tensor) -> str:
    return bytes(tokens.tolist()).decode(errors="replace")


def first(domain: str, number: int) -> list[Document]:
    return list(itertools.islice(corpus.documents(domain, seed=0), number))


@pytest.mark.parametrize(("size", "share"), [(1, 0.0), (7, 0.0), (1000, 0.0), (1000, 0.123), (500, 0.9)])
def test_sizes_are_exact_to_the_byte_in_four_domains(size: int, share: float) -> None:
    got = embedded_corpus(bytes_per_domain=size, held_out=share, seed=3)
    assert got.domains == DOMAINS == ("python", "english", "c", "arithmetic")
    for sides, expected in (((got.train, got.train_mask), size), ((got.held_out, got.held_out_mask), size * share)):
        for tokens, mask in zip(*sides, strict=True):
            assert (tokens.dtype, mask.dtype) == (torch.uint8, torch.bool)
            assert len(tokens) == len(mask) == round(expected)
            assert bool(mask.all())


def test_every_domain_is_what_it_is_called(embedded: Corpus) -> None:
    python, english, c, arithmetic = map(text, embedded.train)
    assert re.search(r"^ *(def|class|import|from) ", python, re.MULTILINE)
    assert re.search(r"^#\s*(define|include|if)", c, re.MULTILINE)
    assert re.search(r"\bthe\b.*\bof\b", english, re.DOTALL)
    assert set(arithmetic) <= set("0123456789+-*/<>=r \n")


def test_the_same_arguments_give_the_same_corpus(embedded: Corpus) -> None:
    again = embedded_corpus(bytes_per_domain=SIZE, held_out=SHARE, seed=0)
    assert again.fingerprint == embedded.fingerprint
    for side in ("train", "held_out", "train_mask", "held_out_mask"):
        assert_same(getattr(again, side), getattr(embedded, side))


def test_the_seed_changes_the_arithmetic_alone(embedded: Corpus) -> None:
    other = embedded_corpus(bytes_per_domain=SIZE, held_out=SHARE, seed=1)
    assert other.fingerprint != embedded.fingerprint
    for side in ("train", "held_out"):
        pairs = zip(getattr(other, side), getattr(embedded, side), strict=True)
        assert [torch.equal(a, b) for a, b in pairs] == [True, True, True, False]


@given(
    sizes=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    place=st.integers(0, 3),
    kind=st.sampled_from(["token", "mask", "length", "dtype"]),
)
def test_the_fingerprint_changes_with_every_token_mask_length_and_dtype(
    sizes: list[int], place: int, kind: str
) -> None:
    parts = [Part(torch.arange(size, dtype=torch.uint8), torch.ones(size, dtype=torch.bool)) for size in sizes]

    def fingerprint(parts: list[Part]) -> str:
        return corpus.build(["a", "b"], parts[:2], parts[2:]).fingerprint

    tokens, mask = parts[place]
    changed = {
        "token": Part(tokens ^ torch.tensor([*[0] * (len(tokens) - 1), 1], dtype=torch.uint8), mask),
        "mask": Part(tokens, mask & (tokens > 0)),
        "length": Part(torch.cat([tokens, tokens[:1]]), torch.cat([mask, mask[:1]])),
        "dtype": Part(tokens.to(torch.int8), mask),
    }[kind]
    before = fingerprint(parts)
    assert fingerprint(parts) == before
    assert fingerprint([*parts[:place], changed, *parts[place + 1 :]]) != before
    assert corpus.build(["a", "c"], parts[:2], parts[2:]).fingerprint != before


def test_the_fingerprint_tells_apart_the_sides_and_where_a_domain_ends() -> None:
    def part(*tokens: int) -> Part:
        return corpus.plain_part(torch.tensor(tokens, dtype=torch.uint8))

    one = corpus.build(["a", "b"], [part(1, 2), part(3)], [part(4), part(5)])
    for train, held_out in (
        ([part(1), part(2, 3)], [part(4), part(5)]),
        ([part(4), part(5)], [part(1, 2), part(3)]),
        ([part(1, 2), part(3)], [part(5), part(4)]),
    ):
        assert corpus.build(["a", "b"], train, held_out).fingerprint != one.fingerprint


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_hash_of_a_document_decides_its_side_whatever_the_sizes(
    domain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = first(domain, 60)
    sides: dict[str, set[str]] = {}

    def marked(domain: str, *, seed: int) -> Iterator[Document]:
        """Documents that are told by one letter each, of the keys of the real ones."""
        for number, document in enumerate(source):
            yield Document(chr(0x4E00 + number) * 200 + "\n", document.key)

    monkeypatch.setattr(corpus, "DOMAINS", (domain,))
    monkeypatch.setattr(corpus, "documents", marked)
    for size in (400, 2000, 4001):
        got = embedded_corpus(bytes_per_domain=size, held_out=0.3, seed=0)
        for side, tokens in (("train", got.train[0]), ("held_out", got.held_out[0])):
            for letter in set(text(tokens)) - set("\n\ufffd"):
                sides.setdefault(letter, set()).add(side)
    assert {side for found in sides.values() for side in found} == {"train", "held_out"}
    assert all(len(found) == 1 for found in sides.values())
    for letter, (side,) in sides.items():
        held_out = corpus.rank(source[ord(letter) - 0x4E00].key) < 0.3
        assert held_out == (side == "held_out")


def test_held_out_lines_are_not_in_the_training_text() -> None:
    got = embedded_corpus(bytes_per_domain=20000, held_out=SHARE, seed=0)
    train, held_out = text(got.train[3]).splitlines(), text(got.held_out[3]).splitlines()
    assert len(set(train[:-1]) & set(held_out[:-1])) == 0
    english = [set(text(side[1]).split("\n\n")[:-1]) for side in (got.train, got.held_out)]
    assert min(map(len, english)) > 1
    assert not english[0] & english[1]


def test_a_source_and_the_prose_of_its_docstrings_share_a_side() -> None:
    python = {document.key for document in first("python", 40)}
    english = {document.key for document in first("english", 80) if document.text}
    assert len(python & english) > 5


def test_a_document_gives_an_eighth_at_most_and_ends_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"{number:03d}\n" for number in range(100)]
    monkeypatch.setattr(
        corpus, "documents", lambda domain, seed: (Document("".join(lines), str(key)) for key in itertools.count())
    )
    got = embedded_corpus(bytes_per_domain=110, held_out=0.0, seed=0)
    assert text(got.train[0]) == ("".join(lines[:3]) * 10)[:110]


OPERATIONS: dict[type[ast.AST], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


def value(expression: str) -> int:
    def of(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return OPERATIONS[type(node.op)](of(node.left), of(node.right))
        assert isinstance(node, ast.Constant)
        assert isinstance(node.value, int)
        return node.value

    return of(ast.parse(expression, mode="eval").body)


def holds(line: str) -> bool:
    """Whether a line of arithmetic is true, by an evaluator of its own."""
    if division := re.fullmatch(r"(\d+) / (\d+) = (\d+) r (\d+)", line):
        a, b, quotient, rest = map(int, division.groups())
        return b * quotient + rest == a and rest < b
    if comparison := re.fullmatch(r"(\d+) ([<>]) (\d+)", line):
        a, b = int(comparison[1]), int(comparison[3])
        return a < b if comparison[2] == "<" else a > b
    equation = re.fullmatch(r"([\d +*-]+) = (-?\d+)", line)
    return equation is not None and value(equation[1]) == int(equation[2])


def test_every_line_of_arithmetic_is_true_and_every_kind_comes() -> None:
    lines = [document.text.removesuffix("\n") for document in first("arithmetic", 3000)]
    assert [line for line in lines if not holds(line)] == []
    assert not holds("2 + 2 = 5")
    kinds = {re.sub(r"-?\d+", "n", line) for line in lines}
    assert kinds >= {"n + n = n", "n - n = n", "n * n = n", "n / n = n r n", "n < n", "n > n", "n = n"}
    assert any(kind.count("n") == 5 for kind in kinds)


def test_no_paragraph_of_english_comes_twice_and_each_is_prose() -> None:
    paragraphs = [
        paragraph for document in first("english", 120) for paragraph in document.text.split("\n\n") if paragraph
    ]
    assert len(paragraphs) > 200
    assert len(set(paragraphs)) == len(paragraphs)
    for paragraph in paragraphs:
        assert re.search(r"[.!?:]\W*$", paragraph), paragraph
        assert not re.search(r">>>|::|^\s*(def|class|import) ", paragraph), paragraph
        assert sum(letter.isalpha() for letter in paragraph) > 0.6 * len(paragraph), paragraph


SENTENCE = "The quick brown fox jumps over the lazy dog every day."


def prose(source: str) -> list[str]:
    return [document.text for document in corpus._english([source])][:1]


def test_docstrings_give_their_prose_and_the_rest_of_a_source_nothing() -> None:
    other, nested = SENTENCE.replace("fox", "cat"), SENTENCE.replace("fox", "bird")
    source = (
        f'"""{SENTENCE}\n\n    >>> fox(1, 2)\n    True\n\n{other}\n\nTitle only\n"""\n'
        f'# {SENTENCE}\nclass A:\n    def f(self):\n        """{nested}\n\n        {SENTENCE}"""\n'
    )
    (document,) = prose(source)
    assert document == f"{SENTENCE}\n\n{other}\n\n{nested}\n\n"
    assert prose(source + "\n\nnot python (\n") == [""]


def fake_interpreter(monkeypatch: pytest.MonkeyPatch, *, files: Path, library: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(files))
    monkeypatch.setattr(torch, "__file__", str(library / "__init__.py"))


def test_missing_headers_and_sources_fall_back_to_those_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = [document.text for document in first("c", 10**6)]
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    fallback = [document.text for document in first("c", 10**6)]
    assert 0 < len(fallback) < len(everything)
    assert everything[-len(fallback) :] == fallback
    got = embedded_corpus(bytes_per_domain=1000, held_out=0.1, seed=0)
    assert [len(tokens) for tokens in got.train] == [1000] * 4
    assert "torch" in "".join(document.text for document in first("python", 20))


def test_files_that_cannot_be_read_are_skipped_and_tests_and_caches_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_interpreter(monkeypatch, files=tmp_path, library=tmp_path / "torch")
    for name, content in (
        ("good.py", b"x = 1\n"),
        ("deep/er.py", b"y = 2\n"),
        ("latin.py", b"z = '\xe9'\n"),
        ("blank.py", b" \n"),
        ("notes.txt", b"no\n"),
        ("test/wrong.py", b"no\n"),
        ("site-packages/wrong.py", b"no\n"),
        ("__pycache__/wrong.py", b"no\n"),
        ("_sysconfigdata_x.py", b"no\n"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "dangling.py").symlink_to(tmp_path / "gone.py")
    assert sorted(document.text for document in first("python", 9)) == ["x = 1\n\n", "y = 2\n\n"]


def test_too_little_text_is_an_error_that_says_how_much_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_interpreter(monkeypatch, files=tmp_path, library=tmp_path / "torch")
    (tmp_path / "only.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"'python' has too little text on this machine: 2 of 10 bytes to train on, 0"):
        embedded_corpus(bytes_per_domain=10, held_out=0.0, seed=0)


@pytest.mark.parametrize(
    ("size", "share", "message"),
    [
        (0, 0.1, "embedded_corpus: expected bytes_per_domain=0 >= 1"),
        (10, 1.0, r"embedded_corpus: expected 0 <= held_out=1\.0 < 1"),
        (10, -0.1, r"embedded_corpus: expected 0 <= held_out=-0\.1 < 1"),
        (10, float("nan"), "embedded_corpus: expected 0 <= held_out=nan < 1"),
    ],
)
def test_numbers_out_of_range_are_refused(size: int, share: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embedded_corpus(bytes_per_domain=size, held_out=share, seed=0)
