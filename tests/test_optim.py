from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onn import optim, tree
from tests.support import assert_close, assert_same, normal, tolerance


class Pair(NamedTuple):
    matrix: Tensor
    vector: Tensor


def pair(seed: int, dtype: torch.dtype = torch.float64) -> Pair:
    return Pair(matrix=normal(seed, 4, 3, dtype=dtype), vector=normal(seed + 1, 5, dtype=dtype))


def all_learn(params: Pair) -> Pair:
    return tree.map1(lambda leaf: torch.ones((), dtype=torch.bool), params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.999), (0.0, 0.5), (0.8, 0.95)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_steps_are_those_of_torch(dtype: torch.dtype, beta1: float, beta2: float, weight_decay: float) -> None:
    params = pair(0, dtype)
    theirs = [leaf.clone().requires_grad_() for leaf in params]
    reference = torch.optim.AdamW(
        [
            {"params": theirs[:1], "weight_decay": weight_decay},
            {"params": theirs[1:], "weight_decay": 0.0},
        ],
        lr=0.05,
        betas=(beta1, beta2),
        eps=1e-6,
    )
    state = optim.adamw_init(params, all_learn(params))
    for position in range(5):
        grads = pair(10 + position, dtype)
        for leaf, grad in zip(theirs, grads, strict=True):
            leaf.grad = grad.clone()
        reference.step()
        params, state = optim.adamw(
            params,
            grads,
            state,
            all_learn(params),
            (),
            lr=torch.tensor(0.05, dtype=dtype),
            beta1=beta1,
            beta2=beta2,
            eps=1e-6,
            weight_decay=weight_decay,
        )
    assert_close(params, Pair(*(leaf.detach() for leaf in theirs)), bound=tolerance(dtype, terms=50))


def step(params: Pair, grads: Pair, state: optim.AdamWState[Pair], learns: Pair) -> tuple[Pair, optim.AdamWState[Pair]]:
    return optim.adamw(
        params, grads, state, learns, (), lr=torch.tensor(0.1), beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1
    )


@pytest.mark.parametrize("field", ["mean", "square", "grad"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_entry_that_is_not_finite_spoils_no_parameter(field: str, value: float) -> None:
    params, grads, learns = pair(0), pair(5), all_learn(pair(0))
    state = optim.adamw_init(params, learns)

    def planted(leaf: Tensor) -> Tensor:
        return leaf.flatten().index_fill(0, torch.tensor([1]), value).view(leaf.shape)

    def moved(grads: Pair, state: optim.AdamWState[Pair]) -> Pair:
        rates = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1}
        return optim.adamw(params, grads, state, learns, (), lr=torch.tensor(0.1, dtype=torch.float64), **rates)[0]

    clean = moved(grads, state)
    if field == "grad":
        spoilt = moved(tree.map1(planted, grads), state)
    else:
        spoilt = moved(grads, state._replace(**{field: tree.map1(planted, getattr(state, field))}))
    for got, expected in zip(spoilt, clean, strict=True):
        assert bool(got.isfinite().all())
        same = torch.arange(got.numel()) != 1
        assert_same(got.flatten()[same], expected.flatten()[same])


@given(seed=st.integers(0, 999), rows=st.lists(st.booleans(), min_size=4, max_size=4), poison=st.booleans())
def test_entries_that_do_not_learn_stay_bit_identical(seed: int, rows: list[bool], poison: bool) -> None:
    params = pair(seed)
    learns = Pair(matrix=torch.tensor(rows)[:, None], vector=torch.tensor(False))
    state = optim.adamw_init(params, learns)
    params, state = step(params, pair(seed + 5), state, tree.map1(torch.ones_like, learns))
    grads = tree.map1(lambda g: g * torch.nan, pair(seed)) if poison else pair(seed + 9)
    moved, after = step(params, grads, state, learns)
    still = ~torch.tensor(rows)
    for old, new in [
        (params, moved),
        (state.mean, after.mean),
        (state.square, after.square),
        (state.steps, after.steps),
    ]:
        assert torch.equal(old.matrix[still], new.matrix[still])
        assert torch.equal(old.vector, new.vector)
    if any(rows) and not poison:
        assert not torch.equal(params.matrix[~still], moved.matrix[~still])


def test_an_entry_that_slept_takes_the_same_first_step_as_one_that_is_new() -> None:
    params, grads = pair(0), pair(1)
    learns = all_learn(params)
    fresh, _ = step(params, grads, optim.adamw_init(params, learns), learns)
    asleep = tree.map1(torch.zeros_like, learns)
    state = optim.adamw_init(params, learns)
    for _ in range(7):
        _, state = step(params, grads, state, asleep)
    woken, _ = step(params, grads, state, learns)
    assert_same(woken, fresh)


@given(value=st.floats(-(2.0**100), 2.0**100, width=32))
def test_the_expectation_of_stochastic_rounding_is_exact(value: float) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    rounded = optim.stochastic_round(torch.full((2**16,), value, dtype=torch.float32), bits)
    neighbours = rounded.unique()
    assert len(neighbours) <= 2
    assert float(neighbours.min()) <= value <= float(neighbours.max())
    assert float(rounded.double().mean()) == pytest.approx(value, rel=1e-12, abs=0)


def test_stochastic_rounding_keeps_what_is_representable_and_what_is_not_finite() -> None:
    values = torch.tensor([0.0, 1.0, -3.5, float("inf"), float("-inf"), float("nan")])
    for noise in (-(2**15), -1, 0, 2**15 - 1):
        rounded = optim.stochastic_round(values, torch.full(values.shape, noise, dtype=torch.int16))
        assert_same(rounded, values.to(torch.bfloat16))


def test_small_updates_of_bfloat16_parameters_are_not_lost() -> None:
    source = torch.Generator().manual_seed(0)
    params = torch.ones(4096, 2, dtype=torch.bfloat16)
    learns = torch.ones((), dtype=torch.bool)
    state = optim.adamw_init(params, learns)
    for _ in range(20):
        bits = torch.randint(-(2**15), 2**15, params.shape, generator=source, dtype=torch.int16)
        params, state = optim.adamw(
            params,
            torch.ones_like(params),
            state,
            learns,
            bits,
            lr=torch.tensor(1e-4),
            beta1=0.9,
            beta2=0.99,
            eps=1e-8,
            weight_decay=0.0,
        )
    spacing = float(torch.finfo(torch.bfloat16).eps) / 2
    standard_error = (20 * 1e-4 * spacing / params.numel()) ** 0.5
    assert abs(float(params.double().mean()) - (1 - 20e-4)) < 6 * standard_error
    with pytest.raises(ValueError, match="bfloat16 parameters need noise"):
        optim.narrow(torch.ones(2), torch.bfloat16, None)


@given(seed=st.integers(0, 999), scale=st.floats(1e-3, 1e3))
def test_clipping_bounds_the_norm_and_keeps_the_direction(seed: int, scale: float) -> None:
    grads = tree.map1(lambda g: g * scale, pair(seed))
    flat = torch.cat([leaf.flatten() for leaf in grads])
    clipped, norm = optim.clip_by_global_norm(grads, max_norm=2.0)
    assert_close(norm, flat.norm(), bound=tolerance(torch.float64, terms=20))
    expected = tree.map1(lambda g: g * min(1.0, 2.0 / float(flat.norm())), grads)
    assert_close(clipped, expected, bound=tolerance(torch.float64, terms=20))


def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_floor() -> None:
    rates = [float(optim.warmup_cosine(torch.tensor(at), peak=0.4, warmup=10, total=50, floor=0.1)) for at in range(60)]
    assert rates[0] == pytest.approx(0.04)
    assert rates[9] == rates[10] == pytest.approx(0.4)
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:51]))
    assert rates[50:] == pytest.approx([0.04] * 10)
