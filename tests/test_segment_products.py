"""`segment_product` and `sum_by_token` against loops: on every device, under `vmap`, without data and compiled."""

from __future__ import annotations

from itertools import product
from typing import Protocol

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from onn import tree
from onn.functional.kernels.segments import segment_product, sum_by_token
from tests.support import BOUND, assert_close, assert_same, normal, tolerance

Arguments = tuple[Tensor, ...]


class Operator(Protocol):
    """One of both, or its loop."""

    def __call__(self, *case: Tensor) -> Tensor: ...


class Maker(Protocol):
    """Makes the arguments of an operator."""

    def __call__(self, seed: int, *, dtype: torch.dtype = torch.float64) -> Arguments: ...


def products(
    seed: int, *, R: int = 7, I: int = 3, H: int = 5, E: int = 4, owned: int = 5, dtype: torch.dtype = torch.float64
) -> Arguments:
    """Arguments of `segment_product`; the last rows are nobody's."""
    source = torch.Generator().manual_seed(seed)
    ends = torch.randint(owned + 1, (E,), generator=source).sort().values
    return normal(seed, R, I, dtype=dtype), normal(seed + 1, E, I, H, dtype=dtype), ends


def sums(seed: int, *, R: int = 7, H: int = 5, T: int = 4, K: int = 3, dtype: torch.dtype = torch.float64) -> Arguments:
    """Arguments of `sum_by_token`."""
    source = torch.Generator().manual_seed(seed)
    return normal(seed, R + 1, H, dtype=dtype), torch.randint(R + 1, (T, K), generator=source)


def products_by_loop(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Of the rows that somebody owns."""
    owners = [next(e for e, end in enumerate(ends.tolist()) if row < end) for row in range(int(ends[-1]))]
    found = [rows[row].double() @ matrices[owner].double() for row, owner in enumerate(owners)]
    return torch.stack(found) if found else rows.new_zeros(0, matrices.shape[2], dtype=torch.float64)


def sums_by_loop(rows: Tensor, places: Tensor) -> Tensor:
    out = torch.zeros(len(places), rows.shape[1], dtype=torch.float64)
    for token, own in enumerate(places.tolist()):
        for place in own:
            if place < len(rows) - 1:
                out[token] += rows[place].double()
    return out


def product_of(*case: Tensor) -> Tensor:
    return segment_product(*case)


def sum_of(*case: Tensor) -> Tensor:
    return sum_by_token(*case)


def owned_rows(arguments: Arguments) -> Tensor:
    return segment_product(*arguments)[: int(arguments[2][-1])]


OPERATORS = pytest.mark.parametrize(
    ("operator", "make", "by_loop"),
    [(product_of, products, products_by_loop), (sum_of, sums, sums_by_loop)],
    ids=["segment_product", "sum_by_token"],
)
"""The first rows of what an operator returns are those of its loop; more are nobody's."""


@given(st.data())
def test_a_product_is_the_loop_over_rows(data: st.DataObject) -> None:
    R = data.draw(st.integers(1, 9))
    I, H, E = (data.draw(st.integers(1, 6)) for _ in range(3))
    case = products(data.draw(st.integers(0, 2**20)), R=R, I=I, H=H, E=E, owned=data.draw(st.integers(0, R)))
    assert_close(owned_rows(case), products_by_loop(*case), bound=BOUND)


@given(st.data())
def test_a_sum_is_the_loop_over_tokens(data: st.DataObject) -> None:
    R, H, T, K = (data.draw(st.integers(least, 6)) for least in (0, 1, 1, 1))
    case = sums(data.draw(st.integers(0, 2**20)), R=R, H=H, T=T, K=K)
    assert_close(sum_by_token(*case), sums_by_loop(*case), bound=BOUND)


@OPERATORS
def test_what_nobody_owns_reaches_nothing(operator: Operator, make: Maker, by_loop: Operator) -> None:
    rows, *rest = make(3)
    poisoned = rows.clone()
    poisoned[int(rest[1][-1]) if operator is product_of else -1 :] = torch.nan
    expected = by_loop(rows, *rest)
    assert_same(operator(poisoned, *rest)[: len(expected)], operator(rows, *rest)[: len(expected)])


@OPERATORS
@pytest.mark.parametrize("at", [0, -1])
def test_under_vmap_it_is_the_loop(operator: Operator, make: Maker, by_loop: Operator, at: int) -> None:
    many = [make(seed) for seed in (0, 10, 20)]
    columns = list(zip(*many, strict=True))
    for batched in product([0, None], repeat=len(columns)):
        if all(dim is None for dim in batched):
            continue
        own = [c[0] if dim is None else torch.stack(c, dim=at) for c, dim in zip(columns, batched, strict=True)]
        got = tree.vmap(operator, tuple(None if dim is None else at for dim in batched))(*own)
        for position in range(3):
            expected = by_loop(*(c[0 if dim is None else position] for c, dim in zip(columns, batched, strict=True)))
            assert_close(got[position, : len(expected)], expected, bound=BOUND)


@OPERATORS
def test_under_vmap_of_vmap_it_is_the_loop(operator: Operator, make: Maker, by_loop: Operator) -> None:
    many = [make(seed) for seed in range(0, 60, 10)]
    columns = [torch.stack(column).unflatten(0, (2, 3)) for column in zip(*many, strict=True)]
    got = torch.func.vmap(torch.func.vmap(operator))(*columns).flatten(0, 1)
    for mine, case in zip(got, many, strict=True):
        expected = by_loop(*case)
        assert_close(mine[: len(expected)], expected, bound=BOUND)


@OPERATORS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_is_known_without_data_is_what_the_kernel_returns(
    operator: Operator, make: Maker, by_loop: Operator, dtype: torch.dtype
) -> None:
    case = make(0, dtype=dtype)
    real = operator(*case)
    meta = operator(*(leaf.to("meta") for leaf in case))
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(leaf) for leaf in case))
    for known in (meta, fake):
        assert (known.shape, known.dtype, known.stride()) == (real.shape, real.dtype, real.stride())


@OPERATORS
def test_the_operator_keeps_what_torch_demands_of_one(operator: Operator, make: Maker, by_loop: Operator) -> None:
    name = "segment_product" if operator is product_of else "sum_by_token"
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    case = make(0, dtype=torch.float32)
    if operator is product_of:
        case = (*case[:2], torch.tensor([2, 2, 5, 7]))  # torch compares rows of nobody, too
    torch.library.opcheck(getattr(torch.ops.onn, name).default, case, test_utils=tests)


@OPERATORS
def test_compiled_it_is_the_eager_one_and_new_segments_do_not_recompile(
    operator: Operator, make: Maker, by_loop: Operator
) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    first, second = make(0), make(9)
    for case in (first, second):
        with torch.compiler.set_stance("fail_on_recompile" if case is second else "default"):
            expected = by_loop(*case)
            assert_close(compiled(*case)[: len(expected)], expected, bound=BOUND)


@pytest.mark.parametrize(("I", "H"), [(8, 16), (3, 16), (8, 5), (16, 8), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("owned", [0, 20, 33])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_kernel_of_cuda_computes_the_same_on_any_device(
    dtype: torch.dtype, I: int, H: int, owned: int, transposed: bool
) -> None:
    kernel = torch.library.get_kernel("onn::segment_product", "CUDA")
    rows, matrices, ends = products(4, R=33, I=I, H=H, E=6, owned=owned, dtype=dtype)
    if transposed:
        matrices = matrices.mT.contiguous().mT
    got = kernel.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), rows, matrices, ends)
    assert (got.dtype, got.shape, got.is_contiguous()) == (dtype, (33, H), True)
    expected = products_by_loop(rows, matrices, ends)
    assert_close(got[: len(expected)], expected, bound=tolerance(dtype, terms=1))


@pytest.mark.parametrize(("I", "H"), [(8, 16), (3, 5)])
@pytest.mark.parametrize("tokens", [True, False])
def test_the_kernels_of_cuda_wait_for_no_number_in_bfloat16(I: int, H: int, tokens: bool) -> None:
    """On `meta` there are no numbers."""
    rows, matrices, ends = (part.to("meta") for part in products(0, I=I, H=H, dtype=torch.bfloat16))
    source = torch.empty(7, H, dtype=torch.bfloat16, device="meta")
    token = torch.empty(7, dtype=torch.int64, device="meta") if tokens else None
    calls = (
        ("segment_product", (rows, matrices, ends), (7, H)),
        ("segment_outer", (rows, source, token, ends), (4, I, H)),
        ("sum_by_token", tuple(part.to("meta") for part in sums(0, dtype=torch.bfloat16)), (4, 5)),
    )
    for name, arguments, shape in calls:
        kernel = torch.library.get_kernel(f"onn::{name}", "CUDA")
        got = kernel.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments)
        assert (got.shape, got.dtype, got.is_contiguous()) == (shape, torch.bfloat16, True)


@pytest.mark.parametrize("device", ["CPU", "CUDA"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sum_is_rounded_once(dtype: torch.dtype, device: str) -> None:
    rows, places = sums(1, R=300, H=9, T=2, K=257, dtype=dtype)
    kernel = torch.library.get_kernel("onn::sum_by_token", device)
    got = kernel.call_boxed(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device)), rows, places)
    assert got.dtype == dtype
    assert bool((places == 300).any())
    once = sums_by_loop(rows, places)
    size = sums_by_loop(rows.abs(), places)
    bound = once.abs() * tolerance(dtype, terms=1) + size * tolerance(torch.float32, terms=257)
    assert bool(((got.double() - once).abs() <= bound).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@OPERATORS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_on_cuda_it_is_the_loop(operator: Operator, make: Maker, by_loop: Operator, dtype: torch.dtype) -> None:
    case = make(4, dtype=dtype)
    expected = by_loop(*case)
    got = operator(*(leaf.to("cuda") for leaf in case)).cpu()
    assert_close(got[: len(expected)], expected, bound=tolerance(dtype, terms=3))
