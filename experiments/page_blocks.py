"""Pieces of a report, and what they look like in Markdown and in HTML.

Texts may hold `code` and **strong words**; everything else in them is shown as it is.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias
from urllib.parse import quote

LONGEST = 2000
"""Characters of a literal text that are shown."""


class Text(NamedTuple):
    """A paragraph."""

    text: str


class Bullets(NamedTuple):
    items: Sequence[str]


class Table(NamedTuple):
    """Texts; the first column names the rows."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Literal(NamedTuple):
    """Text of a run, shown to the character, with its name above it."""

    name: str
    text: str


class Files(NamedTuple):
    """Links to what lies in the same folder: path and size."""

    rows: Sequence[tuple[str, str]]


class Picture(NamedTuple):
    """An image of the same folder."""

    file: str
    title: str
    text: str


class Details(NamedTuple):
    """Pieces that a reader opens."""

    title: str
    pieces: Sequence[Piece]


Piece: TypeAlias = "Text | Bullets | Table | Literal | Files | Picture | Details"


def markdown(pieces: Sequence[Piece]) -> list[str]:
    """Lines, with an empty one between two pieces."""
    lines: list[str] = []
    for piece in pieces:
        lines += [*([""] if lines else []), *_markdown(piece)]
    return lines


def _markdown(piece: Piece) -> list[str]:
    match piece:
        case Text(text):
            return [text]
        case Bullets(items):
            return [f"- {item}" for item in items]
        case Table(header, rows):
            return _markdown_table(header, [[cell(text) for text in row] for row in rows])
        case Literal(name, text):
            fence = "`" * (1 + max([2, *(len(run) for run in re.findall("`+", shown(text)))]))
            return [*([f"{name}:", ""] if name else []), f"{fence}text", shown(text), fence]
        case Files(rows):
            links = [(f"[{cell(path)}]({quote(path)})", size) for path, size in rows]
            return _markdown_table(("file", "bytes"), links)
        case Picture(file, title, text):
            return [f"### {title}", "", f"![{title}]({file})", "", text]
        case Details(title, inner):
            return [f"<details><summary>{title}</summary>", "", *markdown(inner), "", "</details>"]


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = " | ".join(["---", *["---:"] * (len(header) - 1)])
    return [f"| {' | '.join(header)} |", f"| {rule} |", *(f"| {' | '.join(row)} |" for row in rows)]


def cell(text: str) -> str:
    """One line of a Markdown table's cell."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


def shown(text: str) -> str:
    """The beginning of a literal text."""
    return text if len(text) <= LONGEST else text[:LONGEST] + " [cut; all of it is in summary.json]"


def html_of(pieces: Sequence[Piece]) -> str:
    """HTML of the pieces; text of a run never becomes markup."""
    return "\n".join(_html(piece) for piece in pieces)


def _html(piece: Piece) -> str:
    match piece:
        case Text(text):
            return f"<p>{inline(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{inline(item)}</li>" for item in items) + "</ul>"
        case Table(header, rows):
            return _html_table([inline(name) for name in header], [[inline(text) for text in row] for row in rows])
        case Literal(name, text):
            return (f"<h4>{inline(name)}</h4>" if name else "") + f"<pre>{escape(shown(text))}</pre>"
        case Files(rows):
            links = [(f'<a href="{escape(quote(path))}">{escape(path)}</a>', size) for path, size in rows]
            return _html_table(("file", "bytes"), links)
        case Picture(file, title, text):
            return (
                f'<h3>{inline(title)}</h3><img src="{escape(quote(file))}" alt="{escape(title)}"><p>{inline(text)}</p>'
            )
        case Details(title, inner):
            return f"<details><summary>{inline(title)}</summary>\n{html_of(inner)}\n</details>"


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns of numbers are set to the right, and those of words to the left."""
    width = [max((len(row[place]) for row in rows), default=0) for place in range(len(header))]
    kinds = ["", *(' class="words"' * (size > 24) for size in width[1:])]
    head = "".join(f'<th scope="col"{kind}>{name}</th>' for name, kind in zip(header, kinds, strict=True))
    lines = []
    for row in rows:
        cells = "".join(f"<td{kind}>{text}</td>" for text, kind in zip(row[1:], kinds[1:], strict=True))
        lines.append(f'<tr><th scope="row">{row[0]}</th>{cells}</tr>')
    body = "\n".join(lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def inline(text: str) -> str:
    """Escaped text with its `code` and **strong words** marked up."""
    marked = re.sub(r"`([^`\n]+)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\*\*([^*\n]+)\*\*", r"<strong>\1</strong>", marked)


def escape(text: str) -> str:
    """Text for HTML: markup as text, and what no page may hold (control characters, lone surrogates) as U+FFFD."""
    return html.escape(re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text))
