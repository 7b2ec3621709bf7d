"""Products of the active pairs of a bank on a CPU by native code, which reads the rows of tokens where they are.

It is compiled once for a machine and dtype, in some seconds, and kept in the user's cache. Where there is no C++
compiler that takes it (GCC 12 or later, or Clang) other backends do the same.

Shape letters: T tokens, H hidden, E experts, I expert intermediate size, R pairs sorted by expert and then by token.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

import torch
from torch import Tensor

from onn.functional.types import Local, Residuals, reduction_dtype

_NUMBERS: Final = MappingProxyType({torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16"})
_FLAGS: Final = ("-std=c++20", "-O2", "-march=native", "-fopenmp", "-shared", "-fPIC")
_SOURCES: Final = tuple(Path(__file__).with_name(name) for name in ("native.cpp", "lanes.h", "work.h", "amx.h"))


class Segments(NamedTuple):
    """Which rows of tokens belong to which expert."""

    token: Tensor
    """[R] int64: the row of each pair."""
    ends: Tensor
    """[E] int64: where the pairs of each expert end."""


def why_not(dtype: torch.dtype, *, device: str) -> str:
    """Why there is no native code for tensors of this kind; nothing where there is."""
    if device != "cpu" or dtype not in _NUMBERS:
        return f"there is none for {dtype} on {device}"
    built = _built(_NUMBERS[dtype])
    return built if isinstance(built, str) else ""


torch.compiler.assume_constant_result(why_not)


def available(dtype: torch.dtype, *, device: str) -> bool:
    """Whether there is native code for tensors of this kind."""
    return not why_not(dtype, device=device)


def project(x: Tensor, matrices: Sequence[Tensor], segments: Segments) -> list[Tensor]:
    """`matrix_e x_t` of each pair: [T, H] and [E, I, H] to [R, I], for every matrix."""
    E, I, H = matrices[0].shape
    out = [x.new_empty(len(segments.token), I) for _ in matrices]
    _call("project", x.dtype, len(out), x.contiguous(), _each(matrices), *segments, E, I, H, _each(out))
    return out


def combine(products: Sequence[tuple[Tensor, Tensor]], segments: Segments, into: Tensor) -> None:
    """Add the sums over products and experts of [R, I] times [E, I, H] to the tokens, `into` [T, H]."""
    rows, matrices = zip(*products, strict=True)
    E, I, H = matrices[0].shape
    assert into.is_contiguous()
    wide = [one.to(into.dtype) for one in rows]
    number, tokens = len(products), len(into)
    _call("combine", matrices[0].dtype, number, _each(wide), _each(matrices), *segments, E, I, H, tokens, into)


def outer(x: Tensor, products: Sequence[tuple[Tensor, Tensor]], segments: Segments) -> None:
    """Sums of the outer products of rows [R, I] and x [T, H] by expert, into [E, I, H]."""
    rows, out = zip(*products, strict=True)
    E, I, H = out[0].shape
    assert all(one.is_contiguous() for one in out)
    wide = [one.to(reduction_dtype(x.dtype)) for one in rows]
    _call("outer", x.dtype, len(products), _each(wide), x.contiguous(), *segments, E, I, H, _each(out))


def local(residuals: Residuals, u: Tensor) -> tuple[Local, Tensor, Tensor]:
    """The unit gradients [R, I], `sum a u` [R, 1], and `||(c1, c3)||` and `||a||` [R, 2], float32 at least."""
    R, I = u.shape
    wide = reduction_dtype(u.dtype)
    c1, c3, a = (u.new_empty(R, I, dtype=wide) for _ in range(3))
    inner, norms = (u.new_empty(R, size, dtype=wide) for size in (1, 2))
    _call("local", u.dtype, *(rows.contiguous() for rows in (*residuals, u)), R, I, c1, c3, a, inner, norms)
    return Local(c1, c3, a), inner, norms


def lengths(rows: Tensor) -> Tensor:
    """The norm of each row [R, H], float32 at least."""
    out = rows.new_empty(len(rows), dtype=reduction_dtype(rows.dtype))
    _call("lengths", rows.dtype, rows.contiguous(), *rows.shape, out)
    return out


def least(surprise: Tensor, token: Tensor, *, tokens: int, min_k: int, dtype: torch.dtype) -> Tensor:
    """Which pairs [R] of a bank of this dtype are among the `min_k` of least surprise of their token: bool [R].

    As `min_k_mask` chooses.
    """
    keep = torch.empty_like(surprise, dtype=torch.bool)
    _call("least", dtype, surprise.contiguous(), token, len(token), tokens, min_k, keep)
    return keep


class _Pointers(NamedTuple):
    """Of contiguous tensors, which are held until they have been read."""

    array: ctypes.Array[ctypes.c_void_p]
    held: list[Tensor]


def _each(tensors: Sequence[Tensor]) -> _Pointers:
    held = [tensor.contiguous() for tensor in tensors]
    return _Pointers((ctypes.c_void_p * len(held))(*(tensor.data_ptr() for tensor in held)), held)


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | _Pointers | int) -> None:
    library = _built(_NUMBERS[dtype])
    if isinstance(library, str):
        raise RuntimeError(f"native code: {library}.")
    getattr(library, f"onn_{name}")(*map(_argument, (torch.get_num_threads(), *arguments)))


def _argument(value: Tensor | _Pointers | int) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.Array[ctypes.c_void_p]:
    match value:
        case Tensor():
            return ctypes.c_void_p(value.data_ptr())
        case _Pointers():
            return value.array
    return ctypes.c_int64(value)


@cache
def _built(number: str) -> ctypes.CDLL | str:
    """The library for one type of numbers, or why there is none."""
    names = (os.environ.get("CXX", ""), "g++", "clang++")
    compiler = next((path for name in names if name and (path := shutil.which(name))), None)
    if compiler is None:
        return "there is no C++ compiler"
    try:
        return ctypes.CDLL(str(_compiled(compiler, number)))
    except subprocess.CalledProcessError as error:
        return f"{compiler} does not compile it: {error.stderr.decode(errors='replace').strip()[:500]}"
    except (OSError, RuntimeError) as error:  # no home is a RuntimeError
        return f"it cannot be kept or loaded: {error}"


def _compiled(compiler: str, number: str) -> Path:
    """The file of a library, made where this compiler has not made it for this machine's instructions yet."""
    machine = _output(compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    key = hashlib.sha256(b"\0".join((machine, " ".join((*_FLAGS, number)).encode(), *map(Path.read_bytes, _SOURCES))))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onn"
    target = folder / f"{key.hexdigest()[:32]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as room:
            made = Path(room) / target.name
            _output(compiler, *_FLAGS, f"-DONN_NUMBER={number}", str(_SOURCES[0]), "-o", str(made))
            made.replace(target)
    return target


def _output(*command: str) -> bytes:
    return subprocess.run(command, capture_output=True, check=True).stdout
