from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onn import partition
from onn.partition import balanced_assignment, balanced_kmeans
from tests.support import assert_same, normal

SIZES = st.sampled_from([(4, 2), (6, 2), (6, 3), (3, 3), (5, 1)])


def integers(seed: int, *shape: int, high: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).double()


def uniform(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def every_balanced_labelling(points: int, groups: int) -> list[tuple[int, ...]]:
    slots = [group for group in range(groups) for _ in range(points // groups)]
    return sorted(set(itertools.permutations(slots)))


def best_total(benefit: Tensor) -> float:
    """By trying everything."""
    rows: list[list[float]] = benefit.tolist()
    labellings = every_balanced_labelling(*benefit.shape)
    return max(sum(row[group] for row, group in zip(rows, labels, strict=True)) for labels in labellings)


def total(benefit: Tensor, labels: Tensor) -> float:
    return float(benefit.gather(1, labels[:, None]).sum())


def assert_partition(found: Tensor, *, experts: int, neurons: int) -> None:
    assert found.shape == (experts, neurons // experts)
    assert sorted(found.flatten().tolist()) == list(range(neurons))


def as_sets(found: Tensor) -> set[frozenset[int]]:
    return {frozenset(row) for row in found.tolist()}


def planted(seed: int, *, groups: int, size: int) -> tuple[Tensor, set[frozenset[int]]]:
    """A random label for each point, all groups of one size, and the groups."""
    order = torch.randperm(groups * size, generator=torch.Generator().manual_seed(seed))
    members = order.unflatten(0, (groups, size))
    labels = torch.empty(groups * size, dtype=torch.int64)
    labels[order] = torch.arange(groups).repeat_interleave(size)
    return labels, as_sets(members)


@given(seed=st.integers(0, 2**20), sizes=SIZES, high=st.sampled_from([1, 2, 10]))
def test_an_assignment_of_whole_benefits_is_the_best_balanced_one(seed: int, sizes: tuple[int, int], high: int) -> None:
    """Every group is full, and with a tolerance below 1 / (N spread) no better total exists; ties included."""
    points, groups = sizes
    benefit = integers(seed, points, groups, high=high)
    labels = balanced_assignment(benefit, tolerance=0.9 / (points * max(high - 1, 1)))
    assert torch.bincount(labels, minlength=groups).tolist() == [points // groups] * groups
    assert total(benefit, labels) == best_total(benefit)


@given(seed=st.integers(0, 2**20), sizes=SIZES)
def test_a_constant_for_a_row_or_a_column_changes_no_best_assignment(seed: int, sizes: tuple[int, int]) -> None:
    points, groups = sizes
    benefit = integers(seed, points, groups, high=5)
    moved = benefit + integers(seed + 1, points, 1, high=50) + integers(seed + 2, 1, groups, high=50)
    labels = balanced_assignment(moved, tolerance=0.9 / (points * 110))
    assert total(benefit, labels) == best_total(benefit)


@given(
    seed=st.integers(0, 2**20),
    groups=st.integers(2, 7),
    size=st.integers(1, 9),
    tolerance=st.sampled_from([1e-2, 1e-5]),
)
def test_no_exchange_along_a_cycle_of_groups_gains_more_than_the_tolerance(
    seed: int, groups: int, size: int, tolerance: float
) -> None:
    """Which is what optimal up to the tolerance means; the gains are found by a plain all-pairs search."""
    benefit = normal(seed, groups * size, groups)
    labels = balanced_assignment(benefit, tolerance=tolerance)
    moving = torch.full((groups, groups), -torch.inf, dtype=torch.float64)
    for point, group in enumerate(labels.tolist()):
        moving[group] = torch.maximum(moving[group], benefit[point] - benefit[point, group])
    gain = moving.clone()
    for _ in range(groups):
        assert float(gain.diagonal().max()) <= groups * tolerance * float(benefit.max() - benefit.min()) + 1e-12
        gain = torch.maximum(gain, (gain[:, :, None] + moving[None]).amax(dim=1))


def test_equal_benefits_fill_every_group() -> None:
    assert torch.bincount(balanced_assignment(torch.zeros(12, 4))).tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_neither_scale_nor_offset_keeps_the_bidding_from_its_end(scale: float, offset: float) -> None:
    benefit = torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 2.0], [0.0, 4.0]], dtype=torch.float64)
    assert balanced_assignment((benefit + offset) * scale, tolerance=1e-12).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("benefit", "tolerance", "message"),
    [
        (torch.zeros(5, 2), 1e-3, "5 points do not divide into 2 groups"),
        (torch.tensor([[0.0, torch.nan], [1.0, 2.0]]), 1e-3, "finite"),
        (torch.tensor([[0.0, torch.inf], [1.0, 2.0]]), 1e-3, "finite"),
        (torch.zeros(4, 2), 0.0, "tolerance=0.0 >= 1e-12"),
        (torch.zeros(4), 1e-3, "shape of benefit"),
    ],
)
def test_an_impossible_assignment_is_refused(benefit: Tensor, tolerance: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        balanced_assignment(benefit, tolerance=tolerance)


@given(seed=st.integers(0, 2**20), sizes=SIZES, order=st.sampled_from([1, 2]))
def test_one_step_of_kmeans_gives_the_least_distance_to_the_centres(
    seed: int, sizes: tuple[int, int], order: int
) -> None:
    """The squared Euclidean distance, and of binary points to means the L1 distance, though it adds up products."""
    count, groups = sizes
    points = integers(seed, count, 3, high=2) if order == 1 else normal(seed, count, 3)
    centres = integers(seed + 1, groups, 3, high=9) / 8 if order == 1 else normal(seed + 1, groups, 3)
    found = balanced_kmeans(points, centres, steps=1)
    distance = (points[:, None] - centres).abs().pow(order).sum(dim=-1)
    reached = sum(float(distance[row, group].sum()) for group, row in enumerate(found))
    allowed = count * partition.TOLERANCE * float((points @ centres.mT).max() - (points @ centres.mT).min())
    assert reached <= -best_total(-distance) + 2 * allowed + 1e-9


@given(seed=st.integers(0, 2**20), groups=st.integers(2, 5), size=st.integers(1, 6))
def test_clusters_far_apart_are_found_whatever_the_order(seed: int, groups: int, size: int) -> None:
    labels, expected = planted(seed, groups=groups, size=size)
    points = 1e5 * torch.eye(groups, dtype=torch.float64)[labels] + normal(seed, groups * size, groups)
    found = balanced_kmeans(points, partition.spread_centres(points, uniform(seed, groups)))
    assert as_sets(found) == expected


@given(seed=st.integers(0, 2**20), groups=st.integers(1, 5), size=st.integers(1, 6), steps=st.integers(1, 6))
def test_a_further_step_of_kmeans_does_not_spread_the_groups(seed: int, groups: int, size: int, steps: int) -> None:
    points = normal(seed, groups * size, 4)
    starts = partition.spread_centres(points, uniform(seed, groups))

    def spread(found: Tensor) -> float:
        members = points[found]
        return float((members - members.mean(dim=1, keepdim=True)).square().sum())

    before, after = (balanced_kmeans(points, starts, steps=count) for count in (steps, steps + 1))
    assert_partition(after, experts=groups, neurons=groups * size)
    assert torch.equal(after, after.sort(dim=1).values)
    products = points @ points[before].mean(dim=1).mT
    slack = 2 * len(points) * partition.TOLERANCE * float(products.max() - products.min())
    assert spread(after) <= spread(before) + slack + 1e-9


@given(seed=st.integers(0, 2**20), groups=st.integers(2, 5), size=st.integers(2, 6))
def test_kmeans_ends_where_its_own_means_would_assign_the_points_as_they_are(seed: int, groups: int, size: int) -> None:
    points = normal(seed, groups * size, 3)
    found = balanced_kmeans(points, partition.spread_centres(points, uniform(seed, groups)), steps=100)
    products = points @ points[found].mean(dim=1).mT
    labels = torch.empty(groups * size, dtype=torch.int64)
    labels[found.flatten()] = torch.arange(groups).repeat_interleave(size)
    slack = len(points) * partition.TOLERANCE * float(products.max() - products.min())
    assert total(products, labels) >= total(products, balanced_assignment(products)) - slack


def test_the_next_centre_is_drawn_by_its_squared_distance_from_the_last() -> None:
    points = torch.tensor([[0.0], [1.0], [3.0]])
    for draw, expected in ((0.0, 1.0), (0.099, 1.0), (0.101, 3.0), (0.999, 3.0)):
        assert partition.spread_centres(points, torch.tensor([0.1, draw])).flatten().tolist() == [0.0, expected]


@given(seed=st.integers(0, 2**20), count=st.integers(1, 8))
def test_as_many_centres_as_distinct_points_are_all_of_them(seed: int, count: int) -> None:
    points = torch.arange(count).double().repeat(3)[:, None]
    centres = partition.spread_centres(points, uniform(seed, count + 1))
    assert set(centres.flatten().tolist()) == set(range(count))


@given(seed=st.integers(0, 2**20), neurons=st.integers(1, 9), data=st.data())
def test_the_strongest_neurons_of_a_token_are_active(seed: int, neurons: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, neurons))
    strength = integers(seed, 6, neurons, high=4)
    for row, active in zip(strength.tolist(), partition.most_active(strength, k=k).tolist(), strict=True):
        ranked = sorted(range(neurons), key=lambda neuron: (-row[neuron], neuron))
        assert [neuron for neuron in range(neurons) if active[neuron]] == sorted(ranked[:k])


@given(seed=st.integers(0, 2**20))
def test_neurons_with_gate_rows_of_one_direction_come_together_whatever_their_length(seed: int) -> None:
    labels, expected = planted(seed, groups=4, size=3)
    rows = torch.eye(4, dtype=torch.float64)[labels] + 1e-5 * normal(seed, 12, 4)
    lengths = 2.0 ** integers(seed + 1, 12, 1, high=8)
    assert as_sets(partition.by_gate_rows(rows * lengths, uniform(seed, 4))) == expected


@given(seed=st.integers(0, 2**20))
def test_neurons_active_on_the_same_tokens_come_together_whatever_their_rates(seed: int) -> None:
    """Of two groups, each with topics of its own: one topic has 2 tokens, one 50."""
    labels, expected = planted(seed, groups=4, size=3)
    topics = torch.arange(4).repeat_interleave(torch.tensor([2, 50, 9, 20]))
    active = topics[:, None] == labels
    assert as_sets(partition.by_coactivation(active, uniform(seed, 4))) == expected


@given(seed=st.integers(0, 2**20))
def test_neurons_that_write_as_much_on_the_same_tokens_come_together(seed: int) -> None:
    """Two groups write on the same tokens, one a hundred times as much."""
    labels, expected = planted(seed, groups=4, size=3)
    profile = torch.tensor([[1.0, 0, 0, 0], [100.0, 0, 0, 0], [0, 100.0, 0, 0], [0, 0, 100.0, 0]], dtype=torch.float64)
    norms = profile[labels].mT + 1e-4 * normal(seed, 4, 12).abs()
    assert as_sets(partition.by_contribution(norms, uniform(seed, 4))) == expected


@given(seed=st.integers(0, 2**20), shared=st.integers(0, 3))
def test_the_neurons_active_most_often_are_shared_and_the_rest_is_grouped_by_when_it_is_active(
    seed: int, shared: int
) -> None:
    labels, groups = planted(seed, groups=4, size=3)
    always = {group for group in groups if int(labels[min(group)]) < shared}
    topics = torch.arange(4).repeat(10)
    active = (topics[:, None] == labels) | (labels < shared)
    found = partition.shared_and_routed(active, num_experts=4, shared=shared)
    assert_partition(found, experts=4, neurons=12)
    assert {neuron for row in found[:shared].tolist() for neuron in row} == {n for group in always for n in group}
    assert as_sets(found[shared:]) == groups - always


@given(seed=st.integers(0, 2**20), shared=st.integers(0, 3))
def test_no_routed_neuron_is_active_more_often_than_a_shared_one(seed: int, shared: int) -> None:
    active = normal(seed, 20, 12) > 0.5
    found = partition.shared_and_routed(active, num_experts=4, shared=shared)
    assert_partition(found, experts=4, neurons=12)
    rate = active.sum(dim=0)
    if shared:
        assert int(rate[found[:shared]].min()) >= int(rate[found[shared:]].max())


@given(seed=st.integers(0, 2**20))
def test_a_representative_is_the_member_nearest_to_the_mean_of_its_expert(seed: int) -> None:
    points = normal(seed, 12, 5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    cut = partition.cut(order, num_experts=3)
    for row, found in zip(cut.tolist(), partition.representatives(points, cut).tolist(), strict=True):
        mean = torch.stack([points[neuron] for neuron in row]).mean(dim=0)
        assert found == min(row, key=lambda neuron: float((points[neuron] - mean).norm()))


def test_the_same_noise_gives_the_same_partition_and_no_input_changes() -> None:
    gate, norms = normal(0, 12, 5), normal(1, 20, 12).abs()
    noise, kept = uniform(2, 4), (gate.clone(), norms.clone())
    active = partition.most_active(norms, k=3)

    def make() -> tuple[Tensor, ...]:
        return (
            partition.by_gate_rows(gate, noise),
            partition.by_coactivation(active, noise),
            partition.by_contribution(norms, noise),
            partition.shared_and_routed(active, num_experts=4, shared=1),
        )

    found = make()
    for cut in found:
        assert_partition(cut, experts=4, neurons=12)
    assert_same(make(), found)
    assert_same((gate, norms), kept)


def test_a_cut_keeps_the_order_it_is_given() -> None:
    assert partition.cut(torch.arange(6), num_experts=3).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert partition.cut(torch.tensor([5, 0, 3, 2, 1, 4]), num_experts=2).tolist() == [[5, 0, 3], [2, 1, 4]]


@pytest.mark.parametrize(
    ("order", "experts", "message"),
    [
        ([0, 1, 2], 2, "3 neurons do not divide into num_experts=2"),
        ([0, 1, 1, 2], 2, r"missing \[3\]"),
        ([0, 1, 2, 4], 2, r"missing \[3\], smallest 0, largest 4"),
        ([-1, 0, 1, 2], 2, "smallest -1"),
        ([0, 1], 0, "num_experts=0"),
    ],
)
def test_what_is_no_partition_is_refused(order: list[int], experts: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition.cut(torch.tensor(order), num_experts=experts)


def test_wrong_sizes_are_refused() -> None:
    active = torch.ones(3, 10, dtype=torch.bool)
    with pytest.raises(ValueError, match="int64"):
        partition.cut(torch.arange(4.0), num_experts=2)
    with pytest.raises(ValueError, match="10 neurons do not divide into num_experts=3"):
        partition.shared_and_routed(active, num_experts=3, shared=1)
    with pytest.raises(ValueError, match="shared=5"):
        partition.shared_and_routed(active, num_experts=5, shared=5)
    with pytest.raises(ValueError, match="k=0"):
        partition.most_active(torch.ones(2, 3), k=0)
    with pytest.raises(ValueError, match="steps=0"):
        balanced_kmeans(torch.zeros(4, 2), torch.zeros(2, 2), steps=0)
