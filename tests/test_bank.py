"""The expert bank against a loop, transformers and `torch.func`: values, gradients, taps, engines, cost and errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain, combinations
from typing import cast, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear, silu
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import onn.functional as F
from onn import tree
from onn.functional.kernels.backends import Backend
from tests.support import (
    BOUND,
    Case,
    Inputs,
    assert_close,
    assert_same,
    cases,
    differentiate,
    inputs_of,
    make_case,
    measures,
    normal,
    project,
    record,
    stacked,
    tolerance,
)

PEER_BOUND = 1e-10
TAPS: tuple[F.TapName, ...] = get_args(F.TapName)
TAP_SETS = list(chain.from_iterable(combinations(TAPS, size) for size in range(len(TAPS) + 1)))
ENGINES: tuple[tree.Engine, ...] = get_args(tree.Engine)


def specification(case: Case) -> F.BankGrads:
    _, residuals = F.bank_forward(case.experts, case.x, case.weights)
    return F.bank_vjp(case.experts, case.x, case.weights, residuals, case.dy, select=None)


def without_bias(taps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What no mask changes."""
    return {name: tap for name, tap in taps.items() if name != "bias"}


def by_loop(experts: F.Experts, x: Tensor, weights: Tensor) -> Tensor:
    rows = []
    for x_H, w_E in zip(x, weights, strict=True):
        y_H = torch.zeros_like(x_H)
        for gate, up, down, w in zip(*experts, w_E, strict=True):
            y_H = y_H + w * (down.mT @ (silu(gate @ x_H) * (up @ x_H)))
        rows.append(y_H)
    return torch.stack(rows)


@given(cases())
def test_bank_forward_is_the_loop_over_tokens_and_experts(case: Case) -> None:
    y, residuals = F.bank_forward(case.experts, case.x, case.weights)
    assert_close(y, by_loop(case.experts, case.x, case.weights), bound=BOUND)
    for got, matrix in zip(residuals, (case.experts.gate, case.experts.up), strict=True):
        assert_close(got, torch.einsum("th,eih->tei", case.x, matrix), bound=BOUND)
    assert_close(project(inputs_of(case), case.dy, min_k=1)[1], y, bound=BOUND)


@given(cases())
def test_bank_vjp_is_the_gradient_of_bank_forward_and_of_the_loop(case: Case) -> None:
    got = specification(case)._replace(surprise=case.weights)

    def forward(grads: F.BankGrads) -> Tensor:
        return (F.bank_forward(grads.experts, grads.x, grads.weights)[0] * case.dy).sum()

    def loop(grads: F.BankGrads) -> Tensor:
        return (by_loop(grads.experts, grads.x, grads.weights) * case.dy).sum()

    at = F.BankGrads(experts=case.experts, x=case.x, weights=case.weights, surprise=case.weights)
    for function in (forward, loop):
        assert_close(got, tree.grad(function)(at)._replace(surprise=case.weights), bound=BOUND)


@given(cases(), st.integers(0, 2**20))
def test_bank_vjp_selects_expert_gradients_by_any_rule_and_nothing_else(case: Case, seed: int) -> None:
    keep = normal(seed, *case.weights.shape) > 0
    _, residuals = F.bank_forward(case.experts, case.x, case.weights)
    arguments = (case.experts, case.x, case.weights, residuals, case.dy)
    got, plain = F.bank_vjp(*arguments, select=lambda s, active: keep), F.bank_vjp(*arguments, select=None)
    masked = F.bank_vjp(case.experts, case.x, case.weights * keep, residuals, case.dy, select=None)
    assert_close(got.experts, masked.experts, bound=BOUND)
    assert_same((got.x, got.weights, got.surprise), (plain.x, plain.weights, plain.surprise))


def from_peer(gate_up: Tensor, down: Tensor) -> F.Experts:
    gate, up = gate_up.chunk(2, dim=1)
    return F.Experts(gate=gate, up=up, down=down.mT)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_bank_under_top_k_route_is_the_block_of_transformers(k: int, normalise: bool) -> None:
    config = Qwen3MoeConfig(
        hidden_size=8, moe_intermediate_size=3, num_experts=5, num_experts_per_tok=k, norm_topk_prob=normalise
    )
    config._experts_implementation = "eager"
    block = Qwen3MoeSparseMoeBlock(config).double()
    leaves = [*block.parameters(), normal(9, 7, 8).requires_grad_()]
    for position, leaf in enumerate(leaves):
        leaf.data.copy_(normal(position, *leaf.shape) / 8**0.5)
    gate_up, down, router, x = leaves
    experts, dy = from_peer(gate_up, down), normal(10, 7, 8)
    learning = leaves if k > 1 or not normalise else [gate_up, down, x]  # a lone weight is 1 whatever the router says

    def compare(expected: Tensor, weights: Tensor) -> None:
        for min_k in {k, 5}:
            got = F.bank(experts, x, weights, {}, min_k=min_k, backend="dense")
            assert_close(got, expected, bound=PEER_BOUND)
            gradients = [torch.autograd.grad((y * dy).sum(), learning, retain_graph=True) for y in (got, expected)]
            assert_close(*gradients, bound=PEER_BOUND)

    logits = linear(x, router)
    in_float32 = F.top_k_route(logits.float(), k=k, normalise=normalise).weights
    compare(block(x[None])[0], in_float32.double())
    weights = F.top_k_route(logits, k=k, normalise=normalise).weights
    top = weights.topk(k)
    compare(block.experts(x, top.indices, top.values), weights)


@given(cases(), st.sampled_from(TAP_SETS), st.sampled_from(ENGINES))
def test_with_every_expert_kept_bank_is_bank_vjp_without_a_selection(
    case: Case, taps: tuple[F.TapName, ...], engine: tree.Engine
) -> None:
    got = differentiate(case, min_k=case.weights.shape[1], taps=taps, engine=engine)
    expected = specification(case)
    assert_close((got.experts, got.x, got.weights), (expected.experts, expected.x, expected.weights), bound=BOUND)
    assert_close(got.taps, {name: measures(case)[name] for name in taps}, bound=BOUND)


@given(cases(), st.sampled_from(TAP_SETS))
def test_engines_agree_and_taps_change_no_gradient_bit_for_bit(case: Case, taps: tuple[F.TapName, ...]) -> None:
    for min_k in {1, case.weights.shape[1]}:
        plain = differentiate(case, min_k=min_k)
        for engine in ENGINES:
            got = differentiate(case, min_k=min_k, taps=taps, engine=engine)
            assert_same(got._replace(taps={}), plain)


def edges() -> dict[str, Case]:
    plain = make_case(3, T=5, H=6, E=4, I=3, density=1.0)
    one = torch.zeros_like(plain.weights)
    one[:, 2] = plain.weights[:, 2]
    lonely = torch.zeros_like(plain.weights)
    lonely[1, 3] = -2.0
    empty = plain.weights.clone()
    empty[:, [0, 2]] = 0
    nobody = Case(plain.experts, plain.x[:0], plain.weights[:0], plain.dy[:0])
    return {
        "all tokens on one expert": plain._replace(weights=one),
        "one active pair": plain._replace(weights=lonely),
        "empty experts": plain._replace(weights=empty),
        "no active pair": plain._replace(weights=torch.zeros_like(plain.weights)),
        "one token": Case(plain.experts, plain.x[:1], plain.weights[:1], plain.dy[:1]),
        "no token": nobody,
        "zero input": plain._replace(x=torch.zeros_like(plain.x)),
        "zero gradient": plain._replace(dy=torch.zeros_like(plain.dy)),
    }


@pytest.mark.parametrize("name", edges())
def test_degenerate_banks_are_the_untied_definition(name: str) -> None:
    case = edges()[name]

    def loss(inputs: Inputs) -> Tensor:
        y, _ = F.bank_forward(inputs.experts, inputs.x, inputs.weights)
        return (y * case.dy).sum()

    expected = tree.grad(loss)(inputs_of(case))
    got = differentiate(case, min_k=4, taps=TAPS)
    assert_close(got._replace(taps={}), expected._replace(taps={}), bound=BOUND)
    assert_close(got.taps, measures(case), bound=BOUND)
    for min_k in range(1, 4):
        masked = differentiate(case, min_k=min_k, taps=TAPS)
        kept = F.min_k_mask(got.taps["surprise"], case.weights != 0, min_k=min_k)
        learning = case._replace(weights=torch.where(kept, case.weights, 0))
        assert_close(masked.taps["bias"], measures(learning)["bias"], bound=BOUND)
        unmasked, whole = (without_bias(one.taps) for one in (masked, got))
        assert_same((masked.x, masked.weights, unmasked), (got.x, got.weights, whole))


@pytest.mark.parametrize("min_k", [1, 4])
def test_gradients_of_stride_zero_are_those_of_their_contiguous_copies(min_k: int) -> None:
    case = make_case(4, T=5, H=6, E=4, I=3)._replace(dy=torch.ones(5, 6, dtype=torch.float64))
    leaves = [leaf.clone().requires_grad_() for leaf in (*case.experts, case.x, case.weights)]
    F.bank(F.Experts(*leaves[:3]), leaves[3], leaves[4], {}, min_k=min_k, backend="dense").sum().backward()
    expected = differentiate(case, min_k=min_k)
    grads = tuple(leaf.grad for leaf in leaves if leaf.grad is not None)
    assert_same(grads, (*expected.experts, expected.x, expected.weights))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("min_k", [1, 4])
def test_inputs_of_any_strides_give_the_same(min_k: int, engine: tree.Engine) -> None:
    case = make_case(5, T=5, H=6, E=4, I=3)
    strided = tree.map1(lambda leaf: leaf.mT.contiguous().mT, case)
    spaced = tree.map1(lambda leaf: torch.stack([leaf, leaf * torch.nan], dim=-1)[..., 0], case)
    expected = differentiate(case, min_k=min_k, taps=TAPS)
    for other in (strided, spaced):
        assert not any(leaf.is_contiguous() for leaf in tree.leaves(other))
        assert_close(differentiate(other, min_k=min_k, taps=TAPS, engine=engine), expected, bound=BOUND)


@pytest.mark.parametrize("taps", [(), TAPS])
@pytest.mark.parametrize("min_k", [1, 2, 4])
def test_an_ensemble_under_vmap_is_the_loop_over_its_models(min_k: int, taps: tuple[F.TapName, ...]) -> None:
    models = [make_case(seed, T=5, H=6, E=4, I=3, density=density) for seed, density in ((0, 0.3), (9, 0.7), (50, 1.0))]
    inputs = [inputs_of(case, taps) for case in models]
    ensemble = stacked(inputs)
    dy = torch.stack([case.dy for case in models])

    def everything(inputs: Inputs, dy: Tensor) -> tuple[Tensor, Inputs]:
        (_, y), gradient = tree.value_and_grad(project, engine="func")(inputs, dy, min_k=min_k)
        return y, gradient

    def on_shared_tokens(inputs: Inputs, dy: Tensor) -> tuple[Tensor, Inputs]:
        return everything(inputs._replace(x=models[0].x), dy)

    for function in (everything, on_shared_tokens):
        got = tree.vmap(function, (0, 0))(ensemble, dy)
        for position, case in enumerate(models):
            one = tree.unflatten(got, [leaf[position] for leaf in tree.leaves(got)])
            assert_close(one, function(inputs[position], case.dy), bound=BOUND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("min_k", [2, 8])
@pytest.mark.parametrize("seed", range(3))
def test_narrow_dtypes_stay_within_their_roundings_of_float64(seed: int, min_k: int, dtype: torch.dtype) -> None:
    case = make_case(seed, T=32, H=24, E=8, I=6, dtype=dtype)
    exact = tree.map1(Tensor.double, case)
    got = differentiate(case, min_k=min_k, taps=TAPS)
    keep = F.min_k_mask(got.taps["surprise"], case.weights != 0, min_k=min_k)
    _, residuals = F.bank_forward(*exact[:3])
    expected = F.bank_vjp(*exact[:3], residuals, exact.dy, select=lambda surprise, active: keep)
    assert {leaf.dtype for leaf in tree.leaves(got._replace(taps={}))} == {dtype}
    assert {leaf.dtype for leaf in tree.leaves(got.taps)} == {torch.float32}
    # at most sixteen roundings, of half an eps each, stand between the inputs and any gradient
    bound = tolerance(dtype, terms=1)
    assert_close((got.experts, got.x, got.weights), (expected.experts, expected.x, expected.weights), bound=bound)
    learning = exact._replace(weights=torch.where(keep, exact.weights, 0))
    taps = {**measures(exact), "bias": measures(learning)["bias"]}
    assert_close(got.taps, taps, bound=2 * bound)  # those of neurons and matrices are squared
    y, y64 = (project(inputs_of(c), c.dy, min_k=min_k)[1] for c in (case, exact))
    assert y.dtype == dtype
    assert_close(y, y64, bound=bound)


def test_a_lone_tensor_is_the_tap_of_surprise() -> None:
    case = make_case(0, T=4, H=5, E=3, I=2)
    tap = torch.zeros_like(case.weights, requires_grad=True)
    y = F.bank(case.experts, case.x, case.weights, tap, min_k=2, backend="dense")
    assert_same(torch.autograd.grad((y * case.dy).sum(), tap)[0], measures(case)["surprise"])


def test_zero_taps_are_zeros_in_the_dtype_of_reductions() -> None:
    for dtype, reduced in ((torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
        experts = make_case(0, T=1, H=5, E=3, I=2, dtype=dtype).experts
        taps = F.zero_taps(TAPS, tokens=4, experts=experts)
        shapes: dict[str, tuple[int, ...]] = {"surprise": (4, 3), "counterfactual": (4, 3)}
        shapes |= {"neuron": (3, 2), "matrix": (3, 3, 2), "bias": (2, 3, 2)}
        assert_same(taps, {name: torch.zeros(shape, dtype=reduced) for name, shape in shapes.items()})
    assert F.zero_taps((), tokens=4, experts=experts) == {}
    with pytest.raises(ValueError, match="unknown name='surprize'; did you mean 'surprise'"):
        F.zero_taps((cast("F.TapName", "surprize"),), tokens=4, experts=experts)


def backward(case: Case, min_k: int, taps: Mapping[str, Tensor], *, teach: bool = True) -> None:
    experts, x = tree.map1(lambda leaf: leaf.clone().requires_grad_(), (case.experts, case.x))
    learnt = experts if teach else tree.detach(experts)
    project(Inputs(learnt, x, case.weights, taps), case.dy, min_k=min_k)[0].backward()


@pytest.mark.parametrize("differentiated", TAP_SETS)
@pytest.mark.parametrize("teach", [True, False])
@pytest.mark.parametrize("min_k", [2, 3])
def test_a_tap_that_is_not_differentiated_costs_nothing_and_stays_empty(
    differentiated: tuple[F.TapName, ...], teach: bool, min_k: int
) -> None:
    case = make_case(1, T=4, H=5, E=3, I=2)

    def zeros(names: tuple[F.TapName, ...]) -> dict[str, Tensor]:
        return F.zero_taps(names, tokens=4, experts=case.experts)

    taps = {name: zero.requires_grad_(name in differentiated) for name, zero in zeros(TAPS).items()}
    offered = record(lambda: backward(case, min_k, taps, teach=teach)).operators
    assert {name for name, tap in taps.items() if tap.grad is not None} == set(differentiated)
    alone = {name: zero.requires_grad_() for name, zero in zeros(differentiated).items()}
    asked = record(lambda: backward(case, min_k, alone, teach=teach)).operators
    assert offered == asked
    selects = min_k < 3 and (teach or "bias" in differentiated)
    by_norm = selects or "surprise" in differentiated or "counterfactual" in differentiated
    squares = "neuron" in differentiated or "matrix" in differentiated
    assert bool(asked["aten.hypot.default"]) == by_norm
    assert bool(asked["aten.linalg_vector_norm.default"]) == (by_norm or squares)
    assert bool(asked["aten.sort.stable"]) == selects
    assert bool(asked["onn.segment_outer.default"]) == (selects and teach)
    assert asked["aten.pow.Tensor_Scalar"] == 3 * squares
    assert asked["aten.stack.default"] == squares + ("bias" in differentiated)


def test_the_plain_layer_multiplies_no_more_than_stock_autograd() -> None:
    case = make_case(1, T=8, H=6, E=4, I=3)
    leaves = [leaf.clone().requires_grad_() for leaf in (*case.experts, case.x, case.weights)]
    experts = F.Experts(*leaves[:3])

    def flops(forward: Callable[[F.Experts, Tensor, Tensor], Tensor]) -> int:
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(forward(experts, leaves[3], leaves[4]), leaves, case.dy)
        return int(counter.get_total_flops())

    ours = flops(lambda experts, x, weights: F.bank(experts, x, weights, {}, min_k=4, backend="dense"))
    assert 0 < ours <= flops(lambda experts, x, weights: F.bank_forward(experts, x, weights)[0])


@pytest.mark.parametrize("min_k", [1, 3, 16])
def test_nothing_of_tokens_by_experts_by_hidden_is_ever_made(min_k: int) -> None:
    T, H, E, I = 24, 32, 16, 4
    case = make_case(1, T=T, H=H, E=E, I=I)
    taps = {name: zero.requires_grad_() for name, zero in inputs_of(case, TAPS).taps.items()}
    assert 0 < record(lambda: backward(case, min_k, taps)).largest < T * E * H


@pytest.mark.parametrize("taps", [(), TAPS])
@pytest.mark.parametrize("min_k", [1, 3])
@pytest.mark.parametrize("field", ["x", "weights", "gate", "up", "down"])
def test_second_derivative_is_an_error(field: str, min_k: int, taps: tuple[F.TapName, ...]) -> None:
    case = make_case(2, T=4, H=5, E=3, I=2, density=1.0)
    inputs = inputs_of(case, taps)
    start = {"x": case.x, "weights": case.weights, **case.experts._asdict()}[field]

    def loss(leaf: Tensor) -> Tensor:
        match field:
            case "x":
                at = inputs._replace(x=leaf)
            case "weights":
                at = inputs._replace(weights=leaf)
            case _:
                at = inputs._replace(experts=F.Experts(**{**inputs.experts._asdict(), field: leaf}))
        return project(at, case.dy, min_k=min_k)[1].square().sum()

    with pytest.raises(RuntimeError, match="differentiable once"):
        tree.grad(lambda leaf: tree.grad(loss)(leaf).square().sum())(start)
    leaf = start.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(first.square().sum(), leaf)


def call(
    case: Case, *, tap: Tensor | Mapping[str, Tensor] | None = None, min_k: int = 2, backend: str = "dense"
) -> None:
    F.bank(*case[:3], {} if tap is None else tap, min_k=min_k, backend=cast("Backend", backend))


def test_errors_name_the_argument_its_value_and_the_shapes() -> None:
    case = make_case(2, T=4, H=5, E=3, I=2)
    gate, up, down = case.experts
    experts = case.experts
    for wrong, name in (
        (case._replace(x=case.x[:, :4]), "x"),
        (case._replace(weights=case.weights[:3]), "weights"),
        (case._replace(weights=case.weights[0]), "weights"),
        (case._replace(experts=experts._replace(up=up[:2])), "up"),
        (case._replace(experts=experts._replace(down=down.mT)), "down"),
        (case._replace(experts=experts._replace(gate=gate[0])), "gate|up"),
    ):
        with pytest.raises(ValueError, match=rf"bank: shape of ({name}) does not fit: gate \["):
            call(wrong)
    for min_k in (0, 4, -1):
        with pytest.raises(ValueError, match=f"bank: expected 1 <= min_k={min_k} <= 3"):
            call(case, min_k=min_k)
    with pytest.raises(ValueError, match="bank: unknown backend='dens'; did you mean 'dense'"):
        call(case, backend="dens")
    for mixed in (case._replace(weights=case.weights.float()), case._replace(x=case.x.bfloat16())):
        with pytest.raises(ValueError, match=r"bank: experts, x and weights differ in dtype: \['torch\."):
            call(mixed)
    zeros = torch.zeros(4, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="bank: unknown tap='suprise'; did you mean 'surprise'"):
        call(case, tap={"suprise": zeros})
    with pytest.raises(ValueError, match=r"tap neuron does not fit: tap neuron \[4, 3, 1\] \(expected \[E, I\]\)"):
        call(case, tap={"neuron": zeros[..., None]})
    for tap in (zeros.mT, {"counterfactual": zeros[:, :2]}, {"surprise": zeros[0]}):
        with pytest.raises(ValueError, match=r"bank: shape of .* does not fit: tap"):
            call(case, tap=tap)
