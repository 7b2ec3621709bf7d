"""Surprise in all its forms against per-token autograd; its laws, dtypes, scales and what a NaN may reach."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

import onn.functional as F
from onn import tree
from onn.functional.transform import Taps
from tests.support import (
    Case,
    assert_close,
    assert_same,
    cases,
    each_backend,
    make_case,
    normal,
    pair_bias_gradients,
    tolerance,
)

BOUND = tolerance(torch.float64, terms=64, slack=512)
"""1e-12: the sums here have at most 81 terms; the slack leaves room for cancellation in banks of one neuron."""
BELIEVED = tolerance(torch.bfloat16, terms=1)
"""Eight eps: sixteen roundings in a chain from input to surprise, each of half an eps at most."""
Pairs = list[list[list[Tensor]]]


def local_of(case: Case) -> F.Local:
    _, residuals = F.bank_forward(case.experts, case.x, case.weights)
    return F.bank_local(case.experts, residuals, case.dy)[0]


def parameter(case: Case) -> Tensor:
    return F.parameter_surprise(local_of(case), case.x, case.weights, case.dy)


def counterfactual(case: Case) -> Tensor:
    return F.counterfactual_surprise(local_of(case), case.x, case.dy)


def output(case: Case) -> Tensor:
    return F.output_surprise(case.weights, case.dy)


def inputs(case: Case) -> Tensor:
    return F.input_surprise(local_of(case), case.experts, case.weights)


def neuron(case: Case) -> Tensor:
    return F.neuron_surprise(local_of(case), case.x, case.weights, case.dy)


def matrix(case: Case) -> Tensor:
    return F.matrix_surprise(local_of(case), case.x, case.weights, case.dy)


def bias(case: Case) -> Tensor:
    return F.bias_gradients(local_of(case), case.weights)


BY_PAIR: dict[str, Callable[[Case], Tensor]] = {
    "parameter": parameter,
    "counterfactual": counterfactual,
    "output": output,
    "input": inputs,
}


def expert(gate_IH: Tensor, up_IH: Tensor, down_IH: Tensor, x_H: Tensor) -> Tensor:
    return down_IH.mT @ (silu(gate_IH @ x_H) * (up_IH @ x_H))


def by_loop(case: Case) -> tuple[Pairs, Tensor]:
    """Of every token and expert: the gradients of its three matrices, and the norm of that of its copy of the input."""
    parameters: Pairs = []
    to_input = torch.zeros_like(case.weights)
    for t, (x_H, w_E, g_H) in enumerate(zip(case.x, case.weights, case.dy, strict=True)):
        parameters.append([])
        for e, matrices in enumerate(zip(*case.experts, strict=True)):
            leaves = [leaf.clone().requires_grad_() for leaf in (*matrices, x_H)]
            *gradients, towards_x = torch.autograd.grad(w_E[e] * (expert(*leaves) @ g_H), leaves)
            parameters[-1].append(gradients)
            to_input[t, e] = towards_x.norm()
    return parameters, to_input


def norms(pairs: Pairs) -> Tensor:
    return torch.stack([torch.stack([torch.cat(matrices).norm() for matrices in row]) for row in pairs])


def in_float64(case: Case) -> Case:
    return tree.map1(Tensor.double, case)


def at_weight_one(case: Case) -> Case:
    return case._replace(weights=torch.ones_like(case.weights))


@given(cases())
def test_parameter_surprise_is_the_norm_of_every_tokens_gradient_of_the_bank(case: Case) -> None:
    def loss(experts: F.Experts, x_H: Tensor, w_E: Tensor, g_H: Tensor) -> Tensor:
        return F.bank_forward(experts, x_H[None], w_E[None])[0][0] @ g_H

    per_token = tree.vmap(tree.grad(loss), in_dims=(None, 0, 0, 0))(case.experts, case.x, case.weights, case.dy)
    squared = torch.stack([gradient.square().sum(dim=(-2, -1)) for gradient in per_token])
    assert_close(parameter(case), squared.sum(dim=0).sqrt(), bound=BOUND)


@given(cases())
def test_parameter_and_input_surprise_are_those_of_a_loop_over_tokens_and_experts(case: Case) -> None:
    parameters, to_input = by_loop(case)
    assert_close(parameter(case), norms(parameters), bound=BOUND)
    assert_close(inputs(case), to_input, bound=BOUND)


@given(cases())
def test_counterfactual_surprise_is_the_surprise_at_weight_one_of_inactive_experts_too(case: Case) -> None:
    assert_close(counterfactual(case), norms(by_loop(at_weight_one(case))[0]), bound=BOUND)
    assert_same(counterfactual(case), parameter(at_weight_one(case)))


@given(cases())
def test_surprise_over_weight_is_counterfactual_where_active_and_zero_elsewhere(case: Case) -> None:
    got = F.normalised_surprise(parameter(case), case.weights)
    assert_close(got, torch.where(case.weights != 0, counterfactual(case), 0), bound=BOUND)
    assert_close(F.weight_surprise(got, case.weights), parameter(case), bound=BOUND)


@given(cases())
def test_matrix_and_neuron_surprise_are_the_squared_gradient_of_every_row_summed_over_tokens(case: Case) -> None:
    rows = torch.stack(
        [
            torch.stack([torch.stack([m.square().sum(dim=1) for m in matrices]) for matrices in row], dim=1)
            for row in by_loop(case)[0]
        ]
    )
    assert_close(matrix(case), rows.sum(dim=0), bound=BOUND)
    assert_close(neuron(case), rows.sum(dim=(0, 1)), bound=BOUND)
    assert_close(neuron(case).sum(dim=1), parameter(case).square().sum(dim=0), bound=BOUND)


def biases_by_loop(case: Case) -> Tensor:
    """What biases learn that an expert really adds to its pre-activations."""
    biases = torch.zeros(2, *case.experts.gate.shape[:2], dtype=case.x.dtype, requires_grad=True)
    loss = 0 * biases.sum()
    for e, (gate, up, down) in enumerate(zip(*case.experts, strict=True)):
        tokens = case.weights[:, e].nonzero().flatten()
        raised = (case.x[tokens] @ up.mT + biases[1, e]) * silu(case.x[tokens] @ gate.mT + biases[0, e])
        loss = loss + (case.weights[tokens, e, None] * (raised @ down) * case.dy[tokens]).sum()
    return torch.autograd.grad(loss, biases)[0]


@given(cases())
def test_bias_gradients_are_what_biases_on_the_pre_activations_would_learn(case: Case) -> None:
    assert_close(bias(case), biases_by_loop(case), bound=BOUND)
    assert_close(bias(case), pair_bias_gradients(case).sum(dim=0), bound=BOUND)


@given(cases())
def test_output_surprise_is_the_gradient_of_the_experts_output(case: Case) -> None:
    outputs = torch.zeros(*case.weights.shape, case.x.shape[1], dtype=case.x.dtype, requires_grad=True)
    y = (case.weights[..., None] * outputs).sum(dim=1)
    (gradient,) = torch.autograd.grad((y * case.dy).sum(), outputs)
    assert_close(output(case), gradient.norm(dim=-1), bound=BOUND)


@given(cases())
def test_output_surprise_tells_nothing_but_the_weight(case: Case) -> None:
    weights = case.weights.abs() + normal(0, *case.weights.shape).abs()
    weighted = output(case._replace(weights=weights))
    assert torch.equal(weighted.argmin(dim=-1), weights.argmin(dim=-1))
    uniform = output(case._replace(weights=torch.full_like(weights, 1 / weights.shape[1])))
    assert torch.equal(uniform, uniform[:, :1].expand_as(uniform))


@given(cases(), st.integers(-30, 30))
def test_surprise_is_proportional_to_the_size_of_the_weight(case: Case, power: int) -> None:
    for measure in (parameter, output, inputs):
        scaled = measure(case._replace(weights=case.weights * -(2.0**power)))
        assert_same(scaled, measure(case) * 2.0**power)
    for measure, factor in ((neuron, 4.0**power), (matrix, 4.0**power), (bias, -(2.0**power))):
        assert_same(measure(case._replace(weights=case.weights * -(2.0**power))), measure(case) * factor)


@given(cases(), st.integers(0, 2**20))
def test_surprise_follows_permutations_of_tokens_experts_and_neurons(case: Case, seed: int) -> None:
    T, E = case.weights.shape
    tokens, order, rows = (normal(seed, size).argsort() for size in (T, E, case.experts.gate.shape[1]))
    permuted = Case(
        experts=F.Experts(*(w[order][:, rows] for w in case.experts)),
        x=case.x[tokens],
        weights=case.weights[tokens][:, order],
        dy=case.dy[tokens],
    )
    for measure in BY_PAIR.values():
        assert_close(measure(permuted), measure(case)[tokens][:, order], bound=BOUND)
    for measure in (neuron, matrix, bias):
        assert_close(measure(permuted), measure(case)[..., order, :][..., rows], bound=BOUND)


@given(cases(), st.integers(0, 2**20))
def test_a_token_surprises_alone_as_it_does_in_a_batch(case: Case, seed: int) -> None:
    t = seed % len(case.x)
    alone = case._replace(x=case.x[t : t + 1], weights=case.weights[t : t + 1], dy=case.dy[t : t + 1])
    for measure in BY_PAIR.values():
        assert_close(measure(alone), measure(case)[t : t + 1], bound=BOUND)


@pytest.mark.parametrize("place", ["x", "dy", "expert"])
@given(case=cases())
def test_where_the_weight_is_zero_nothing_is_surprised_even_if_all_else_is_nan(place: str, case: Case) -> None:
    weights = case.weights.clone()
    weights[0, 0] = 0
    broken = case._replace(weights=weights)
    if place == "expert":
        poison = torch.zeros(len(case.experts.gate), 1, 1)
        poison[0] = torch.nan
        broken = broken._replace(experts=F.Experts(*(w + poison for w in case.experts)))
    else:
        poison = torch.zeros(len(case.x), 1)
        poison[0] = torch.nan
        broken = broken._replace(**{place: getattr(case, place) + poison})
    fine = case._replace(weights=weights)
    reached = torch.zeros_like(weights, dtype=torch.bool)
    if place == "expert":
        reached[:, 0] = weights[:, 0] != 0
    else:
        reached[0] = weights[0] != 0
    for measure in (parameter, inputs):
        got = measure(broken)
        assert not got[weights == 0].any()
        assert torch.equal(got.isnan(), reached)
        assert_close(got[~reached], measure(fine)[~reached], bound=BOUND)
    assert not F.normalised_surprise(parameter(broken), weights)[weights == 0].any()
    spread = reached.any(dim=0)
    for measure in (neuron, matrix, bias):
        got, clean = measure(broken), measure(fine)
        assert torch.equal(got.isnan().all(dim=-1), spread.expand(got.shape[:-1]))
        assert_close(got[..., ~spread, :], clean[..., ~spread, :], bound=BOUND)


def test_output_surprise_of_weight_zero_is_zero_even_if_the_gradient_is_nan() -> None:
    assert not F.output_surprise(torch.zeros(1, 2), torch.full((1, 3), torch.nan)).any()


@given(cases(dtype=torch.float32), st.integers(-40, 40))
def test_the_scale_of_the_loss_is_the_scale_of_surprise_from_1e_12_to_1e12(case: Case, power: int) -> None:
    """In float32, by the pair: a factor of two is exact, so anything above a rounding is underflow or overflow."""
    scaled = case._replace(dy=case.dy * 2.0**power)
    rounding = tolerance(torch.float32, terms=1, slack=2)
    for measure in BY_PAIR.values():
        assert torch.allclose(measure(scaled), measure(case) * 2.0**power, rtol=rounding, atol=0)
    for measure, factor in ((neuron, 4.0**power), (matrix, 4.0**power), (bias, 2.0**power)):
        assert torch.allclose(measure(scaled), measure(case) * factor, rtol=rounding, atol=0)


@given(cases(dtype=torch.float32), st.integers(-12, 12))
def test_float32_surprise_is_that_of_float64_at_every_scale_of_the_loss(case: Case, exponent: int) -> None:
    case = case._replace(dy=case.dy * 10.0**exponent)
    exact = in_float64(case)
    for measure in (*BY_PAIR.values(), neuron, matrix):
        assert measure(case).dtype == torch.float32
        assert_close(measure(case), measure(exact), bound=tolerance(torch.float32, terms=64))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_bfloat16_surprise_sums_in_float32_and_is_that_of_float64_up_to_its_inputs_roundings(scale: float) -> None:
    case = make_case(0, T=32, H=256, E=8, I=48, dtype=torch.bfloat16)
    case = case._replace(dy=case.dy * scale)
    exact = in_float64(case)
    local = local_of(case)
    same_local = F.Local(*(part.double() for part in local))
    sums = tolerance(torch.float32, terms=256)
    for measure in (F.parameter_surprise, F.neuron_surprise, F.matrix_surprise):
        got = measure(local, case.x, case.weights, case.dy)
        assert got.dtype == torch.float32
        assert_close(got, measure(same_local, exact.x, exact.weights, exact.dy), bound=sums)
        assert_close(got, measure(local_of(exact), exact.x, exact.weights, exact.dy), bound=BELIEVED)
    got = F.bias_gradients(local, case.weights)
    assert got.dtype == torch.float32
    assert_close(got, F.bias_gradients(same_local, exact.weights), bound=sums)
    assert_close(got, bias(exact), bound=BELIEVED)
    assert_close(output(case), output(exact), bound=sums)
    assert_close(inputs(case), inputs(exact), bound=BELIEVED)


def mixed(x_TH: Tensor) -> Tensor:
    """Causal attention without parameters: a position reaches the loss of all later ones."""
    later = torch.ones(len(x_TH), len(x_TH), dtype=torch.bool).triu(1)
    return torch.softmax((x_TH @ x_TH.mT).masked_fill(later, -torch.inf), dim=-1) @ x_TH


@pytest.mark.parametrize("engine", ["autograd", "func"])
def test_surprise_is_the_gradient_of_an_untied_copy_for_every_position(engine: tree.Engine) -> None:
    first, second = (make_case(seed, T=6, H=5, E=3, I=2, density=0.7) for seed in (0, 10))

    def tied(banks: tuple[F.Experts, ...], x: Tensor, taps: Taps) -> tuple[Tensor, tuple[()]]:
        for experts, case, tap in zip(banks, (first, second), taps, strict=True):
            x = x + mixed(F.bank(experts, mixed(x), case.weights, tap, min_k=1, backend="dense"))
        return x.square().sum(), ()

    banks = (first.experts, second.experts)
    taps = tuple(F.zero_taps(("surprise",), tokens=6, experts=experts) for experts in banks)
    got = F.surprise_and_grad(tied, taps=taps, engine=engine)(banks, first.x)

    copies = [[w.expand(6, *w.shape).clone().requires_grad_() for w in experts] for experts in banks]
    x = first.x
    for untied, case in zip(copies, (first, second), strict=True):
        seen, (gate, up, down) = mixed(x), untied
        rows = [
            sum((w[e] * expert(gate[t, e], up[t, e], down[t, e], seen[t]) for e in range(3)), torch.zeros(()))
            for t, w in enumerate(case.weights)
        ]
        x = x + mixed(torch.stack(rows))
    for untied, tap in zip(copies, got.surprise, strict=True):
        gradients = torch.autograd.grad(x.square().sum(), untied, retain_graph=True)
        assert_close(tap["surprise"], torch.cat(gradients, dim=2).flatten(2).norm(dim=2), bound=BOUND)


@pytest.mark.parametrize("names", [(), ("surprise", "neuron"), ("matrix", "bias")])
@each_backend("dense", "loop", "native")
def test_surprise_and_its_gradients_compile_as_one_graph(backend: F.Backend, names: tuple[F.TapName, ...]) -> None:
    case = make_case(0, T=6, H=5, E=3, I=2)

    def loss(experts: F.Experts, x: Tensor, taps: Taps) -> tuple[Tensor, tuple[()]]:
        return F.bank(experts, x, case.weights, taps[0], min_k=1, backend=backend).square().sum(), ()

    taps = (F.zero_taps(names, tokens=6, experts=case.experts),)
    transformed = F.surprise_and_grad(loss, taps=taps, engine="func")
    torch._dynamo.reset()
    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    assert_close(compiled(case.experts, case.x), transformed(case.experts, case.x), bound=BOUND)


CASE = make_case(0, T=4, H=3, E=2, I=2)
REFUSED: dict[str, Callable[[], object]] = {
    "weights": partial(F.parameter_surprise, local_of(CASE), CASE.x, CASE.weights[:3], CASE.dy),
    "dy": partial(F.counterfactual_surprise, local_of(CASE), CASE.x, CASE.dy[:3]),
    "surprise": partial(F.normalised_surprise, CASE.weights[0], CASE.weights),
    "gate": partial(F.input_surprise, local_of(CASE), F.Experts(*(w[:1] for w in CASE.experts)), CASE.weights),
    "x": partial(F.neuron_surprise, local_of(CASE), CASE.x[:3], CASE.weights, CASE.dy),
    "c3": partial(F.bias_gradients, local_of(CASE)._replace(c3=CASE.x), CASE.weights),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tensors_that_do_not_fit_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} .*expected \["):
        REFUSED[name]()
