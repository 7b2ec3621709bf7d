"""The page from folders that are odd, damaged or hostile."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments import page
from experiments.evaluate import DomainFigures, Evaluation, SparseFigures
from experiments.page_blocks import Bullets, Details, Files, Literal, Picture, Piece, Table, Text, html_of, markdown
from experiments.page_data import EXPERTS, read_run, write_experts
from experiments.page_figures import relative_surprise, relative_usage
from onn.observe import Json, encode, write_json
from tests.runs import look, write_run

VOID = ("meta", "img", "input", "br")
HOSTILE = "</pre><script>alert(1)</script>&amp;\"'><img src=x onerror=y>`**$x_1$\x00\x1b[31m\ud800 é ⟹"


class Reader(HTMLParser):
    """The tags of a page with their attributes, its text, and that every tag is closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def names(self) -> list[str]:
        return [tag for tag, _ in self.tags]


def assert_self_contained(text: str) -> Reader:
    """A page needs no other file, has unique ids, and says in words what its pictures show."""
    reader = Reader(text)
    assert not {"link", "iframe", "object", "embed", "base"} & set(reader.names)
    for tag, attributes in reader.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name == "src" or (name in ("href", "xlink:href") and tag != "a"):
                assert value is not None
                assert value.startswith(("data:image/png;base64,", "#")), (tag, value[:60])
        if tag in ("svg", "img") or attributes.get("role") == "img":
            assert attributes.get("alt") or attributes.get("aria-label"), tag
    ids = [value for _, attributes in reader.tags if (value := attributes.get("id"))]
    used = re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text)
    assert len(set(ids)) == len(ids)
    assert used
    assert set(used) <= set(ids)
    for figure in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(figure.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))
    return reader


def test_text_of_a_run_is_never_markup(tmp_path: Path) -> None:
    """Text that tries to be stands everywhere in one run, and harmless text in the other: the tags are the same."""
    tags = []
    for name, text in (("a", "x\ny"), ("b", HOSTILE + "\ny")):
        changes: dict[str, Json] = {"samples": {text: text}, "command": text, "versions": {text: text}, text: text}
        changes["per_domain"] = {text: {"loss": 1.0, text: 2.0}}
        run = write_run(tmp_path / name, changes, steps=2)
        write_json(run / "config.json", {"seed": text, text: [text]})
        (run / "trace.jsonl").unlink()
        (run / EXPERTS).unlink()
        (run / ("y&<b>.txt" if name == "b" else "y.txt")).write_text("")
        reader = assert_self_contained(page.write_page(run).read_text(encoding="utf-8"))
        tags.append([tag for tag in reader.names if tag not in ("code", "strong")])
    assert tags[0] == tags[1]
    assert "<script>alert(1)</script>" in reader.text


@given(st.text() | st.text(alphabet="<>&\"'`*|\\\n[]()#-! ab"))
def test_every_piece_shows_its_text_and_nothing_else(text: str) -> None:
    pieces: list[Piece] = [
        *(Text(text), Bullets([text]), Table((text, text), [(text, text)]), Literal(text, text)),
        *(Details(text, [Text(text)]), Files([(text, "1")]), Picture(text, text, text)),
    ]
    known = {"p", "ul", "li", "h3", "h4", "pre", "details", "summary", "a", "img", "code", "strong"}
    assert set(Reader(html_of(pieces)).names) <= known | {"div", "table", "thead", "tbody", "tr", "th", "td"}
    shown = [letter for letter in text if letter.isalnum()]
    assert [letter for letter in Reader(html_of([Text(text)])).text if letter.isalnum()] == shown
    assert all(isinstance(line, str) for line in markdown(pieces))


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    written = page.write_page(write_run(tmp_path / "run", finished=False)).read_text(encoding="utf-8")
    text = " ".join(assert_self_contained(written).text.split())
    assert "This run has not finished: 36 steps are recorded so far." in text
    assert not {"Held-out loss", "Samples"} & set(re.findall(r"<h2>(.*?)</h2>", written))


def test_skipped_steps_births_and_checkpoints_are_listed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"resumed_from": ["moe-000001"]}, steps=2)
    (folder / "checkpoints" / "moe-000002").mkdir(parents=True)
    lines = [
        {"step": 2, "phase": "moe", "loss": 1.0, "skipped": True, "reborn": 0},
        {"step": 3, "phase": "moe", "loss": 1.0, "skipped": False, "reborn": 2, "born": [[0, 7], [1, 11]]},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = Reader(page.write_page(folder).read_text(encoding="utf-8")).text
    for part in ("1: moe 2", "moe-000001", "moe-000002", "0/7, 1/11"):
        assert part in text, part


def test_damaged_looks_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=4)
    good = (folder / "trace.jsonl").read_text()
    (folder / "trace.jsonl").write_text("{\n" + good + "[1]\n" + good[:40])
    run = read_run(folder)
    assert run.damaged == 2
    assert run.looks is not None
    assert run.looks.steps == (4, 6)
    assert "damaged, and left out here" in page.write_page(folder).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("metrics.jsonl", None, "there is no metrics.jsonl"),
        ("metrics.jsonl", "{\n", "metrics.jsonl, line 1"),
        ("metrics.jsonl", '{"step": 1}\n', "record 0 lacks"),
        ("config.json", "[]", "config.json: expected an object"),
        ("summary.json", '{"a": NaN}', "summary.json: NaN"),
        ("summary.json", "{}{", "summary.json: "),
        ("summary.json", '{"pi": 1}', "summary: missing key 'final_loss'"),
        ("experts.json", '{"domains": ["a"], "usage": [[1, "b"]], "surprise": [[1]]}', "experts.json, usage"),
        ("experts.json", '{"domains": ["a"], "usage": [[1]], "surprise": [[1]]}', "experts.json"),
        ("experts.json", '{"domains": [], "usage": [[[1]]], "surprise": [[1]]}', "expected 1 domains, got 0"),
        ("trace.jsonl", '{"phase": "moe", "step": 1, "surprise": [[1], [1, 2]]}\n', "trace.jsonl, look 0, surprise"),
        ("trace.jsonl", encode(look(1) | {"active": [[1]]}, indent=None) + "\n", r"trace.jsonl: expected tables"),
    ],
)
def test_bad_input_is_one_line_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: str | None, words: str
) -> None:
    folder = write_run(tmp_path / "run", steps=2)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    assert page.main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error), error
    assert error.count("\n") == 1
    assert not (folder / page.PAGE).exists()


def test_ratios_are_to_the_mean_of_the_layer(tmp_path: Path) -> None:
    looks = read_run(write_run(tmp_path / "run")).looks
    assert looks is not None
    surprise, usage = relative_surprise(looks), relative_usage(looks)
    for row, ratio, share in zip(*(table.flatten(0, 1) for table in (looks.surprise, surprise, usage)), strict=True):
        seen = [value for value in row.tolist() if value == value]
        mean = sum(seen) / len(seen)
        assert [value * mean for value in ratio.tolist() if value == value] == pytest.approx(seen)
        assert torch.equal(ratio.isnan(), share.isnan())
    assert float(usage[0, 0].nansum()) == pytest.approx(usage.shape[2])


def test_usage_of_an_evaluation_is_kept(tmp_path: Path) -> None:
    counts = torch.tensor([[3, 0], [1, 2]])
    rates = {"surprise": 0.1, "pi": 0.4, "active_share": 0.5, "gate_accuracy": 0.2, "gate_chance": 0.1}
    sparse = SparseFigures(batches=1, routed=counts, active=counts, surprise_sum=counts / 2, **rates)
    figures = DomainFigures(targets=4, loss=1.0, accuracy=0.5, tau=1.0, sparse=sparse)
    write_run(tmp_path / "run", steps=1, finished=False)
    write_experts(tmp_path / "run", Evaluation(domains=("a", "b"), figures=(figures, figures)))
    found = read_run(tmp_path / "run").experts
    assert found is not None
    assert found.domains == ("a", "b")
    assert found.usage.tolist() == [[[3, 0], [3, 0]], [[1, 2], [1, 2]]]
    assert found.surprise.isnan().tolist() == [[False, True], [False, False]]
    assert found.surprise.nan_to_num().tolist() == [[0.5, 0.0], [0.5, 0.5]]
