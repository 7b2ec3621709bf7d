"""The page of one small real run."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import page, run
from experiments.page_blocks import Text, escape, html_of, markdown
from tests.test_run import SIZES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "first"
    assert run.main(["--out", str(path), *SIZES]) == 0
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


class Tags(HTMLParser):
    """Tags that are open, what the page would load, and its words."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.pictures_without_words = 0
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.scripts += tag == "script"
        self.pictures_without_words += tag == "img" and not given.get("alt")
        if tag in ("img", "script", "link", "iframe", "object", "embed", "source"):
            self.loads += [value for name in ("src", "href", "data") if (value := given.get(name))]


def parsed(path: Path) -> tuple[Tags, str]:
    text, tags = path.read_text(encoding="utf-8"), Tags()
    tags.feed(text)
    return tags, text


def test_a_page_needs_no_other_file_and_tells_every_part(folder: Path) -> None:
    tags, text = parsed(folder / "report.html")
    assert all(address.startswith("data:") for address in tags.loads)
    assert not re.search(r"url\((?!['\"]?(data:|#))", text)
    assert tags.pictures_without_words == 0
    for part in ("Held-out loss", "Domains", "Thresholds of the experts", "Predictive integrity, PI"):
        assert part in text
    for word in ("corpus_fingerprint", "checkpoint", "seconds", "born"):
        assert word in text.lower()


def test_the_same_files_give_the_same_page(copy: Path) -> None:
    first = page.write_page(copy).read_bytes()
    assert page.write_page(copy).read_bytes() == first


def test_text_of_a_run_never_becomes_markup(copy: Path) -> None:
    path = copy / "summary.json"
    summary = json.loads(path.read_text())
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\x00\ud800"
    summary["samples"] = {"<b>python</b>": evil}
    path.write_text(json.dumps(summary))
    before, _ = parsed(copy / "report.html")
    page.write_page(copy)
    after, text = parsed(copy / "report.html")
    assert after.scripts == before.scripts
    assert "<img src=x" not in text
    assert "<b>python</b>" not in text
    assert escape(evil) in text


@given(st.text())
def test_escaped_text_holds_no_markup_and_can_be_written(text: str) -> None:
    written = html_of([Text(text)])
    inside = written.removeprefix("<p>").removesuffix("</p>").strip()
    assert not re.search(r"<(?!/?(code|strong)>)", inside)
    written.encode()
    "\n".join(markdown([Text(text)]))


def test_a_run_that_was_stopped_has_a_page_too(copy: Path) -> None:
    for name in ("summary.json", "report.html", "config.json"):
        (copy / name).unlink()
    _, text = parsed(page.write_page(copy))
    assert "<svg" in text
    assert page.main([str(copy)]) == 0


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage"])
def test_a_folder_without_a_run_is_refused_in_one_line(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if damage != "missing":
        (tmp_path / "metrics.jsonl").write_bytes(b"" if damage == "empty" else b"\xff\xfe[\n")
    assert page.main([str(tmp_path)]) in ((2,) if damage != "empty" else (0, 2))
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("\n") <= 1
