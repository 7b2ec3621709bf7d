"""The sparse backends of `bank` against the dense one: numbers, transforms, compilation, edges, and how they cut up."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import onn.functional as F
from onn import tree
from onn.functional.kernels.tilings import NATIVE, Tiling
from tests.support import (
    BOUND,
    TILINGS,
    Case,
    Chosen,
    Inputs,
    assert_close,
    assert_same,
    can_compile,
    cases,
    differentiate,
    each_backend,
    inputs_of,
    least_pairs,
    make_case,
    measures,
    pair_bias_gradients,
    pair_gradients,
    pair_norms,
    project,
    record,
    stacked,
    there_are,
    tolerance,
)

UNMASKED: tuple[F.TapName, ...] = ("surprise", "neuron", "matrix")
TAPS: tuple[F.TapName, ...] = (*UNMASKED, "bias")
CUTS = (Tiling(12, 0.5), Tiling(40, 2.0), Tiling(1000, 0.0), Tiling(1, 9.0), Tiling(NATIVE, 0.4), Tiling(NATIVE, 2.0))
ROOM = F.Bounded("grouped", 4)
SPARSE: tuple[Chosen, ...] = ("grouped", "loop", "native", ROOM, *CUTS)
BACKENDS: tuple[Chosen, ...] = (*get_args(F.Backend), ROOM, *CUTS)
ENGINES: tuple[tree.Engine, ...] = get_args(tree.Engine)

every_backend, sparse = each_backend(*BACKENDS), each_backend(*SPARSE)
each_kind = each_backend("grouped", "loop", "native", ROOM)


def of_active(gradient: Inputs, case: Case) -> Inputs:
    """Without the gradient of the combine weights that are 0."""
    return gradient._replace(weights=torch.where(case.weights != 0, gradient.weights, 0))


def fitted(backend: Chosen, case: Case) -> Chosen:
    return F.Bounded("grouped", case.weights.shape[1]) if backend == ROOM else backend


def evaluate(inputs: Inputs, dy: Tensor, *, min_k: int, backend: Chosen) -> tuple[Tensor, Inputs]:
    """The bank's output and the gradient of everything."""
    (_, y), gradient = tree.value_and_grad(project, engine="func")(inputs, dy, min_k=min_k, backend=backend)
    return y, gradient


@given(cases(), TILINGS, st.data())
def test_however_a_bank_is_cut_up_its_numbers_are_those_of_the_dense_one(
    case: Case, tiling: Tiling, data: st.DataObject
) -> None:
    min_k = data.draw(st.integers(1, case.weights.shape[1]))
    y, gradient = evaluate(inputs_of(case, TAPS), case.dy, min_k=min_k, backend="dense")
    got = evaluate(inputs_of(case, TAPS), case.dy, min_k=min_k, backend=tiling)
    assert_close(got, (y, of_active(gradient, case)), bound=BOUND)


@given(cases(), st.sampled_from(there_are(*BACKENDS)), st.sampled_from([(), ("surprise",), TAPS]))
def test_engines_agree_and_taps_change_no_gradient_bit_for_bit(
    case: Case, backend: Chosen, taps: tuple[F.TapName, ...]
) -> None:
    backend = fitted(backend, case)
    for min_k in {1, case.weights.shape[1]}:
        plain = differentiate(case, min_k=min_k, backend=backend)
        for engine in ENGINES:
            got = differentiate(case, min_k=min_k, taps=taps, engine=engine, backend=backend)
            assert_same(got._replace(taps={}), plain)


@given(cases(), st.sampled_from(there_are(*BACKENDS)))
def test_smk_masks_the_experts_alone(case: Case, backend: Chosen) -> None:
    plain, masked = (
        differentiate(case, min_k=min_k, taps=UNMASKED, backend=fitted(backend, case))
        for min_k in (case.weights.shape[1], 1)
    )
    assert_same(masked._replace(experts=plain.experts), plain)


@given(cases(), st.sampled_from(there_are(*BACKENDS)), st.data())
def test_biases_are_of_the_pairs_that_learn_whether_or_not_the_experts_do(
    case: Case, backend: Chosen, data: st.DataObject
) -> None:
    min_k = data.draw(st.integers(1, case.weights.shape[1]))
    backend = fitted(backend, case)
    biases = pair_bias_gradients(case)
    keep = least_pairs(pair_norms(pair_gradients(case)), case.weights, min_k=min_k)
    expected = torch.where(keep[:, None, :, None], biases, 0).sum(dim=0)
    together = differentiate(case, min_k=min_k, taps=TAPS, backend=backend).taps["bias"]
    tap = inputs_of(case, ("bias",)).taps["bias"].requires_grad_()
    y = F.bank(case.experts, case.x, case.weights, {"bias": tap}, min_k=min_k, backend=backend)
    (alone,) = torch.autograd.grad(y, tap, case.dy)
    assert_same(alone, together)
    assert_close(alone, expected, bound=BOUND)


@sparse
@pytest.mark.parametrize("min_k", [1, 2, 4])
def test_edges(backend: Chosen, min_k: int) -> None:
    plain = make_case(3, T=5, H=6, E=4, I=3, density=1.0)
    one, lonely, empty = torch.zeros_like(plain.weights), torch.zeros_like(plain.weights), plain.weights.clone()
    one[:, 2] = plain.weights[:, 2]
    lonely[1, 3] = -2.0
    empty[:, [0, 2]] = 0
    for case in (
        plain._replace(weights=one),
        plain._replace(weights=lonely),
        plain._replace(weights=empty),
        plain._replace(weights=torch.zeros_like(plain.weights)),
        Case(plain.experts, plain.x[:1], plain.weights[:1], plain.dy[:1]),
        Case(plain.experts, plain.x[:0], plain.weights[:0], plain.dy[:0]),
        plain._replace(x=torch.zeros_like(plain.x)),
        plain._replace(dy=torch.ones(()).double().expand(5, 6)),
        tree.map1(lambda leaf: leaf.mT.contiguous().mT, plain),
        tree.map1(lambda leaf: torch.stack([leaf, leaf * torch.nan], dim=-1)[..., 0], plain),
    ):
        expected = of_active(differentiate(case, min_k=min_k, taps=TAPS), case)
        for engine in ENGINES:
            got = differentiate(case, min_k=min_k, taps=TAPS, engine=engine, backend=backend)
            assert_close(got, expected, bound=BOUND)


@every_backend
@pytest.mark.parametrize("min_k", [1, 4])
def test_a_gradient_of_stride_zero_is_that_of_its_copy(backend: Chosen, min_k: int) -> None:
    case = make_case(4, T=5, H=6, E=4, I=3)._replace(dy=torch.ones(5, 6, dtype=torch.float64))
    leaves = [leaf.clone().requires_grad_() for leaf in (*case.experts, case.x, case.weights)]
    F.bank(F.Experts(*leaves[:3]), leaves[3], leaves[4], {}, min_k=min_k, backend=backend).sum().backward()
    expected = differentiate(case, min_k=min_k, backend=backend)
    assert_same(tuple(leaf.grad for leaf in leaves if leaf.grad is not None), tuple(tree.leaves(expected)))


def models() -> list[Case]:
    return [make_case(seed, T=5, H=6, E=4, I=3, density=density) for seed, density in ((0, 0.3), (9, 0.7), (50, 1.0))]


Member = Callable[[Inputs, Tensor], tuple[Tensor, Inputs]]


def members(backend: Chosen, min_k: int) -> list[Member]:
    """Ways to share things between the members of an ensemble."""
    first = inputs_of(models()[0], TAPS)

    def alone(inputs: Inputs, dy: Tensor) -> tuple[Tensor, Inputs]:
        return evaluate(inputs, dy, min_k=min_k, backend=backend)

    return [
        alone,
        lambda inputs, dy: alone(inputs._replace(x=first.x), dy),
        lambda inputs, dy: alone(first._replace(weights=inputs.weights), dy),
        lambda inputs, dy: alone(first, dy),
    ]


@sparse
@pytest.mark.parametrize("min_k", [1, 2, 4])
def test_an_ensemble_under_vmap_is_the_loop_over_its_models(backend: Chosen, min_k: int) -> None:
    inputs, dys = [inputs_of(case, TAPS) for case in models()], [case.dy for case in models()]
    for member in members(backend, min_k):
        got = tree.vmap(member, (0, 0))(stacked(inputs), torch.stack(dys))
        assert_close(got, stacked([member(*pair) for pair in zip(inputs, dys, strict=True)]), bound=BOUND)


@each_kind
def test_an_ensemble_of_ensembles(backend: Chosen) -> None:
    inputs, dys = [inputs_of(case, TAPS) for case in models()], [case.dy for case in models()]
    member = members(backend, 2)[0]
    twice = tree.vmap(tree.vmap(member, (0, 0)), (0, None))
    shifted = [stacked(inputs), tree.map1(lambda leaf: leaf.flip(0), stacked(inputs))]
    expected = stacked([tree.vmap(member, (0, 0))(one, torch.stack(dys)) for one in shifted])
    assert_close(twice(stacked(shifted), torch.stack(dys)), expected, bound=BOUND)


@every_backend
@pytest.mark.parametrize("min_k", [2, 4])
def test_an_ensemble_pulls_many_gradients_back_through_one_forward_pass_each(backend: Chosen, min_k: int) -> None:
    """An inner `vmap` around the backward pass alone, as in `jacrev`."""
    inputs, dys = [inputs_of(case, TAPS) for case in models()], torch.stack([case.dy for case in models()])

    def pulled(inputs: Inputs) -> Inputs:
        def output(given: Inputs) -> Tensor:
            return F.bank(*given, min_k=min_k, backend=backend)

        pull = torch.func.vjp(output, inputs)[1]

        def gradient(dy: Tensor) -> Inputs:
            found: Inputs = pull(dy)[0]
            return found

        return tree.vmap(gradient, (0,))(dys)

    got = tree.vmap(pulled, (0,))(stacked(inputs))
    one_by_one = [stacked([evaluate(one, dy, min_k=min_k, backend=backend)[1] for dy in dys]) for one in inputs]
    assert_close(got, stacked(one_by_one), bound=BOUND)


@every_backend
def test_autocast_changes_nothing(backend: Chosen) -> None:
    case = models()[1]
    inputs = tree.map1(Tensor.float, inputs_of(case, TAPS))
    expected = evaluate(inputs, case.dy.float(), min_k=2, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(evaluate(inputs, case.dy.float(), min_k=2, backend=backend), expected)


@each_backend("dense", "grouped", "loop", "native")
@pytest.mark.parametrize("min_k", [2, 4])
def test_compiled_gradients_are_the_eager_ones_for_any_number_of_pairs(backend: F.Backend, min_k: int) -> None:
    def member(inputs: Inputs, dy: Tensor) -> tuple[Tensor, Inputs]:
        return evaluate(inputs, dy, min_k=min_k, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(member, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for case in models():
            inputs = inputs_of(case, TAPS)
            assert_close(compiled(inputs, case.dy), member(inputs, case.dy), bound=BOUND)


@each_kind
def test_a_compiled_ensemble_is_the_eager_one(backend: Chosen) -> None:
    member = tree.vmap(members(backend, 2)[0], (0, 0))
    torch._dynamo.reset()
    compiled = torch.compile(member, fullgraph=True, dynamic=False, backend="aot_eager")
    inputs, dys = stacked([inputs_of(case, TAPS) for case in models()]), torch.stack([case.dy for case in models()])
    assert_close(compiled(inputs, dys), member(inputs, dys), bound=BOUND)


@can_compile
@each_kind
def test_code_that_a_compiler_wrote_gives_the_same(backend: Chosen) -> None:
    def member(inputs: Inputs, dy: Tensor) -> tuple[Tensor, Inputs]:
        return evaluate(inputs, dy, min_k=2, backend=backend)

    torch._dynamo.reset()
    case = models()[1]
    compiled = torch.compile(member, fullgraph=True, dynamic=False)
    inputs = inputs_of(case, TAPS)
    assert_close(compiled(inputs, case.dy), member(inputs, case.dy), bound=BOUND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_backend("grouped", F.Bounded("grouped", 8), "loop", Tiling(2000, 0.4), "native")
@pytest.mark.parametrize("min_k", [2, 8])
def test_narrow_dtypes_stay_within_their_roundings_of_float64(min_k: int, backend: Chosen, dtype: torch.dtype) -> None:
    if backend == "native" and dtype == torch.float16:
        pytest.skip("native code has no float16")
    case = make_case(1, T=32, H=24, E=8, I=16, dtype=dtype)
    exact = tree.map1(Tensor.double, case)
    got = differentiate(case, min_k=min_k, taps=TAPS, backend=backend)
    keep = F.min_k_mask(got.taps["surprise"], case.weights != 0, min_k=min_k)
    _, residuals = F.bank_forward(*exact[:3])
    expected = F.bank_vjp(*exact[:3], residuals, exact.dy, select=lambda surprise, active: keep)
    d_weights = torch.where(case.weights != 0, expected.weights, 0)
    assert {leaf.dtype for leaf in tree.leaves(got._replace(taps={}))} == {dtype}
    # at most sixteen roundings, of half an eps each, stand between the inputs and any gradient
    bound = tolerance(dtype, terms=1)
    assert_close((got.experts, got.x, got.weights), (expected.experts, expected.x, d_weights), bound=bound)
    dense = differentiate(exact, min_k=8, taps=UNMASKED)
    learning = exact._replace(weights=torch.where(keep, exact.weights, 0))
    taps = {**dense.taps, "bias": measures(learning)["bias"]}
    assert {leaf.dtype for leaf in tree.leaves(got.taps)} == {torch.float32}
    assert_close(got.taps, taps, bound=2 * bound)  # those of neurons and matrices are squared


@every_backend
@pytest.mark.parametrize("min_k", [1, 3])
def test_taps_of_bfloat16_sum_over_tokens_in_float32(backend: Chosen, min_k: int) -> None:
    """Of equal tokens with one input, whose products round as those of a token alone."""
    one = make_case(0, T=1, H=1, E=4, I=2, density=1.0, dtype=torch.bfloat16)
    many = Case(one.experts, *(leaf.repeat(257, 1) for leaf in one[1:]))
    once, summed = (differentiate(case, min_k=min_k, taps=TAPS, backend=backend).taps for case in (one, many))
    for name in ("neuron", "matrix", "bias"):
        assert_close(summed[name], 257 * once[name], bound=tolerance(torch.float32, terms=257))


@each_backend("grouped", ROOM, Tiling(12, 2.0), Tiling(1, 2.0), Tiling(NATIVE, 2.0))
@pytest.mark.parametrize("min_k", [1, 4])
def test_what_is_not_finite_stays_with_its_token_and_its_experts(backend: Chosen, min_k: int) -> None:
    case = make_case(8, T=6, H=5, E=4, I=3, density=0.5)
    weights = case.weights.clone()
    weights[2] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    clean = differentiate(case._replace(weights=weights), min_k=min_k, taps=TAPS, backend=backend)
    for field in ("x", "dy"):
        values = getattr(case, field).clone()
        values[2] = torch.inf
        got = differentiate(case._replace(weights=weights, **{field: values}), min_k=min_k, taps=TAPS, backend=backend)
        others = [0, 1, 3, 4, 5]
        assert_same(tree.map1(lambda g: g[[0, 2, 3]], got.experts), tree.map1(lambda g: g[[0, 2, 3]], clean.experts))
        for name in ("neuron", "matrix", "bias"):
            assert_same(got.taps[name][..., [0, 2, 3], :], clean.taps[name][..., [0, 2, 3], :])
        for mine, plain in ((got.x, clean.x), (got.weights, clean.weights)):
            assert_close(mine[others], plain[others], bound=BOUND)
        assert not got.taps["surprise"][2, 1].isfinite()


@sparse
def test_nothing_of_tokens_by_experts_by_neurons_is_ever_made(backend: Chosen) -> None:
    T, H, E, I = 16, 8, 32, 16
    case = make_case(1, T=T, H=H, E=E, I=I, density=0.1)
    if backend == ROOM or (isinstance(backend, Tiling) and backend.whole_from == 0):
        return
    for min_k in (1, E):
        recorded = record(lambda: differentiate(case, min_k=min_k, taps=TAPS, backend=backend))  # noqa: B023
        assert 0 < recorded.largest < T * E * I


@every_backend
def test_what_does_not_learn_gets_no_gradient(backend: Chosen) -> None:
    case = make_case(1, T=4, H=5, E=4, I=2)
    for frozen in range(5):
        leaves = [leaf.clone() for leaf in (*case.experts, case.x, case.weights)]
        for position, leaf in enumerate(leaves):
            leaf.requires_grad_((position < 3) != (frozen < 3) if position < 3 or frozen < 3 else position != frozen)
        y = F.bank(F.Experts(*leaves[:3]), leaves[3], leaves[4], {}, min_k=3, backend=backend)
        (y * case.dy).sum().backward()
        expected = tree.leaves(differentiate(case, min_k=3, backend=backend))
        for leaf, gradient in zip(leaves, expected, strict=True):
            if leaf.requires_grad:
                assert leaf.grad is not None
                assert_same(leaf.grad, gradient)
            else:
                assert leaf.grad is None


@sparse
def test_the_counterfactual_needs_the_dense_computation(backend: Chosen) -> None:
    case = make_case(1, T=4, H=5, E=4, I=2)
    with pytest.raises(ValueError, match=r"bank: the counterfactual tap needs every expert computed: .*'dense', got"):
        differentiate(case, min_k=1, taps=("counterfactual",), backend=backend)
    got = differentiate(case, min_k=1, taps=("counterfactual",), backend="auto")
    assert_close(got, of_active(differentiate(case, min_k=1, taps=("counterfactual",)), case), bound=BOUND)


@sparse
@pytest.mark.parametrize("field", ["x", "gate"])
def test_second_derivative_is_an_error(backend: Chosen, field: str) -> None:
    case = make_case(2, T=4, H=5, E=4, I=2, density=1.0)

    def loss(leaf: Tensor) -> Tensor:
        inputs = inputs_of(case)
        at = inputs._replace(x=leaf) if field == "x" else inputs._replace(experts=inputs.experts._replace(gate=leaf))
        return project(at, case.dy, min_k=2, backend=backend)[1].square().sum()

    with pytest.raises(RuntimeError, match="differentiable once"):
        tree.grad(lambda leaf: tree.grad(loss)(leaf).square().sum())(case.x if field == "x" else case.experts.gate)


@each_backend("loop", "native", "auto")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_call_gives_the_same_bits(backend: F.Backend, dtype: torch.dtype) -> None:
    case = make_case(1, T=256, H=64, E=16, I=16, density=0.3, dtype=dtype)
    assert_same(*(differentiate(case, min_k=2, taps=TAPS, backend=backend) for _ in range(2)))


def by_expert(gradient: Inputs) -> list[Tensor]:
    """All that is summed over the tokens of an expert, [E, ...] each."""
    sums = (value.movedim(-2, 0) for name, value in gradient.taps.items() if name != "surprise")
    return [*gradient.experts, *sums]


@pytest.mark.parametrize(("backend", "min_k"), [(Tiling(1000, 2.0), 4), (Tiling(1000, 2.0), 1), ("dense", 1)], ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_rows_that_fill_up_a_part_bring_nothing_of_another_token(backend: Chosen, min_k: int, poison: float) -> None:
    """Of four experts in one part the first alone has the first and the last token, and the second has none."""
    taps: tuple[F.TapName, ...] = TAPS if backend != "dense" else ()
    case = make_case(3, T=9, H=4, E=4, I=3, density=1.0)
    first = torch.tensor([0, 8])
    counts = torch.tensor([9, 0, 3, 5])
    tokens = torch.arange(9)[:, None]
    held = torch.where(tokens > 0, tokens <= counts, False).index_fill(0, first, False)
    held[:, 0] = True
    case = case._replace(weights=torch.where(held, case.weights, 0))
    bad = case._replace(**{name: getattr(case, name).index_fill(0, first, poison) for name in ("x", "dy")})
    got, clean = (by_expert(differentiate(each, min_k=min_k, taps=taps, backend=backend)) for each in (bad, case))
    for mine, plain in zip(got, clean, strict=True):
        assert not mine[0].isfinite().all()
        assert_same(mine[1], torch.zeros_like(mine[1]))
        assert_same(mine[2:], plain[2:])
