"""`segment_outer` against a loop: on every backend, under `vmap`, on fake tensors and in a compiled graph."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from onn import tree
from onn.functional.kernels.segments import segment_outer
from tests.support import BOUND, assert_close, assert_same, normal, tolerance


class Segments(NamedTuple):
    """Arguments of `segment_outer`."""

    rows: Tensor
    x: Tensor
    token: Tensor
    ends: Tensor


def make(seed: int, *, R: int, I: int, T: int, H: int, E: int, owned: int, dtype: torch.dtype) -> Segments:
    source = torch.Generator().manual_seed(seed)
    cuts = torch.randint(owned + 1, (E,), generator=source).sort().values
    return Segments(
        rows=normal(seed, R, I, dtype=dtype),
        x=normal(seed + 1, T, H, dtype=dtype),
        token=torch.randint(T, (R,), generator=source),
        ends=cuts,
    )


@st.composite
def segments(draw: st.DrawFn) -> Segments:
    R = draw(st.integers(0, 9))
    return make(
        draw(st.integers(0, 2**20)),
        R=R,
        I=draw(st.integers(1, 5)),
        T=draw(st.integers(1, 6)),
        H=draw(st.integers(1, 6)),
        E=draw(st.integers(1, 6)),
        owned=draw(st.integers(0, R)),
        dtype=torch.float64,
    )


def by_loop(rows: Tensor, x: Tensor, token: Tensor, ends: Tensor) -> Tensor:
    out = torch.zeros(len(ends), rows.shape[1], x.shape[1], dtype=torch.float64)
    for row in range(len(rows)):
        owner = next((segment for segment, end in enumerate(ends.tolist()) if row < end), None)
        if owner is not None:
            out[owner] += torch.outer(rows[row].double(), x[token[row]].double())
    return out


@given(segments())
def test_segment_outer_is_the_loop_over_rows(case: Segments) -> None:
    assert_close(segment_outer(*case), by_loop(*case), bound=BOUND)


@pytest.mark.parametrize(
    ("ends", "full"),
    [([0, 0, 0], []), ([7, 7, 7], [0]), ([0, 0, 7], [2]), ([2, 2, 5], [0, 2]), ([0, 3, 3], [1])],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_empty_segments_are_zero_and_rows_of_nobody_count_nothing(
    ends: list[int], full: list[int], dtype: torch.dtype
) -> None:
    case = make(0, R=7, I=8, T=4, H=16, E=3, owned=7, dtype=dtype)._replace(ends=torch.tensor(ends))
    got = segment_outer(*case)
    assert got.dtype == dtype
    assert [segment for segment in range(3) if got[segment].any()] == full
    assert_close(got, by_loop(*case), bound=tolerance(dtype, terms=1))
    nobody = torch.arange(7) >= ends[-1]
    poisoned = case._replace(rows=torch.where(nobody[:, None], torch.nan, case.rows))
    assert_same(segment_outer(*poisoned), got)


def test_indices_of_half_the_size_are_the_same_indices() -> None:
    case = make(0, R=7, I=3, T=4, H=5, E=4, owned=5, dtype=torch.float32)
    assert_close(
        segment_outer(*case[:2], *(index.to(torch.int32) for index in case[2:])),
        segment_outer(*case),
        bound=tolerance(torch.float32, terms=7),
    )


@pytest.mark.parametrize("batched", [dims for dims in product([0, None], repeat=4) if dims != (None,) * 4])
@pytest.mark.parametrize("at", [0, -1])
def test_segment_outer_under_vmap_is_the_loop(batched: tuple[int | None, ...], at: int) -> None:
    many = [make(seed, R=7, I=3, T=4, H=5, E=4, owned=5, dtype=torch.float64) for seed in (0, 10, 20)]
    columns = list(zip(*many, strict=True))
    arguments = [
        column[0] if dim is None else torch.stack(column, dim=at) for column, dim in zip(columns, batched, strict=True)
    ]
    got = tree.vmap(segment_outer, tuple(None if dim is None else at for dim in batched))(*arguments)
    for position in range(3):
        one = [column[0 if dim is None else position] for column, dim in zip(columns, batched, strict=True)]
        assert_close(got[position], by_loop(*one), bound=BOUND)


def test_segment_outer_under_vmap_of_vmap_is_the_loop() -> None:
    many = [make(seed, R=7, I=3, T=4, H=5, E=4, owned=5, dtype=torch.float64) for seed in range(0, 60, 10)]
    columns = [torch.stack(column).unflatten(0, (2, 3)) for column in zip(*many, strict=True)]
    got = torch.func.vmap(torch.func.vmap(segment_outer))(*columns).flatten(0, 1)
    for position, case in enumerate(many):
        assert_close(got[position], by_loop(*case), bound=BOUND)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_known_without_data_is_what_the_kernel_returns(dtype: torch.dtype) -> None:
    case = make(0, R=7, I=3, T=4, H=5, E=4, owned=5, dtype=dtype)
    real = segment_outer(*case)
    meta = segment_outer(*(leaf.to("meta") for leaf in case))
    with FakeTensorMode() as mode:
        fake = segment_outer(*(mode.from_tensor(leaf) for leaf in case))
    for known in (meta, fake):
        assert (known.shape, known.dtype, known.stride()) == (real.shape, real.dtype, real.stride())


def test_the_operator_keeps_what_torch_demands_of_one() -> None:
    case = make(0, R=7, I=3, T=4, H=5, E=4, owned=5, dtype=torch.float32)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.onn.segment_outer.default, tuple(case), test_utils=tests)


def test_a_compiled_segment_outer_is_the_eager_one_and_new_segments_do_not_recompile() -> None:
    compiled = torch.compile(segment_outer, fullgraph=True, backend="aot_eager")
    first, second = (make(seed, R=7, I=3, T=4, H=5, E=4, owned=5, dtype=torch.float64) for seed in (0, 9))
    assert_same(compiled(*first), segment_outer(*first))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same(compiled(*second), segment_outer(*second))


@pytest.mark.parametrize(("I", "H"), [(8, 16), (3, 16), (8, 5), (16, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("owned", [0, 20, 33])
def test_the_kernel_of_cuda_computes_the_same_on_any_device(dtype: torch.dtype, I: int, H: int, owned: int) -> None:
    kernel = torch.library.get_kernel("onn::segment_outer", "CUDA")
    case = make(4, R=33, I=I, T=7, H=H, E=6, owned=owned, dtype=dtype)
    got = kernel.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *case)
    assert got.dtype == dtype
    assert_close(got, by_loop(*case), bound=tolerance(dtype, terms=1))
    nobody = torch.arange(33) >= case.ends[-1]
    poisoned = case._replace(rows=torch.where(nobody[:, None], torch.nan, case.rows))
    assert_same(kernel.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *poisoned), got)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("I", "H"), [(8, 16), (3, 5)])
def test_segment_outer_on_cuda_is_the_loop(dtype: torch.dtype, I: int, H: int) -> None:
    case = make(4, R=33, I=I, T=7, H=H, E=6, owned=20, dtype=dtype)
    got = segment_outer(*(leaf.to("cuda") for leaf in case))
    assert_close(got.cpu(), by_loop(*case), bound=tolerance(dtype, terms=33))


def test_a_row_that_is_not_there_and_two_dtypes_are_errors() -> None:
    rows, x, ends = torch.ones(3, 2), torch.ones(4, 5), torch.tensor([3])
    for token in ([0, 1, 4], [0, -5, 1]):
        with pytest.raises(IndexError):
            segment_outer(rows, x, torch.tensor(token), ends)
    with pytest.raises(RuntimeError, match="dtype"):
        segment_outer(rows.bfloat16(), x, torch.tensor([0, 1, 2]), ends)


def test_without_tokens_the_rows_of_both_lie_in_one_order() -> None:
    many = [make(seed, R=7, I=3, T=7, H=5, E=4, owned=5, dtype=torch.float64) for seed in (0, 10, 20)]
    expected = [by_loop(rows, x, torch.arange(7), ends) for rows, x, _, ends in many]
    for (rows, x, _, ends), alone in zip(many, expected, strict=True):
        assert_close(segment_outer(rows, x, None, ends), alone, bound=BOUND)
        kernel = torch.library.get_kernel("onn::segment_outer", "CUDA")
        narrow = (rows.float(), x.float(), None, ends)
        got = kernel.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *narrow)
        assert_close(got, alone, bound=tolerance(torch.float32, terms=7))

    def in_order(rows: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        return segment_outer(rows, x, None, ends)

    columns = [torch.stack(column) for column in zip(*((rows, x, ends) for rows, x, _, ends in many), strict=True)]
    assert_close(tree.vmap(in_order, (0, 0, 0))(*columns), torch.stack(expected), bound=BOUND)
    shared = [by_loop(rows, many[0].x, torch.arange(7), ends) for rows, _, _, ends in many]
    got = tree.vmap(in_order, (0, None, 0))(columns[0], many[0].x, columns[2])
    assert_close(got, torch.stack(shared), bound=BOUND)
