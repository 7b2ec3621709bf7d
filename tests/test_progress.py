from __future__ import annotations

import io

import pytest

from experiments.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_whole_lines_without_carriage_returns() -> None:
    log = io.StringIO()
    with progress(range(5), desc="dense", unit="step", stream=log, every=0) as bar:
        for step in range(5):
            bar.set_postfix_str(f"loss {step}.5", refresh=False)
            bar.update()
    lines = log.getvalue().splitlines()
    assert not {"\r", "\x1b"} & set(log.getvalue())
    assert log.getvalue().endswith("\n")
    assert [line.split(" steps")[0] for line in lines[:6]] == [f"dense: {step} of 5" for step in range(6)]
    assert all(" gone, " in line and " left, " in line for line in lines)
    assert "loss 4.5" in lines[-1]


def test_a_log_is_not_flooded() -> None:
    log = io.StringIO()
    assert list(progress(range(5000), desc="dense", unit="step", stream=log, every=3600)) == list(range(5000))
    assert [line.split(" steps")[0] for line in log.getvalue().splitlines()] == [
        "dense: 0 of 5000",
        "dense: 5000 of 5000",
    ]


def test_a_resumed_job_begins_where_it_was() -> None:
    log = io.StringIO()
    with progress(range(10), initial=7, desc="moe", unit="step", stream=log, every=3600) as bar:
        bar.update(3)
    assert [line.split(" steps")[0] for line in log.getvalue().splitlines()] == ["moe: 7 of 10", "moe: 10 of 10"]


def test_a_terminal_gets_a_bar() -> None:
    screen = Terminal()
    assert sum(progress(range(3), desc="dense", unit="step", stream=screen)) == 3
    assert "\r" in screen.getvalue()
    assert "100%" in screen.getvalue()


def test_standard_error_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in progress(range(2), desc="dense", unit="step"):
        pass
    printed = capsys.readouterr()
    assert "dense: 2 of 2 steps" in printed.err
    assert not printed.out
