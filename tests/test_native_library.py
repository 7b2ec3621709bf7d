"""The library of native code: made once, kept, and a bank without it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import onn.functional as F
from onn import tree
from onn.functional.kernels import native
from onn.functional.kernels.segments import segment_outer
from onn.functional.kernels.tilings import NATIVE, Tiling
from tests.numerics import assert_within
from tests.support import Case, assert_same, differentiate, make_case, needs_native
from tests.test_native import DTYPES, TAPS, bounded, make


@pytest.fixture
def _forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No library is loaded and none is kept; afterwards all is as it was."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native._built.cache_clear()
    yield
    native._built.cache_clear()


def compiler(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """A script is the compiler: `$OUT` is the file that it shall write, empty where it shall print macros."""
    path = folder / "compiler"
    path.write_text(
        f'#!/bin/sh\nfor word; do OUT="$LAST"; LAST="$word"; [ "$OUT" = -o ] && FILE="$word"; done\n{script}\n'
    )
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))


def absent(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)


def failing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    compiler(monkeypatch, folder, "echo 'no such header' >&2; exit 1")


def writing_nonsense(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    compiler(monkeypatch, folder, '[ -z "$FILE" ] || echo nonsense > "$FILE"')


def without_a_place(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    compiler(monkeypatch, folder, "exit 0")
    (folder / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "file"))


def homeless(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    compiler(monkeypatch, folder, "exit 0")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)


ABSENCES: Mapping[str, tuple[Callable[[pytest.MonkeyPatch, Path], None], str]] = {
    "no compiler": (absent, r"there is no C\+\+ compiler"),
    "a compiler that fails": (failing, r"compiler does not compile it: no such header"),
    "a compiler that writes nonsense": (writing_nonsense, "it cannot be kept or loaded: .*cache"),
    "no folder to keep it in": (without_a_place, "it cannot be kept or loaded: .*file"),
    "nobody's home": (homeless, "it cannot be kept or loaded: .*home"),
}


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("name", ABSENCES)
def test_without_native_code_auto_is_the_loop_and_native_an_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happen, words = ABSENCES[name]
    happen(monkeypatch, tmp_path)
    case = make_case(1, T=128, H=512, E=16, I=16, density=0.3, dtype=torch.float32)
    auto, loop = (differentiate(case, min_k=2, taps=TAPS, backend=backend) for backend in ("auto", "loop"))
    assert_same(auto, loop)
    for backend in ("native", Tiling(NATIVE, 0.5)):
        with pytest.raises(ValueError, match=rf"^bank: expected backend=.* where there is native code: .*{words}"):
            differentiate(case, min_k=2, backend=backend)
    work = make(0, (3, 0, 5), T=6, H=5, I=2, dtype=torch.float32, number=1)
    assert_within({"outer": segment_outer(work.rows[0], work.x, *work.segments)[:, None]}, bounded(work))


@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.float32), ("cpu", torch.float16)])
def test_where_there_is_no_native_code_native_is_an_error_that_says_so(device: str, dtype: torch.dtype) -> None:
    case: Case = tree.map1(lambda leaf: leaf.to(device), make_case(1, T=4, H=5, E=3, I=2, dtype=dtype))
    with pytest.raises(ValueError, match=rf"backend='native' .* native code: there is none for {dtype} on {device}"):
        F.bank(case.experts, case.x, case.weights, {}, min_k=3, backend="native")


@pytest.fixture
def translated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """A compiler in the place of the user's that makes empty libraries; how often it made one."""
    log = tmp_path / "log"
    log.touch()
    real = shutil.which("g++") or shutil.which("clang++")
    make_one = f'sleep 0.3; {real} -shared -fPIC -x c++ /dev/null -o "$FILE"; echo made >> {log}'
    compiler(monkeypatch, tmp_path, f'if [ -n "$FILE" ]; then {make_one}; fi')
    return lambda: len(log.read_text().splitlines())


@needs_native
@pytest.mark.usefixtures("_forgotten")
def test_a_library_is_made_once_for_each_dtype_and_then_read(translated: Callable[[], int], tmp_path: Path) -> None:
    for _ in range(2):
        for number, dtype in enumerate(DTYPES):
            made = translated()
            assert native.why_not(dtype, device="cpu") == ""
            assert translated() == max(made, number + 1)
        native._built.cache_clear()
    kept = list((tmp_path / "cache" / "onn").iterdir())
    assert [path.suffix for path in kept] == [".so"] * 3


@needs_native
@pytest.mark.usefixtures("_forgotten")
def test_threads_that_ask_at_once_all_get_a_library(translated: Callable[[], int], tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        why = list(pool.map(lambda _: native.why_not(torch.float64, device="cpu"), range(4)))
    assert why == [""] * 4
    assert [path.suffix for path in (tmp_path / "cache" / "onn").iterdir()] == [".so"]


@needs_native
@pytest.mark.usefixtures("_forgotten")
def test_a_kept_library_is_loaded_without_its_source_being_read_by_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[tuple[str, ...]] = []

    def output(*command: str) -> bytes:
        commands.append(command)
        return subprocess.run(command, capture_output=True, check=True).stdout

    monkeypatch.setattr(native, "_output", output)
    for calls in (2, 3):
        assert native.why_not(torch.float64, device="cpu") == ""
        assert len(commands) == calls
        native._built.cache_clear()
    assert ["native.cpp" in " ".join(command) for command in commands] == [False, True, False]
