"""The bank under stress: scales of the loss to the ends of float32, degenerate banks, and rounding against bounds that
are derived operation by operation (`tests.numerics`).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import onn.functional as F
from onn import tree
from onn.functional.kernels.backends import Backend
from tests.numerics import BACKENDS, Rounded, analysed, assert_within, computed
from tests.support import BOUND, Case, assert_close, assert_same, cases, each_backend, make_case, normal, tolerance

NARROW = (torch.float32, torch.bfloat16)
ALL = (*NARROW, torch.float64)
every_backend = each_backend(*BACKENDS)
ROUNDING = tolerance(torch.float32, terms=64)
LEAST_SQUARE = 2.0**-149
"""The smallest positive float32: what a square loses at most by underflow."""
DEPENDABLE = (1e-18, 1e18)
"""Norms of float32 square their entries: outside these scales of the loss, squares underflow or overflow."""
SIZES = {"seed": st.integers(0, 2**20), "T": st.integers(1, 20), "H": st.integers(1, 40)}
SIZES |= {"E": st.integers(1, 8), "I": st.integers(1, 12)}


def every_expert(case: Case, backend: Backend) -> dict[str, Tensor]:
    return computed(case, min_k=case.weights.shape[1], backend=backend)


def scaled(case: Case, factor: float) -> Case:
    return case._replace(dy=(case.dy.double() * factor).to(case.dy.dtype))


def learning(case: Case, got: dict[str, Tensor], *, min_k: int) -> Case:
    """The case in which only the pairs that learn are active: its experts' gradient is what they shall get."""
    keep = F.min_k_mask(got["surprise"], case.weights != 0, min_k=min_k)
    return case._replace(weights=torch.where(keep, case.weights, 0))


def taught(got: dict[str, Tensor]) -> dict[str, Tensor]:
    """What only the pairs that learn are in."""
    return {name: got[name] for name in (*F.Experts._fields, "bias")}


@every_backend
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("exponent", [-12, 0, 12])
@given(**SIZES, min_k=st.integers(1, 8))
def test_every_result_is_within_its_derived_bound_of_the_exact_one(
    backend: Backend, dtype: torch.dtype, exponent: int, seed: int, T: int, H: int, E: int, I: int, min_k: int
) -> None:
    case = scaled(make_case(seed, T=T, H=H, E=E, I=I, dtype=dtype), 10.0**exponent)
    assert_within(every_expert(case, backend), analysed(case, dtype))
    got = computed(case, min_k=min(min_k, E), backend=backend)
    assert_within(taught(got), analysed(learning(case, got, min_k=min(min_k, E)), dtype))


def test_the_bounds_are_tight_enough_to_see_a_surprise_that_was_once_rounded_to_bfloat16() -> None:
    case = make_case(0, T=8, H=32, E=4, I=8, dtype=torch.float32, density=1.0)
    bounds = analysed(case, torch.float32)
    with pytest.raises(AssertionError, match="surprise: off by"):
        assert_within({"surprise": every_expert(case, "dense")["surprise"].bfloat16().float()}, bounds)
    with pytest.raises(AssertionError, match="gate: off by"):
        assert_within(taught(every_expert(tree.map1(lambda leaf: leaf.bfloat16(), case), "dense")), bounds)


@every_backend
@given(case=cases(dtype=torch.float32), exponent=st.floats(-12, 12), sign=st.sampled_from([-1, 1]))
def test_surprise_scales_with_the_size_of_the_loss_from_1e_12_to_1e12(
    backend: Backend, case: Case, exponent: float, sign: int
) -> None:
    """By a power of two, which rounds nothing, every pair exactly; by any factor, up to rounding."""
    plain, powers = every_expert(case, backend), {"surprise": 1, "counterfactual": 1, "neuron": 2, "matrix": 2}
    exact = sign * 2.0 ** round(exponent * 3.3)
    assert_same(every_expert(scaled(case, exact), backend)["bias"], plain["bias"] * exact)
    for factor, rounding in ((exact, tolerance(torch.float32, terms=1, slack=2)), (sign * 10.0**exponent, None)):
        got = every_expert(scaled(case, factor), backend)
        for name, power in ((name, powers[name]) for name in powers if name in got):
            expected = plain[name].double() * abs(factor) ** power
            if rounding is None:
                assert_close(got[name], expected, bound=ROUNDING)
            else:
                assert torch.allclose(got[name].double(), expected, rtol=rounding, atol=0), name


@every_backend
@pytest.mark.parametrize("exponent", range(-12, 13, 3))
def test_the_same_pairs_learn_at_every_scale_of_the_loss(backend: Backend, exponent: int) -> None:
    case = make_case(0, T=9, H=8, E=6, I=4, dtype=torch.float32, density=1.0)
    plain, got = (computed(c, min_k=2, backend=backend) for c in (case, scaled(case, 10.0**exponent)))
    for name, gradient in taught(plain).items():
        assert_close(got[name], gradient.double() * 10.0**exponent, bound=ROUNDING)


@every_backend
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("exponent", range(-45, 38, 3))
def test_to_the_ends_of_float32_surprise_is_right_or_too_small_to_square_or_infinite_and_never_nan(
    backend: Backend, dtype: torch.dtype, exponent: int
) -> None:
    """Within `DEPENDABLE` it is right. Below, what the squares inside its norms lose is missing and nothing else;
    above, it is infinite: the pair counts as not finite and learns last."""
    case = scaled(make_case(0, T=4, H=4, E=3, I=2, dtype=dtype, density=1.0), 10.0**exponent)
    result, bounds = every_expert(case, backend), analysed(case, dtype)
    assert not any(value.isnan().any() for value in result.values())
    got, (true, rounding) = result["surprise"].double(), bounds["surprise"]
    low, high = DEPENDABLE
    if low <= 10.0**exponent <= high:
        assert_within({"surprise": result["surprise"]}, bounds)
    else:
        by_norm = 2 + torch.cat([case.x, case.weights], dim=1).double().square().sum()  # every factor that follows
        lost = (8 * LEAST_SQUARE) ** 0.5 * by_norm
        assert bool((((got - true).abs() <= rounding + lost) | (got.isposinf() & (true > high))).all())


@every_backend
def test_a_pair_whose_surprise_overflows_is_counted_and_spoils_no_other_token(backend: Backend) -> None:
    case = make_case(0, T=6, H=8, E=5, I=3, dtype=torch.float32, density=1.0)
    huge = case._replace(dy=case.dy.clone().index_fill_(0, torch.tensor([2]), 1e25))
    got = computed(huge, min_k=2, backend=backend)
    infinite = ~torch.isfinite(got["surprise"])
    assert int(F.non_finite(got["surprise"], case.weights != 0)) == int(infinite.sum())
    rest = torch.arange(6) != 2
    assert not infinite[rest].any()
    plain = every_expert(case, backend)
    assert_close(got["surprise"][rest], plain["surprise"][rest], bound=ROUNDING)
    assert_close(got["x"][rest], plain["x"][rest], bound=ROUNDING)
    assert all(bool(torch.isfinite(value).all()) for value in (*taught(got).values(), got["x"], got["weights"]))


ZEROED: dict[str, Callable[[Case], Case]] = {
    "weights": lambda case: case._replace(weights=torch.zeros_like(case.weights)),
    "gate": lambda case: case._replace(experts=case.experts._replace(gate=torch.zeros_like(case.experts.gate))),
    "up": lambda case: case._replace(experts=case.experts._replace(up=torch.zeros_like(case.experts.up))),
    "down": lambda case: case._replace(experts=case.experts._replace(down=torch.zeros_like(case.experts.down))),
    "all matrices": lambda case: case._replace(experts=tree.zeros_like(case.experts)),
    "x": lambda case: case._replace(x=torch.zeros_like(case.x)),
    "dy": lambda case: case._replace(dy=torch.zeros_like(case.dy)),
}


@every_backend
@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("zero", ZEROED)
def test_zeros_leave_of_every_result_what_its_formula_leaves(backend: Backend, dtype: torch.dtype, zero: str) -> None:
    case = ZEROED[zero](make_case(0, T=5, H=6, E=4, I=3, dtype=dtype, density=1.0))
    got = every_expert(case, backend)
    assert_within(got, analysed(case, dtype), times=2)
    masked = computed(case, min_k=2, backend=backend)
    assert_within(taught(masked), analysed(learning(case, masked, min_k=2), dtype), times=2)
    if zero in ("weights", "all matrices", "x", "dy"):
        assert not got["surprise"].any()
        assert not any(bool(gradient.any()) for gradient in taught(masked).values())
    if backend == "dense":
        assert bool(got["counterfactual"].any()) == (zero in ("weights", "gate", "up", "down"))


@every_backend
@pytest.mark.parametrize("dtype", ALL)
@given(seed=st.integers(0, 2**20), chosen=st.integers(0, 4), min_k=st.integers(1, 5))
def test_one_token_with_one_active_expert_is_that_expert_alone(
    backend: Backend, dtype: torch.dtype, seed: int, chosen: int, min_k: int
) -> None:
    case = make_case(seed, T=1, H=6, E=5, I=3, dtype=dtype, density=1.0)
    case = case._replace(weights=torch.zeros_like(case.weights).index_fill_(1, torch.tensor([chosen]), 0.75))
    got = computed(case, min_k=min_k, backend=backend)
    alone = Case(tree.map1(lambda w: w[chosen : chosen + 1], case.experts), case.x, case.weights[:, [chosen]], case.dy)
    bounds = analysed(alone, dtype)
    here = {name: got[name][[chosen]] for name in F.Experts._fields}
    here |= {name: got[name][:, [chosen]] for name in ("surprise", "weights")}
    here |= {name: got[name][..., [chosen], :] for name in ("neuron", "matrix", "bias")}
    assert_within({**here, "y": got["y"], "x": got["x"]}, bounds, times=2)
    others = torch.arange(5) != chosen
    assert not got["surprise"][:, others].any()
    assert not any(got[name][others].any() for name in (*F.Experts._fields, "neuron"))
    assert not any(got[name][:, others].any() for name in ("matrix", "bias"))


@every_backend
@pytest.mark.parametrize("dtype", ALL)
@given(seed=st.integers(0, 2**20), min_k=st.integers(1, 5), H=st.integers(1, 17))
def test_identical_experts_are_equally_surprised_and_min_k_of_them_learn(
    backend: Backend, dtype: torch.dtype, seed: int, min_k: int, H: int
) -> None:
    """A blocked matrix product may round equal experts apart; where it does not, those of lowest index learn."""
    case = make_case(seed, T=4, H=H, E=5, I=3, dtype=dtype, density=1.0)
    same = tree.map1(lambda w: w[:1].expand_as(w).clone(), case.experts)
    case = case._replace(experts=same, weights=torch.full_like(case.weights, 0.5))
    got, bounds = computed(case, min_k=min_k, backend=backend), analysed(case, dtype)
    assert_within({"surprise": got["surprise"]}, bounds, times=2)
    whole = {name: bounds[name].over(lambda part: part.sum(dim=0) * (min_k / 5)) for name in F.Experts._fields}
    at = {name: got[name].double().sum(dim=0) for name in whole}
    worst = {name: Rounded(whole[name].value, 5 * bounds[name].error.sum(dim=0)) for name in whole}
    assert_within(at, worst)
    if torch.equal(got["surprise"], got["surprise"][:, :1].expand_as(got["surprise"])):
        assert not any(got[name][min_k:].any() for name in whole)


@every_backend
@pytest.mark.parametrize("dtype", ALL)
@given(seed=st.integers(0, 2**20))
def test_the_order_of_the_tokens_changes_nothing_beyond_rounding(
    backend: Backend, dtype: torch.dtype, seed: int
) -> None:
    case = make_case(seed, T=16, H=8, E=4, I=3, dtype=dtype)
    order = normal(seed + 7, 16).argsort()
    shuffled = Case(case.experts, case.x[order], case.weights[order], case.dy[order])
    bounds = analysed(case, dtype)
    moved = ("y", "x", "weights", "surprise", "counterfactual")
    bounds |= {name: bounds[name].over(lambda part: part[order]) for name in moved}
    assert_within(every_expert(shuffled, backend), bounds, times=2)
    plain, got = (computed(c, min_k=2, backend=backend) for c in (case, shuffled))
    kept, kept_shuffled = (learning(c, g, min_k=2) for c, g in ((case, plain), (shuffled, got)))
    if torch.equal(kept.weights[order], kept_shuffled.weights):  # all but pairs that tie up to rounding
        assert_within(taught(got), analysed(kept, dtype), times=2)


@every_backend
@pytest.mark.parametrize("pieces", [1, 2, 5, 16])
@given(seed=st.integers(0, 2**20), min_k=st.integers(1, 4))
def test_accumulated_micro_batches_are_one_batch(backend: Backend, pieces: int, seed: int, min_k: int) -> None:
    case = make_case(seed, T=16, H=8, E=4, I=3)
    whole = computed(case, min_k=min_k, backend=backend)
    parts = [
        computed(Case(case.experts, *rows), min_k=min_k, backend=backend)
        for rows in zip(*(leaf.chunk(pieces) for leaf in (case.x, case.weights, case.dy)), strict=True)
    ]
    for name in (*F.Experts._fields, "neuron", "matrix", "bias"):
        assert_close(torch.stack([part[name] for part in parts]).sum(dim=0), whole[name], bound=BOUND)
    for name in ("y", "x", "weights", "surprise"):
        assert_close(torch.cat([part[name] for part in parts]), whole[name], bound=BOUND)
