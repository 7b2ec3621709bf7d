"""A `map` by several processes: in order, and no process is left behind, however they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.workers import processors, workers


@pytest.mark.parametrize("count", [1, 2])
def test_items_come_back_in_their_order_and_no_process_stays(count: int) -> None:
    with workers(count) as each:
        assert list(each(abs, range(-5, 5))) == [abs(item) for item in range(-5, 5)]
    assert multiprocessing.active_children() == []
    assert 1 <= processors() <= (os.cpu_count() or 1)


def test_what_goes_wrong_with_an_item_is_told_as_it_is() -> None:
    with pytest.raises(ValueError, match="'x'"), workers(2) as each:
        list(each(int, ["1", "x"]))
    assert multiprocessing.active_children() == []


def test_a_process_that_is_killed_is_told_in_one_line_and_nothing_hangs() -> None:
    with pytest.raises(ChildProcessError, match=r"One of 2 processes ended .* fewer workers"), workers(2) as each:
        list(each(signal.raise_signal, [signal.SIGKILL]))
    assert multiprocessing.active_children() == []


BEGUN = """
import os
import time
from experiments.workers import workers

if __name__ == "__main__":
    with workers(2) as each:
        print(*each(PROCESS, [0] * 20), flush=True)
        time.sleep(600)
"""


def is_alive(process: int) -> bool:
    """It is there and has not ended: a process that ended stays as a zombie until its parent has looked."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2]
    except FileNotFoundError:
        return False
    return not state.startswith("Z")


def until(met: Callable[[], bool], *, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not met() and time.monotonic() < end:
        time.sleep(0.05)
    return met()


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_the_one_that_began_it(number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "begun.py"
    script.write_text(BEGUN.replace("PROCESS", "os.getsid"))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as begun:
        assert begun.stdout is not None
        begun.stdout.readline()
        children = [int(name) for name in Path(f"/proc/{begun.pid}/task/{begun.pid}/children").read_text().split()]
        assert len(children) >= 2
        assert all(map(is_alive, children))
        begun.send_signal(number)
    assert until(lambda: not any(map(is_alive, children)))
