"""The fuzzer: what its guard forbids, that it finds and shortens what is planted, and that no target is broken."""

from __future__ import annotations

import base64
import pickle
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from experiments import fuzz, fuzz_mutations, fuzz_targets
from experiments.fuzz import Finding, Options, Trial
from experiments.fuzz_guard import Escape, Guard
from experiments.fuzz_targets import Target
from onn import storage

TARGETS = fuzz_targets.targets()


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    before = signal.signal(signal.SIGPROF, fuzz.out_of_time)
    folder = tmp_path_factory.mktemp("fuzz") / "folder"
    folder.mkdir()
    yield Guard(folder)
    setattr(storage, "safe_open", safe_open)  # noqa: B010
    signal.signal(signal.SIGPROF, before)


@pytest.fixture
def folder(guard: Guard) -> Path:
    return guard.folder


ESCAPES: dict[str, Callable[[Path], object]] = {
    "reads beside the folder": lambda folder: (folder.parent / "x").read_bytes(),
    "reads through a path trick": lambda folder: (folder / ".." / "x").read_bytes(),
    "writes beside the folder": lambda folder: (folder.parent / "y").touch(),
    "lists beside the folder": lambda folder: list(folder.parent.iterdir()),
    "opens a socket": lambda folder: socket.socket(),
    "looks a name up": lambda folder: socket.getaddrinfo("localhost", 80),
    "starts a process": lambda folder: subprocess.run([sys.executable, "-c", ""], check=False),
    "runs code": lambda folder: exec("1 + 1"),
    "evaluates code": lambda folder: eval("2 + 2"),
    "imports": lambda folder: __import__("antigravity"),
    "unpickles": lambda folder: pickle.loads(b"cos\nsystem\n."),
    "maps a file beside the folder": lambda folder: storage.headers([folder.parent / "outside.safetensors"]),
}


@pytest.mark.parametrize("name", ESCAPES)
def test_the_guard_refuses_what(guard: Guard, folder: Path, name: str) -> None:
    (folder.parent / "outside.safetensors").write_bytes(TARGETS["tree"].seeds[0])
    with pytest.raises(Escape), guard.armed(learning=False):
        ESCAPES[name](folder)


def test_the_guard_refuses_what_a_parser_swallows(guard: Guard, folder: Path) -> None:
    with pytest.raises(Escape), guard.armed(learning=False), suppress(BaseException):
        ESCAPES["reads beside the folder"](folder)


def test_the_guard_allows_the_folder_and_what_valid_input_compiled(guard: Guard, folder: Path) -> None:
    with guard.armed(learning=True):
        assert eval("3 + 3") == 6
    with guard.armed(learning=False):
        (folder / "inside").write_bytes(b"x")
        assert (folder / "inside").read_bytes() == b"x"
        assert eval("3 + 3") == 6


def planted(folder: Path) -> object:
    text = (folder / "file").read_text(errors="replace")
    if "bad" in text:
        raise KeyError("planted")
    if "mute" in text:
        raise ValueError("something is wrong")
    if "say" in text:
        raise ValueError("file: not this")
    return text


PLANTED = Target("file", planted, [b"good"], fuzz_mutations.line_text, 10)


def test_outcomes_are_told_apart_and_a_finding_is_shortened(guard: Guard, folder: Path) -> None:
    trial = Trial(PLANTED, guard, folder)
    assert trial.outcome(b"good") == "accepted"
    assert trial.outcome(b"I say so") == "refused"
    unnamed = trial.outcome(b"mute")
    assert isinstance(unnamed, Finding)
    assert unnamed.message == "something is wrong"
    for data in (b"good", b"x" * 50 + b"bad" + b"y" * 50, b"say"):
        trial.note(data)
    assert trial.counts == {"inputs": 3, "accepted": 1, "refused": 1}
    (found,) = trial.findings.values()
    assert found.signature.startswith("KeyError")
    assert base64.b64decode(trial.minimised(found).input) == b"bad"


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_valid_files_are_accepted_and_mutated_ones_accepted_or_refused(guard: Guard, folder: Path, name: str) -> None:
    target = TARGETS[name]
    trial, rng = Trial(target, guard, folder), random.Random(0)
    for seed in target.seeds:
        assert trial.outcome(seed) == "accepted"
    for _ in range(8 if name == "tokenizer" else 60):
        trial.note(target.mutate(rng.choice(target.seeds), rng))
    assert not trial.findings
    assert trial.counts["refused"] > 0


@given(seed=st.integers(0, 2**32), name=st.sampled_from(sorted(TARGETS)), data=st.binary(max_size=200))
def test_mutations_repeat_and_take_any_bytes(seed: int, name: str, data: bytes) -> None:
    target = TARGETS[name]
    for start in (data, target.seeds[0]):
        first, second = (target.mutate(start, random.Random(seed)) for _ in range(2))
        assert first == second


def test_names_and_options_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(fuzz.NAMES) == sorted(TARGETS)
    assert fuzz.main(Options(target=("nothing",))) == 2
    assert fuzz.main(Options(inputs=0)) == 2
    assert fuzz.main(Options(replay="AA==")) == 2
    assert capsys.readouterr().err.count("error: ") == 3


def test_there_are_at_least_a_hundred_thousand_inputs() -> None:
    assert sum(target.inputs for target in TARGETS.values()) >= 100_000
