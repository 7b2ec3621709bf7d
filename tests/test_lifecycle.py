"""Birth and death of experts: usage, heirs, rebirth, growth and pruning, and what each leaves of a layer's function."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import onn.functional as F
from onn import tree
from onn.functional.routing import Combine
from tests.support import assert_close, assert_same, normal, tolerance

COMBINES: tuple[Combine, ...] = get_args(Combine)
BOUND = tolerance(torch.float64, terms=64)
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
I, H = 2, 5
COUNTS = st.lists(st.sampled_from([0, 0, 1, 2, 5]), min_size=1, max_size=9)


class Layer(NamedTuple):
    experts: F.Experts
    router: F.Router


def make_layer(seed: int, *, E: int, threshold: float = 0.0, dtype: torch.dtype = torch.float64) -> Layer:
    gate, up, down = (normal(seed + i, E, I, H, dtype=dtype) for i in range(3))
    thresholds = (normal(seed + 4, E) * 0.1 + threshold).to(dtype)
    router = F.Router(prototypes=normal(seed + 3, E, H, dtype=dtype), thresholds=thresholds)
    return Layer(experts=F.Experts(gate=gate, up=up, down=down), router=router)


def run(layer: Layer, x: Tensor, *, combine: Combine) -> tuple[Tensor, F.Routing]:
    affinity = F.cosine_affinity(x, layer.router.prototypes, eps=1e-12)
    routing = F.threshold_route(affinity, layer.router.thresholds, squash="sigmoid", fallback_k=1, combine=combine)
    return F.bank_forward(layer.experts, x, routing.weights)[0], routing


def passed(routing: F.Routing) -> Tensor:
    return (routing.scores > 0).any(dim=-1)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Layer, Tensor]:
    """A layer and its tokens, some of which pass no threshold."""
    seed, E, T = draw(st.integers(0, 2**20)), draw(st.integers(1, 7)), draw(st.integers(1, 9))
    return make_layer(seed, E=E, threshold=draw(st.sampled_from([-0.3, 0.3]))), normal(seed + 5, T, H)


@given(layers(), st.sampled_from(COMBINES))
def test_usage_counts_tokens_before_and_after_the_fallback_and_adds_up(
    case: tuple[Layer, Tensor], combine: Combine
) -> None:
    layer, x = case
    _, routing = run(layer, x, combine=combine)
    got = F.usage(routing)
    for e in range(len(got.active)):
        assert int(got.routed[e]) == sum(value > 0 for value in routing.scores[:, e].tolist())
        assert int(got.active[e]) == sum(routing.active[:, e].tolist())
    assert (got.routed <= got.active).all()
    parts = [F.usage(F.Routing(*(part[rows] for part in routing))) for rows in (slice(0, 1), slice(1, None))]
    assert_same(F.Usage(*(a + b for a, b in zip(*parts, strict=True))), got)


@given(COUNTS)
def test_the_unused_inherit_from_the_most_used_and_every_donor_gives_once(values: list[int]) -> None:
    plan = F.heirs(torch.tensor(values))
    dead = [e for e, count in enumerate(values) if count == 0]
    by_use = sorted((e for e, count in enumerate(values) if count), key=lambda e: -values[e])
    pairs = dict(zip(dead, by_use, strict=False))
    assert plan.reborn.nonzero().flatten().tolist() == sorted(pairs)
    assert plan.donor.tolist() == [pairs.get(e, e) for e in range(len(values))]
    assert plan.halved.nonzero().flatten().tolist() == sorted([*pairs, *pairs.values()])
    donors = plan.donor[plan.reborn].tolist()
    assert len(donors) == len(set(donors)) == min(len(dead), len(values) - len(dead))
    assert all(values[donor] > 0 for donor in donors)


def reborn(layer: Layer, plan: F.Heirs, *, scale: float, share: float, seed: int = 9) -> Layer:
    noise = normal(seed, len(plan.donor), H)
    return Layer(*F.rebirth(*layer, plan, noise, scale=scale, share=share))


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 2**20), values=COUNTS, scale=st.floats(0, 2), share=st.sampled_from([0.5, 1.0]))
def test_the_reborn_take_their_donors_weights_and_all_others_keep_their_bits(
    dtype: torch.dtype, seed: int, values: list[int], scale: float, share: float
) -> None:
    layer = make_layer(seed, E=len(values), dtype=dtype)
    before = tree.map1(Tensor.clone, layer)
    plan = F.heirs(torch.tensor(values))
    (experts, router), noise = reborn(layer, plan, scale=scale, share=share), normal(9, len(values), H)
    assert_same(layer, before)
    donors = set(plan.donor[plan.reborn].tolist())
    for e, source in enumerate(plan.donor.tolist()):
        kept = share if e in donors or source != e else 1.0
        assert_same((experts.gate[e], experts.up[e]), (layer.experts.gate[source], layer.experts.up[source]))
        assert_same(experts.down[e], layer.experts.down[source] * kept)
        assert_same(router.thresholds[e], layer.router.thresholds[source])
        if source == e:
            assert_same(router.prototypes[e], layer.router.prototypes[e])
        else:
            inherited = layer.router.prototypes[source].double()
            expected = inherited + noise[e] / H**0.5 * inherited.norm() * scale
            assert_close(router.prototypes[e], expected, bound=tolerance(dtype, terms=1))


@pytest.mark.parametrize("scale", [0.0, 0.3])
@given(case=layers(), seed=st.integers(0, 2**20))
def test_under_sum_donor_and_reborn_together_give_what_the_donor_gave(
    scale: float, case: tuple[Layer, Tensor], seed: int
) -> None:
    layer, x = case
    before, routing = run(layer, x, combine="sum")
    plan = F.heirs(F.usage(routing).active)
    twins = reborn(layer, plan, scale=scale, share=0.5, seed=seed)
    after, routed = run(twins, x, combine="sum")
    together = (routed.active == routed.active[:, plan.donor]).all(dim=-1) & passed(routed)
    alike = together & passed(routing)
    assert_close(after[alike], before[alike], bound=100 * BOUND)
    if scale == 0:
        assert torch.equal(alike, passed(routing))


def lone(*, combine: Combine, actives: int) -> tuple[Layer, Tensor, F.Heirs]:
    """One token on which the first `actives` experts are active, the last expert being dead."""
    layer, x = make_layer(0, E=4), normal(8, 1, H)
    prototypes = torch.cat([x.expand(actives, H), -x.expand(4 - actives, H)])
    layer = layer._replace(router=layer.router._replace(prototypes=prototypes))
    assert run(layer, x, combine=combine)[1].active.tolist() == [[e < actives for e in range(4)]]
    return layer, x, F.heirs(torch.tensor([9, 1, 1, 0]))


@pytest.mark.parametrize("combine", COMBINES)
def test_a_token_that_chooses_one_of_two_twins_gets_the_donors_share(combine: Combine) -> None:
    layer, x, plan = lone(combine=combine, actives=1)
    share = 0.5 if combine == "sum" else 1.0
    twins = reborn(layer, plan, scale=0.0, share=share)
    far = twins.router.prototypes.clone()
    far[3] = -far[3]
    apart = twins._replace(router=twins.router._replace(prototypes=far))
    assert_close(run(apart, x, combine=combine)[0], share * run(layer, x, combine=combine)[0], bound=BOUND)


@pytest.mark.parametrize("actives", [1, 2, 3])
def test_under_uniform_a_twin_adds_the_donor_once_more_to_the_mean(actives: int) -> None:
    layer, x, plan = lone(combine="uniform", actives=actives)
    twins = reborn(layer, plan, scale=0.0, share=1.0)
    before, after = (run(part, x, combine="uniform")[0] for part in (layer, twins))
    alone, _, _ = lone(combine="sum", actives=1)
    donor, _ = run(alone, x, combine="sum")
    assert_close(after, (actives * before + donor) / (actives + 1), bound=BOUND)


def test_a_dead_expert_of_nan_is_healed_and_one_without_a_donor_stays() -> None:
    layer = make_layer(0, E=4)
    layer = tree.map1(lambda leaf: leaf.index_fill(0, torch.tensor([1, 2, 3]), torch.nan), layer)
    got = reborn(layer, F.heirs(torch.tensor([3, 0, 0, 0])), scale=0.1, share=0.5)
    for leaf in tree.leaves(got):
        assert leaf[:2].isfinite().all()
        assert leaf[2:].isnan().all()


@pytest.mark.parametrize("values", [[1, 2, 3], [0, 0, 0], [0]])
def test_nobody_is_reborn_without_both_dead_and_living(values: list[int]) -> None:
    layer, plan = make_layer(0, E=len(values)), F.heirs(torch.tensor(values))
    assert_same(reborn(layer, plan, scale=1.0, share=0.5), layer)
    assert not (plan.reborn | plan.halved).any()


@given(COUNTS, st.integers(0, 3), st.sampled_from([*DTYPES, torch.int64]))
def test_the_reborn_forget_and_all_others_remember(values: list[int], rank: int, dtype: torch.dtype) -> None:
    plan, state = F.heirs(torch.tensor(values)), (normal(0, len(values), *(2,) * rank) * 9).to(dtype)
    got = F.forget_reborn(state, plan)
    assert not got[plan.reborn].any()
    assert_same(got[~plan.reborn], state[~plan.reborn])
    assert got.dtype == dtype
    if dtype != torch.int64:
        assert_same(F.forget_reborn(torch.where(plan.reborn.view(-1, *(1,) * rank), torch.nan, state), plan), got)


def grown(layer: Layer, x: Tensor, unrouted: Tensor, *, threshold: float = 0.0) -> Layer:
    dtype = layer.experts.gate.dtype
    noise = F.Experts(*(normal(20 + i, 1, I, H, dtype=dtype) for i in range(3)))
    return Layer(*F.grow(*layer, x, unrouted, noise, threshold=threshold, scale=0.1))


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 2**20), chosen=st.lists(st.booleans(), min_size=1, max_size=6))
def test_growth_adds_one_expert_for_the_mean_of_the_unrouted_and_leaves_the_others(
    dtype: torch.dtype, seed: int, chosen: list[bool]
) -> None:
    layer, x, unrouted = (
        make_layer(seed, E=3, dtype=dtype),
        normal(seed, len(chosen), H, dtype=dtype),
        torch.tensor(chosen),
    )
    got = grown(layer, torch.where(unrouted[:, None], x, torch.nan), unrouted, threshold=0.5)
    assert_same(tree.map1(lambda leaf: leaf[:3], got), layer)
    assert {len(leaf) for leaf in tree.leaves(got)} == {4}
    rows = [row.double() for row, new in zip(x, chosen, strict=True) if new]
    mean = sum(rows, torch.zeros(H, dtype=torch.float64)) / max(len(rows), 1)
    assert_close(got.router.prototypes[3], mean, bound=tolerance(dtype, terms=6))
    assert float(got.router.thresholds[3]) == 0.5
    assert not got.experts.down[3].any()
    for matrix, position in [(got.experts.gate, 20), (got.experts.up, 21)]:
        assert_same(matrix[3], (normal(position, 1, I, H, dtype=dtype) * 0.1)[0])


@given(layers(), st.sampled_from(COMBINES), st.floats(-1, 1))
def test_growth_changes_nothing_but_the_share_of_the_others_in_tokens_that_passed_a_threshold(
    case: tuple[Layer, Tensor], combine: Combine, threshold: float
) -> None:
    """Under `sum` the function of such tokens is unchanged; else the new expert's weight is lost to the others."""
    layer, x = case
    before, routing = run(layer, x, combine=combine)
    was = passed(routing)
    after, routed = run(grown(layer, x, ~was, threshold=threshold), x, combine=combine)
    lost = torch.zeros_like(after[:, :1]) if combine == "sum" else routed.weights[:, -1:]
    assert_close(after[was], ((1 - lost) * before)[was], bound=100 * BOUND)


@given(layers(), st.sampled_from(COMBINES))
def test_tokens_that_lived_by_the_fallback_are_silent_once_they_pass_the_new_expert_alone(
    case: tuple[Layer, Tensor], combine: Combine
) -> None:
    """Their fallback ends, and the new expert says nothing before it has learnt: `down` is zero."""
    layer, x = case
    was = passed(run(layer, x, combine=combine)[1])
    after, routed = run(grown(layer, x, ~was, threshold=-9.0), x, combine=combine)
    assert routed.active[:, -1].all()
    assert not after[~was].any()


def test_a_new_expert_learns_its_output_first() -> None:
    layer, x = make_layer(0, E=2, threshold=5.0), normal(3, 4, H)
    got = grown(layer, x, torch.ones(4, dtype=torch.bool), threshold=-9.0)
    experts, weights = F.Experts(*(w.requires_grad_() for w in got.experts)), torch.ones(4, 3, dtype=torch.float64)
    gate, up, down = torch.autograd.grad((F.bank_forward(experts, x, weights)[0] - 1).square().sum(), list(experts))
    assert not torch.stack([gate[-1], up[-1]]).any()
    assert down[-1].all()


@given(st.integers(0, 2**20), st.lists(st.integers(0, 3), min_size=1, max_size=8), st.data())
def test_pruning_keeps_the_most_used_in_their_old_order(seed: int, values: list[int], data: st.DataObject) -> None:
    keep, layer = data.draw(st.integers(1, len(values))), make_layer(seed, E=len(values))
    stays = sorted(sorted(range(len(values)), key=lambda e: (-values[e], e))[:keep])
    got = Layer(*F.prune(*layer, torch.tensor(values), keep=keep))
    assert_same(got, tree.map1(lambda leaf: leaf[stays], layer))


@given(layers(), st.sampled_from(COMBINES))
def test_pruning_experts_that_no_token_chose_changes_nothing(case: tuple[Layer, Tensor], combine: Combine) -> None:
    layer, x = case
    before, routing = run(layer, x, combine=combine)
    counts = F.usage(routing).active
    pruned = Layer(*F.prune(*layer, counts, keep=int((counts > 0).sum())))
    assert_close(run(pruned, x, combine=combine)[0], before, bound=100 * BOUND)


LAYER, PLAN, X = make_layer(0, E=3), F.heirs(torch.tensor([0, 1, 2])), torch.zeros(4, H)
NOISE = F.Experts(*(torch.zeros(1, I, H),) * 3)
REFUSED: dict[str, Callable[[], object]] = {
    "heirs: shape of counts": partial(F.heirs, torch.zeros(2, 2)),
    "rebirth: shape of noise": partial(F.rebirth, *LAYER, PLAN, torch.zeros(3, H + 1), scale=0.1, share=0.5),
    "forget_reborn: .* 3 experts": partial(F.forget_reborn, torch.zeros(2, 2), PLAN),
    "grow: shape of unrouted": partial(F.grow, *LAYER, X, X[:3, 0] > 0, NOISE, threshold=0.0, scale=0.1),
    "prune: shape of lifetime": partial(F.prune, *LAYER, torch.zeros(2), keep=1),
    "1 <= keep=0 <= 3": partial(F.prune, *LAYER, torch.zeros(3), keep=0),
    "1 <= keep=4 <= 3": partial(F.prune, *LAYER, torch.zeros(3), keep=4),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_means_nothing_is_refused_by_name(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()
