from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

import onn.functional as F
from experiments.study.arms import ARMS, ExpertRule, Grain, Rule
from experiments.study.lanes import Job, needs
from experiments.study.net import Examples, Net, forward, rank
from experiments.study.setting import KNOWN
from experiments.study.state import Lane, Needs, Penalties, State, init_state
from experiments.study.step import step
from experiments.study.update import ROOT_EPS, end_task
from onn import tree
from tests.study_nets import E, H, I, T, but_the_experts, examples, job, lane, net, numbers, plastic, start, uniform
from tests.support import assert_close, assert_same, stacked, tolerance
from tests.test_study_net import learnt

BOUND = tolerance(torch.float64, terms=100, slack=1e5)
SEEDS = st.integers(0, 2**16)


def run(one: Job, seed: int, steps: int, *, state: State | None = None) -> State:
    first, kind = start(seed, one)
    state = state or first
    for at in range(steps):
        batch, stored = examples(seed + 20 + at), examples(seed + 70 + at)
        state, _ = step(state, batch, stored, uniform(seed + at), lane(one), plastic(), needs=kind)
    return state


def by_torch(seed: int, steps: int, make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Net:
    """The same with torch's optimizer, where every expert is active."""
    model = tree.map1(lambda leaf: leaf.clone().requires_grad_(), net(seed))
    optimizer = make(tree.leaves(model))
    for at in range(steps):
        optimizer.zero_grad()
        gradient = tree.grad(all_active_loss)(tree.detach(model), seed + 20 + at)
        for leaf, g in zip(tree.leaves(model), tree.leaves(gradient), strict=True):
            leaf.grad = g
        optimizer.step()
    return tree.detach(model)


def all_active_loss(model: Net, seed: int) -> Tensor:
    batch = examples(seed)
    seen = forward(model, batch.inputs, batch.residual, lambda affinity: torch.ones_like(affinity, dtype=torch.bool))
    return cross_entropy(seen.logits, batch.labels)


OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda leaves: torch.optim.SGD(leaves, lr=0.1),
    "adamw": lambda leaves: torch.optim.AdamW(leaves, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01),
    "adagrad": lambda leaves: torch.optim.Adagrad(leaves, lr=0.1, eps=1e-10),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@settings(max_examples=8)
@given(seed=SEEDS)
def test_updating_everything_is_torchs_optimizer(optimizer: str, seed: int) -> None:
    got = run(job(optimizer, active=1.0), seed, 3)
    assert_close(got.net, by_torch(seed, 3, OPTIMIZERS[optimizer]), bound=BOUND)


@pytest.mark.parametrize("rule", list(Rule))
@settings(max_examples=8)
@given(seed=SEEDS, k=st.integers(1, 3))
def test_every_rule_ranks_the_active_experts_by_its_own_key(rule: Rule, seed: int, k: int) -> None:
    one = job(rule=rule, learners=k)
    state, kind = start(seed, one)
    batch, noise = examples(seed + 20), uniform(seed)
    everything, _ = step(state, batch, batch, noise, lane(job()), plastic(), needs=kind)
    got, _ = step(state, batch, batch, noise, lane(one), plastic(), needs=kind)
    assert_same(but_the_experts(got.net), but_the_experts(everything.net))
    whole = learnt(state.net, batch)
    S, seen = whole.surprise, whole.seen
    level = torch.where(seen.active, S, 0).sum(dim=0)
    assert level.shape == (E,)
    keys = {
        Rule.SURPRISE: S,
        Rule.MOST_SURPRISE: -S,
        Rule.RANDOM: noise,
        Rule.NORMALISED: S / torch.where(seen.active, seen.weights, 1),
        Rule.OUTPUT: seen.weights,
        Rule.RELATIVE: S,
    }[rule]
    masked = torch.where(seen.active, keys, torch.inf)
    order = torch.sort(masked, dim=1, stable=True).indices[:, :k]
    keep = torch.zeros_like(seen.active).scatter(1, order, True) & seen.active
    d_y = torch.func.grad(lambda y: cross_entropy(y @ state.net.readout.mT, batch.labels))(seen.y)
    specified = F.bank_vjp(
        state.net.experts, seen.x, seen.weights, seen.residuals, d_y, select=lambda _, __: keep
    ).experts
    moved = tree.map2(lambda before, after: (before - after) / 0.1, state.net.experts, got.net.experts)
    assert_close(moved, specified, bound=BOUND)


@settings(max_examples=8)
@given(seed=SEEDS)
def test_relative_surprise_is_held_against_the_experts_own_level(seed: int) -> None:
    state, _ = start(seed, job(rule=Rule.RELATIVE, learners=1))
    tamed = state._replace(ledger=state.ledger._replace(level=torch.tensor([1e9, *[1e-9] * (E - 1)]).double()))
    got = run(job(rule=Rule.RELATIVE, learners=1), seed, 1, state=tamed)
    seen = examples(seed + 20)
    active = learnt(state.net, seen).seen.active[:, 0]
    others = learnt(state.net, seen).seen.active & active[:, None]
    moved = (got.net.experts.gate != state.net.experts.gate).any(dim=(1, 2))
    only_with_first = others.any(dim=0) & ~(learnt(state.net, seen).seen.active & ~active[:, None]).any(dim=0)
    assert bool(moved[0]) == bool(active.any())
    assert not bool((moved & only_with_first)[1:].any())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adagrad"])
@settings(max_examples=8)
@given(seed=SEEDS)
def test_experts_that_may_not_learn_from_a_batch_keep_their_bits_and_moments(optimizer: str, seed: int) -> None:
    one = job(optimizer, expert_rule=ExpertRule.BATCH_SURPRISE, expert_share=1 / E)
    before = run(one, seed, 2)
    after = run(one, seed + 3, 1, state=before)
    moved = torch.stack([(a != b).any(dim=(1, 2)) for a, b in zip(after.net.experts, before.net.experts, strict=True)])
    assert int(moved.any(dim=0).sum()) == 1
    still = ~moved.any(dim=0)
    if before.moments and after.moments:
        for old, new in zip(before.moments, after.moments, strict=True):
            assert_same(*(tree.map1(lambda leaf: leaf[still], part.experts) for part in (new, old)))
    assert torch.equal(after.importance.experts[still], before.importance.experts[still])


@pytest.mark.parametrize("grain", [Grain.EXPERT, Grain.NEURON])
@settings(max_examples=8)
@given(seed=SEEDS)
def test_the_root_form_is_consolidate_with_importance_by_weight(grain: Grain, seed: int) -> None:
    one = job("own", root=0.5, grain=grain)
    before, _ = start(seed, one)
    got = run(one, seed, 1)
    plain = run(job(), seed, 1)
    grads = tree.map2(lambda old, new: (old - new) / 0.1, before.net.experts, plain.net.experts)
    importance = got.importance.experts / (3 * H)
    if grain == Grain.EXPERT:
        importance = importance.mean(dim=1)
    expected = F.consolidate(grads, importance, form="root", strength=0.0, eps=ROOT_EPS)
    moved = tree.map2(lambda old, new: (old - new) / 0.1, before.net.experts, got.net.experts)
    assert_close(moved, expected, bound=tolerance(torch.float64, terms=100, slack=1e7))


@pytest.mark.parametrize("grain", [Grain.EXPERT, Grain.NEURON])
@settings(max_examples=8)
@given(seed=SEEDS)
def test_a_split_importance_is_divided_among_the_matrices_as_the_squared_gradients_of_the_batch(
    grain: Grain, seed: int
) -> None:
    before, _ = start(seed, job())
    plain, whole, split = (
        run(one, seed, 1)
        for one in (job(), job("own", root=0.5, grain=grain), job("own", root=0.5, grain=grain, split=True))
    )
    assert_same((split.importance, but_the_experts(split.net)), (whole.importance, but_the_experts(whole.net)))
    importance = split.importance.experts / (3 * H)
    if grain == Grain.EXPERT:
        importance = importance.mean(dim=1, keepdim=True)
    squares = learnt(before.net, examples(seed + 20)).squares
    assert squares
    by_matrix = torch.stack([matrix.sum() for matrix in squares.experts])
    grads, steps = (
        tree.map2(lambda old, new: (old - new) / 0.1, before.net.experts, after.net.experts) for after in (plain, split)
    )
    for share, g, got in zip(by_matrix / by_matrix.mean(), grads, steps, strict=True):
        expected = g / (importance[..., None] * share + ROOT_EPS).sqrt()
        assert_close(got, expected, bound=tolerance(torch.float64, terms=100, slack=1e7))


@pytest.mark.parametrize("grain", [Grain.EXPERT_INPUT, Grain.NEURON_INPUT])
@settings(max_examples=8)
@given(seed=SEEDS)
def test_importance_by_row_and_input_is_their_product_with_the_importance_as_its_mean(grain: Grain, seed: int) -> None:
    one = job("own", root=0.5, grain=grain)
    before, _ = start(seed, one)
    got, plain = run(one, seed, 1), run(job(), seed, 1)
    assert isinstance(got.penalties, Penalties)
    fisher, rows = got.penalties.fisher, got.importance
    by_row = rows.experts / (3 * H)
    if grain == Grain.EXPERT_INPUT:
        by_row = by_row.mean(dim=1, keepdim=True)
    read = torch.einsum("eih->h", fisher.experts.gate + fisher.experts.up)
    written = torch.einsum("eih->h", fisher.experts.down)
    expected = Net(
        features=product(rows.features / fisher.features.shape[1], fisher.features.sum(dim=0)),
        prototypes=product(rows.prototypes / H, fisher.prototypes.sum(dim=0)),
        experts=F.Experts(product(by_row, read), product(by_row, read), product(by_row, written)),
        readout=product(rows.readout / H, fisher.readout.sum(dim=0)),
    )
    steps, grads = (tree.map2(lambda old, new: (old - new) / 0.1, before.net, after.net) for after in (got, plain))
    assert_close(
        steps,
        tree.map2(lambda g, f: g / (f + ROOT_EPS).sqrt(), grads, expected),
        bound=tolerance(torch.float64, terms=100, slack=1e7),
    )


def product(rows: Tensor, inputs: Tensor) -> Tensor:
    """[..., R] and [C], which is as if of mean 1, to [..., R, C]."""
    return rows[..., None] * inputs / inputs.mean()


@settings(max_examples=8)
@given(seed=SEEDS)
def test_the_bounded_form_is_consolidate_and_by_weight_the_steps_are_those_of_adagrad_of_tokens(seed: int) -> None:
    before, _ = start(seed, job())
    plain = run(job(), seed, 1)
    grads = tree.map2(lambda old, new: (old - new) / 0.1, before.net.experts, plain.net.experts)
    one = job("sgd", strength=3.0, bounded=True)
    got = run(one, seed, 1)
    expected = F.consolidate(grads, got.importance.experts, form="bounded", strength=3.0, eps=ROOT_EPS)
    moved = tree.map2(lambda old, new: (old - new) / 0.1, before.net.experts, got.net.experts)
    assert_close(moved, expected, bound=tolerance(torch.float64, terms=100, slack=1e7))
    fine = run(job("own", root=0.5, grain=Grain.WEIGHT), seed, 1)
    assert isinstance(fine.penalties, Penalties)
    steps = tree.map2(lambda old, new: (old - new) / 0.1, before.net, fine.net)
    all_grads = tree.map2(lambda old, new: (old - new) / 0.1, before.net, plain.net)
    assert_close(
        steps,
        tree.map2(lambda g, f: g / (f + ROOT_EPS).sqrt(), all_grads, fine.penalties.fisher),
        bound=tolerance(torch.float64, terms=100, slack=1e7),
    )


@settings(max_examples=8)
@given(seed=SEEDS)
def test_replay_takes_the_mean_of_both_gradients_and_a_gem_never_steps_against_the_stored(seed: int) -> None:
    before, _ = start(seed, job())
    new, old = (gradient(before.net, examples(seed + shift)) for shift in (20, 70))
    mean = tree.map2(lambda a, b: (a + b) / 2, new, old)
    for one, expected in ((job(replay=True), mean), (job(project=True), projected(new, old))):
        got = run(one, seed, 1)
        assert_close(tree.map2(lambda a, b: (a - b) / 0.1, before.net, got.net), expected, bound=BOUND)


@settings(max_examples=8)
@given(seed=SEEDS)
def test_a_gem_looks_at_what_learns_alone(seed: int) -> None:
    one = job(project=True)
    before, kind = start(seed, one)
    batch, stored = examples(seed + 20), examples(seed + 70)
    frozen = plastic()._replace(readout=torch.zeros((), dtype=torch.float64))
    after, _ = step(before, batch, stored, uniform(seed), lane(one), frozen, needs=kind)
    new, old = (gradient(before.net, given) for given in (batch, stored))
    still = torch.zeros_like(new.readout)
    expected = projected(new._replace(readout=still), old._replace(readout=still))
    assert_close(tree.map2(lambda a, b: (a - b) / 0.1, before.net, after.net), expected, bound=BOUND)


def gradient(model: Net, given: Examples) -> Net:
    """Of the loss where the three nearest experts are active."""

    def value(model: Net) -> Tensor:
        seen = forward(model, given.inputs, given.residual, lambda affinity: rank(-affinity) < 3)
        return cross_entropy(seen.logits, given.labels)

    return tree.grad(value)(model)


def projected(new: Net, old: Net) -> Net:
    flat, stored = (torch.cat([leaf.flatten() for leaf in tree.leaves(part)]) for part in (new, old))
    dot = flat @ stored
    if dot >= 0:
        return new
    return tree.map2(lambda g, m: g - dot / (stored @ stored) * m, new, old)


@pytest.mark.parametrize("penalty", ["ewc", "si"])
@settings(max_examples=8)
@given(seed=SEEDS)
def test_a_penalty_pulls_to_where_the_task_ended(penalty: str, seed: int) -> None:
    one = job("sgd", strength=2.0, penalty=penalty)
    ended = end_task(run(one, seed, 3), lane(one))
    assert isinstance(ended.penalties, Penalties)
    assert_same(ended.penalties.anchor, ended.net)
    assert all(bool((leaf >= 0).all()) for leaf in tree.leaves(ended.penalties.omega))
    if penalty == "ewc":
        assert_same(ended.penalties.omega, ended.penalties.fisher)
    away = ended._replace(net=tree.map1(lambda leaf: leaf + 0.01, ended.net))
    kind, batch = needs(one), examples(seed + 40)
    free, _ = step(away, batch, batch, uniform(seed), lane(job("sgd", penalty=penalty)), plastic(), needs=kind)
    held, _ = step(away, batch, batch, uniform(seed), lane(one), plastic(), needs=kind)
    assert_close(
        tree.map2(torch.sub, free.net, held.net),
        tree.map1(lambda omega: 0.1 * 2.0 * omega * 0.01, ended.penalties.omega),
        bound=tolerance(torch.float64, terms=100, slack=1e8),
    )


def test_lanes_do_not_see_each_other() -> None:
    """What a lane computes under `vmap` is what it computes alone, whatever runs beside it."""
    names = {"smk-2": "sgd", "random-2": "adamw", "replay": "adagrad", "surprise-route": "sgd", "si": "adamw"}
    jobs = [job(optimizer, strength=0.1, seed=n) for n, optimizer in enumerate(names.values())]
    jobs = [one._replace(arm=ARMS[name]) for one, name in zip(jobs, names, strict=True)]
    kind = Needs(*(True,) * len(Needs._fields))
    columns = numbers(jobs)
    states = [init_state(net(n), kind) for n in range(len(jobs))]
    batches, stored = ([examples(n + at) for n in range(len(jobs))] for at in (20, 70))
    noise = torch.stack([uniform(n) for n in range(len(jobs))])
    plasticity = stacked([plastic()] * len(jobs))
    together = torch.func.vmap(partial(step, needs=kind))(
        stacked(states), stacked(batches), stacked(stored), noise, columns, plasticity
    )
    for n in range(len(jobs)):
        own = Lane(*(number[n] for number in columns))
        single = step(states[n], batches[n], stored[n], noise[n], own, plastic(), needs=kind)
        for got, expected in zip(tree.leaves(together), tree.leaves(single), strict=True):
            assert_close(got[n], expected, bound=BOUND)


@pytest.mark.parametrize("name", KNOWN)
def test_an_arms_step_computes_all_that_the_arm_needs(name: str) -> None:
    """A step that computes everything gives the same, but for thresholds that nobody asks."""
    arm = replace(KNOWN[name], active=max(KNOWN[name].active, 1 / E))
    one = job(arm.optimizers[0], strength=0.1)._replace(arm=arm)
    everything = Needs(*(True,) * len(Needs._fields))._replace(whitened=arm.whitened)
    ends = []
    for kind in (needs(one), everything):
        state = init_state(net(5), kind)
        for at in range(3):
            batch, stored = examples(20 + at), examples(70 + at)
            state, _ = step(state, batch, stored, uniform(at), lane(one), plastic(), needs=kind)
        ends.append(state.net)
    assert_close(*ends, bound=BOUND)


@settings(max_examples=8)
@given(seed=SEEDS)
def test_what_is_not_plastic_keeps_its_bits(seed: int) -> None:
    one = job("adamw")
    state, kind = start(seed, one)
    got, _ = step(state, examples(seed), examples(seed), uniform(seed), lane(one), plastic(0.0), needs=kind)
    assert_same(got.net, state.net)
    assert float(got.ledger.steps) == 1


@settings(max_examples=2)
@given(seed=SEEDS)
def test_thresholds_follow_the_target_density(seed: int) -> None:
    one = job(dynamic=True, active=1 / 3)
    state, kind = start(seed, one)
    share = torch.zeros(())
    for at in range(40):
        batch = examples(seed + at, tokens=40)
        state, figures = step(state, batch, batch, uniform(seed, tokens=40), lane(one), plastic(0.0), needs=kind)
        share = figures.active / E
    assert abs(float(share) - 1 / 3) < 0.15


def test_usage_contrast_teaches_the_experts_that_are_used_more_now_than_before() -> None:
    one = job(expert_rule=ExpertRule.USAGE_CONTRAST, expert_share=1 / E)
    state, kind = start(5, one)
    before = torch.full((E,), 100.0).double()
    before[2] = 1e-3
    ledger = state.ledger._replace(before=before, now=torch.ones(E).double(), steps=torch.tensor(100.0))
    state = state._replace(ledger=ledger)
    batch = examples(25)
    got, _ = step(state, batch, batch, uniform(0), lane(one), plastic(), needs=kind)
    moved = (got.net.experts.gate != state.net.experts.gate).any(dim=(1, 2))
    assert moved.nonzero().flatten().tolist() == [2]
    assert got.importance.experts.shape == (E, I)
    assert batch.labels.shape == (T,)
