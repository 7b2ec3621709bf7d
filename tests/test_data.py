from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from onn import data
from onn.data import Batch, Pool
from tests.support import assert_same

Domain = tuple[Tensor, Tensor]
"""Tokens [N], all of them different and unlike those of another domain, and their mask."""


def domain(number: int, counted: list[bool], dtype: torch.dtype = torch.int32) -> Domain:
    tokens = torch.arange(len(counted), dtype=dtype) + 100 * number
    return tokens, torch.tensor(counted, dtype=torch.bool)


def allowed(counted: list[bool], length: int) -> list[int]:
    """Where a window of `length` tokens and a next one can begin that holds a target that counts."""
    return [start for start in range(len(counted) - length) if any(counted[start + 1 : start + length + 1])]


@st.composite
def corpora(draw: st.DrawFn) -> tuple[list[list[bool]], int]:
    """The masks of one to three domains, each with a window, and the length of a window."""
    length = draw(st.integers(1, 4))
    masks = st.lists(st.booleans(), min_size=length + 1, max_size=9).filter(lambda mask: bool(allowed(mask, length)))
    return draw(st.lists(masks, min_size=1, max_size=3)), length


def pool_of(masks: list[list[bool]], length: int) -> Pool:
    domains = [domain(number, mask) for number, mask in enumerate(masks)]
    return data.pool([tokens for tokens, _ in domains], [mask for _, mask in domains], length=length)


def all_choices(pool: Pool) -> Tensor:
    """Noise on a grid that is even for every domain and for every window of each: the middles of equal cells."""
    domains = len(pool.bounds) - 1
    cells = math.lcm(*pool.bounds.diff().tolist())
    grid = [((d + 0.5) / domains, (cell + 0.5) / cells) for d in range(domains) for cell in range(cells)]
    return torch.tensor(grid, dtype=torch.float64)


def check_windows(batch: Batch, masks: list[list[bool]], length: int) -> None:
    """Every row is a window of its domain, its targets what comes next, and its mask that of the targets."""
    for tokens, targets, counted, number in zip(*(part.tolist() for part in batch), strict=True):
        start = tokens[0] - 100 * number
        assert tokens == [100 * number + start + i for i in range(length)]
        assert targets == [100 * number + start + i + 1 for i in range(length)]
        assert counted == masks[number][start + 1 : start + length + 1]
        assert any(counted)
        assert start + length < len(masks[number])


@given(corpus=corpora())
def test_every_allowed_window_is_equally_likely_within_its_domain_and_every_domain_too(
    corpus: tuple[list[list[bool]], int],
) -> None:
    masks, length = corpus
    pool = pool_of(masks, length)
    choices = all_choices(pool)
    batch = data.sample_batch(pool, choices)
    check_windows(batch, masks, length)
    drawn = Counter(zip(batch.domain.tolist(), (batch.tokens[:, 0] % 100).tolist(), strict=True))
    each = len(choices) // len(masks)
    for number, mask in enumerate(masks):
        expected = dict.fromkeys(allowed(mask, length), each // len(allowed(mask, length)))
        assert {start: times for (d, start), times in drawn.items() if d == number} == expected


@given(corpus=corpora(), seed=st.integers(0, 999), size=st.integers(0, 5))
def test_a_batch_has_its_shapes_and_dtypes_and_depends_on_the_noise_alone(
    corpus: tuple[list[list[bool]], int], seed: int, size: int
) -> None:
    masks, length = corpus
    pool = pool_of(masks, length)
    choice = torch.rand(size, 2, generator=torch.Generator().manual_seed(seed))
    before = choice.clone()
    batch = data.sample_batch(pool, choice)
    check_windows(batch, masks, length)
    assert [list(part.shape) for part in batch] == [[size, length]] * 3 + [[size]]
    assert [part.dtype for part in batch] == [torch.int64, torch.int64, torch.bool, torch.int64]
    assert_same(data.sample_batch(pool, choice), batch)
    assert_same(choice, before)
    for row in range(size):
        one = data.sample_batch(pool, choice[row : row + 1])
        assert_same(one, Batch(*(part[row : row + 1] for part in batch)))


@given(corpus=corpora())
def test_noise_at_and_beyond_its_ends_stays_in_range(corpus: tuple[list[list[bool]], int]) -> None:
    masks, length = corpus
    ends = [0.0, math.nextafter(1, 0), 1.0, -0.5, 2.0]
    batch = data.sample_batch(pool_of(masks, length), torch.tensor([[d, w] for d in ends for w in ends]))
    check_windows(batch, masks, length)
    last = len(masks) - 1
    assert batch.domain.tolist() == [d for d in (0, last, last, 0, last) for _ in ends]


def test_float32_noise_tells_apart_the_windows_of_a_large_domain() -> None:
    size = 2**20
    pool = data.pool([torch.arange(size + 1)], [torch.ones(size + 1, dtype=torch.bool)], length=1)
    cells = (torch.arange(size) + 0.5) / size
    batch = data.sample_batch(pool, torch.stack([torch.zeros(size), cells], dim=1))
    assert cells.dtype == torch.float32
    assert torch.equal(batch.tokens.flatten(), torch.arange(size))


def test_a_pool_keeps_the_tokens_of_every_domain_and_its_arguments() -> None:
    domains = [domain(0, [True] * 5, torch.uint8), domain(1, [False, True, False], torch.uint8)]
    before = [(tokens.clone(), mask.clone()) for tokens, mask in domains]
    pool = data.pool([tokens for tokens, _ in domains], [mask for _, mask in domains], length=2)
    assert_same(tuple(domains), tuple(before))
    assert pool.tokens.dtype == torch.uint8
    assert pool.tokens.tolist() == [0, 1, 2, 3, 4, 100, 101, 102]
    assert pool.starts.tolist() == [0, 1, 2, 5]
    assert pool.bounds.tolist() == [0, 3, 4]


@given(size=st.integers(2, 12), length=st.integers(1, 11), seed=st.integers(0, 99))
def test_windows_are_slices_of_their_sequence(size: int, length: int, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    tokens = torch.randint(50, (size,), generator=source, dtype=torch.int32)
    mask = torch.rand(size, generator=source) < 0.5
    starts = torch.arange(max(size - length, 0)).flip(0)
    batch = data.windows(tokens, mask, starts, length=length)
    assert len(batch.tokens) == len(starts)
    assert torch.equal(batch.targets[:, :-1], batch.tokens[:, 1:])
    assert batch.domain.tolist() == [0] * len(starts)
    for row, start in enumerate(starts.tolist()):
        assert batch.tokens[row].tolist() == tokens[start : start + length].tolist()
        assert batch.targets[row].tolist() == tokens[start + 1 : start + length + 1].tolist()
        assert torch.equal(batch.mask[row], mask[start + 1 : start + length + 1])


@given(
    counted=st.lists(st.booleans(), min_size=2, max_size=30),
    length=st.integers(1, 5),
    size=st.integers(1, 7),
    limit=st.integers(1, 8),
)
@example(counted=[True] * 12, length=2, size=2, limit=3)
def test_evaluation_windows_lie_end_to_end_and_do_not_depend_on_the_batch(
    counted: list[bool], length: int, size: int, limit: int
) -> None:
    tokens, mask = domain(0, counted)
    expected = [
        start for start in range(0, len(counted) - length, length) if any(counted[start + 1 : start + length + 1])
    ][:limit]
    if not expected:
        with pytest.raises(ValueError, match=rf"{len(counted)} tokens, {sum(counted)} to learn: no window of length"):
            data.evaluation_batches(tokens, mask, batch=size, length=length, limit=limit)
        return
    batches = data.evaluation_batches(tokens, mask, batch=size, length=length, limit=limit)
    for batch in batches:
        check_windows(batch, [counted], length)
    sizes = [len(batch.tokens) for batch in batches]
    assert sizes[:-1] == [size] * (len(sizes) - 1)
    assert 1 <= sizes[-1] <= size
    whole = Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    assert whole.tokens[:, 0].tolist() == expected
    assert len(whole.targets.unique()) == whole.targets.numel()
    (together,) = data.evaluation_batches(tokens, mask, batch=100, length=length, limit=limit)
    assert_same(together, whole)


def test_without_a_limit_every_target_but_the_first_token_and_the_rest_is_evaluated_once() -> None:
    tokens, mask = domain(0, [True] * 11)
    batches = data.evaluation_batches(tokens, mask, batch=2, length=3, limit=99)
    assert torch.cat([batch.targets.flatten() for batch in batches]).tolist() == list(range(1, 10))


ONE = domain(0, [True] * 4)
BLANK = domain(1, [True, False, False])


@pytest.mark.parametrize(
    ("domains", "length", "words"),
    [
        ([ONE], 0, "pool: expected length=0 >= 1"),
        ([], 2, "pool: 0 token sequences and 0 masks"),
        ([ONE], 4, "pool: domain 0 has 4 tokens, 4 to learn: no window of length=4 and a next token that counts"),
        ([ONE], 9, "pool: domain 0 has 4 tokens, 4 to learn: no window of length=9"),
        ([ONE, BLANK], 2, "pool: domain 1 has 3 tokens, 1 to learn: no window of length=2"),
        ([(ONE[0], ONE[1][:3])], 1, r"pool: shape of masks does not fit: tokens \[4\].*masks \[3\]"),
        ([(ONE[0][None], ONE[1])], 1, r"pool: shape of tokens does not fit: tokens \[1, 4\]"),
    ],
)
def test_a_pool_without_a_window_is_refused(domains: list[Domain], length: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        data.pool([tokens for tokens, _ in domains], [mask for _, mask in domains], length=length)


def test_as_many_masks_as_sequences_are_needed() -> None:
    with pytest.raises(ValueError, match="pool: 2 token sequences and 1 masks"):
        data.pool([ONE[0], ONE[0]], [ONE[1]], length=1)


@pytest.mark.parametrize(
    ("starts", "named"), [([0, 2], r"\[2\]"), ([-1, 0, 5], r"\[-1, 5\]"), ([9] * 5, r"\[9, 9, 9\]")]
)
def test_windows_that_leave_their_sequence_are_named(starts: list[int], named: str) -> None:
    with pytest.raises(ValueError, match=rf"windows: starts {named} of length=2 and a next token leave 4 tokens"):
        data.windows(*ONE, torch.tensor(starts), length=2)


@pytest.mark.parametrize(
    ("batch", "length", "limit", "name"), [(0, 1, 1, "batch"), (1, 0, 1, "length"), (1, 1, 0, "limit")]
)
def test_numbers_below_one_are_refused(batch: int, length: int, limit: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"evaluation_batches: expected {name}=0 >= 1"):
        data.evaluation_batches(*ONE, batch=batch, length=length, limit=limit)
    with pytest.raises(ValueError, match="windows: expected length=0 >= 1"):
        data.windows(*ONE, torch.tensor([0]), length=0)


def test_noise_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sample_batch: shape of choice does not fit: choice \[2, 3\]"):
        data.sample_batch(pool_of([[True] * 4], 2), torch.rand(2, 3))
