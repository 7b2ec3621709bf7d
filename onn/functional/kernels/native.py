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
_SOURCES: Final = tuple(
    Path(__file__).with_name(name) for name in ("native.cpp", "activations.h", "pairs.h", "lanes.h", "work.h", "amx.h")
)

_BLOCKS: Final = 16
"""Of tokens, in which pairs are counted and listed at once."""


class Segments(NamedTuple):
    """Which rows of tokens belong to which expert."""

    token: Tensor
    """[R] int64: the row of each pair."""
    ends: Tensor
    """[E] int64: where the pairs of each expert end."""


class Active(NamedTuple):
    """The pairs of a bank whose combine weight is not 0."""

    segments: Segments
    weight: Tensor
    """[R], float32 at least."""
    most: int
    """Pairs of a token, at most."""

    @property
    def number(self) -> int:
        """R."""
        return len(self.weight)


class Lengths(NamedTuple):
    """The norms of what the experts read and of the gradients of what they give, [T] each, float32 at least."""

    x: Tensor
    dy: Tensor


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


class Counted(NamedTuple):
    """How many pairs of a bank have a combine weight that is not 0."""

    starts: Tensor
    """Where the pairs of each expert and block of tokens begin."""
    ends: Tensor
    """[E] int64: where the pairs of each expert end."""
    most: int
    """Pairs of a token, at most."""

    @property
    def number(self) -> int:
        """R."""
        return int(self.ends[-1]) if len(self.ends) else 0


def counted(weights: Tensor) -> Counted:
    """The number of pairs whose combine weight [T, E] is not 0."""
    T, E = weights.shape
    starts, ends, most = (torch.empty(size, dtype=torch.int64) for size in (_BLOCKS * E, E, 1))
    _call("count", weights.dtype, weights.contiguous(), T, E, _BLOCKS, starts, ends, most)
    return Counted(starts, ends, most=int(most))


def listed(weights: Tensor, pairs: Counted) -> Active:
    """The pairs whose combine weight [T, E] is not 0, as `counted`, whose `starts` are used up."""
    (T, E), R = weights.shape, pairs.number
    token, weight = torch.empty(R, dtype=torch.int64), weights.new_empty(R, dtype=reduction_dtype(weights.dtype))
    _call("list", weights.dtype, weights.contiguous(), T, E, _BLOCKS, pairs.starts, token, weight)
    return Active(Segments(token, pairs.ends), weight, most=pairs.most)


def project(x: Tensor, matrices: Sequence[Tensor], segments: Segments, *, out: Sequence[Tensor]) -> None:
    """`matrix_e x_t` of each pair: [T, H] and [E, I, H] into [R, I] or more rows, for every matrix."""
    E, I, H = matrices[0].shape
    assert all(one.is_contiguous() for one in out)
    _call("project", x.dtype, len(out), x.contiguous(), _each(matrices), *segments, E, I, H, _each(out))


def combine(products: Sequence[tuple[Tensor, Tensor]], segments: Segments, *, tokens: int) -> Tensor:
    """The sums by token over products and experts of [R, I] times [E, I, H]: [T, H]."""
    rows, matrices = zip(*products, strict=True)
    E, I, H = matrices[0].shape
    out: Tensor = matrices[0].new_empty(tokens, H)
    _call("combine", out.dtype, len(products), _each(rows), _each(matrices), *segments, E, I, H, tokens, out)
    return out


def outer(x: Tensor, products: Sequence[tuple[Tensor, Tensor]], segments: Segments) -> None:
    """Sums of the outer products of rows [R, I] and x [T, H] by expert, into [E, I, H]."""
    rows, out = zip(*products, strict=True)
    E, I, H = out[0].shape
    assert all(one.is_contiguous() for one in out)
    _call("outer", x.dtype, len(products), _each(rows), x.contiguous(), *segments, E, I, H, _each(out))


def activate(residuals: Residuals, weight: Tensor) -> Tensor:
    """`weight silu(h1) h3` of [R] and [R, I] or more rows: [R, I]."""
    R, I = len(weight), residuals.h1.shape[1]
    out = residuals.h1.new_empty(R, I)
    _call("activate", out.dtype, *map(Tensor.contiguous, residuals), weight, R, I, out)
    return out


def local(
    residuals: Residuals, u: Tensor, pairs: Active, *, tokens: int, lengths: Lengths | None
) -> tuple[Local, Tensor, Tensor]:
    """What the backward pass knows of each pair.

    Args:
        residuals: [R, I] or more rows.
        u: [R, I]; its memory becomes that of `c1`.
        pairs: of `listed`; the memory of their weights becomes that of surprise, where it is measured.
        tokens: T.
        lengths: what surprise is made with; `None` measures none.

    Returns:
        `Local` times the combine weights [R, I], what these learn [T, E], and surprise [R], float32 at least: without
        entries where it is not measured.
    """
    (_, I), E, weight = u.shape, len(pairs.segments.ends), pairs.weight
    u = u.contiguous()
    rows = Local(u, *(torch.empty_like(u) for _ in range(2)))
    d_weights = u.new_zeros(tokens, E)
    held = (*map(Tensor.contiguous, residuals), u, weight, *pairs.segments)
    measured = (*(lengths or (None, None)), weight if lengths else None)
    _call("local", u.dtype, *held, E, I, *rows, d_weights, *measured)
    return rows, d_weights, weight if lengths else weight.new_empty(0)


def spread(values: Tensor, segments: Segments, *, tokens: int, dtype: torch.dtype) -> Tensor:
    """The values [R] of the pairs of a bank of this dtype, float32 at least, by token and expert: [T, E], else 0."""
    E = len(segments.ends)
    out = values.new_zeros(tokens, E)
    _call("spread", dtype, values.contiguous(), *segments, E, out)
    return out


def lengths(rows: Tensor) -> Tensor:
    """The norm of each row [R, H], float32 at least."""
    out = rows.new_empty(len(rows), dtype=reduction_dtype(rows.dtype))
    _call("lengths", rows.dtype, rows.contiguous(), *rows.shape, out)
    return out


def total(rows: Tensor, segments: Segments, *, scale: Tensor | None) -> Tensor:
    """Sums of [R, I] over the pairs of each expert, or of the squares of rows times `scale` [T]: [E, I].

    Float32 at least, as `scale` is.
    """
    (_, I), E = rows.shape, len(segments.ends)
    out = rows.new_empty(E, I, dtype=reduction_dtype(rows.dtype))
    _call("total", rows.dtype, rows.contiguous(), scale, *segments, E, I, out)
    return out


def least(
    surprise: Tensor, segments: Segments, *, tokens: int, min_k: int, dtype: torch.dtype
) -> tuple[Tensor, Segments]:
    """The pairs of a bank of this dtype that are among the `min_k` of least surprise [R] of their token.

    Chosen as by `min_k_mask`: their places among all, and they themselves.
    """
    E, most = len(segments.ends), min(len(surprise), tokens * min_k)
    places, token, ends = (torch.empty(size, dtype=torch.int64) for size in (most, most, E))
    _call("least", dtype, surprise.contiguous(), *segments, E, tokens, min_k, places, token, ends)
    kept = int(ends[-1]) if E else 0
    return places[:kept], Segments(token[:kept], ends)


class _Pointers(NamedTuple):
    """Of contiguous tensors, which are held until they have been read."""

    array: ctypes.Array[ctypes.c_void_p]
    held: list[Tensor]


def _each(tensors: Sequence[Tensor]) -> _Pointers:
    held = [tensor.contiguous() for tensor in tensors]
    return _Pointers((ctypes.c_void_p * len(held))(*(tensor.data_ptr() for tensor in held)), held)


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | _Pointers | int | None) -> None:
    library = _built(_NUMBERS[dtype])
    if isinstance(library, str):
        raise RuntimeError(f"native code: {library}.")
    getattr(library, f"onn_{name}")(*map(_argument, (torch.get_num_threads(), *arguments)))


def _argument(
    value: Tensor | _Pointers | int | None,
) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.Array[ctypes.c_void_p]:
    match value:
        case None:
            return ctypes.c_void_p(None)
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
