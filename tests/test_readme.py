from __future__ import annotations

import doctest
import re
from pathlib import Path

import torch

from experiments import run

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_print_what_the_readme_says() -> None:
    torch.manual_seed(0)
    result = doctest.testfile(str(README), module_relative=False)
    assert result.attempted > 15
    assert result.failed == 0


def test_the_commands_of_the_readme_parse() -> None:
    commands = re.findall(r"^uv run experiments/run\.py *([^#\n]*)", README.read_text(), flags=re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        run.parse(command.split())


def test_the_layout_names_files_that_are_there() -> None:
    rows = re.findall(r"^\| \d \| (.*?) \|", README.read_text(), flags=re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    root = README.parent
    folder = ""
    for name in names:
        folder = str(Path(name).parent) if "/" in name else folder
        assert any((root / place / name).exists() for place in ("", folder)), name
