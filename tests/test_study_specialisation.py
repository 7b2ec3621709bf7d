"""What is measured on trained models: of the right tokens, and of the right characters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import onn.functional as F
from experiments.study import measures, specialisation, text
from experiments.study.arms import ARMS
from experiments.study.lanes import Job
from experiments.study.records import Key, Specialisation, Vocabulary
from experiments.study.runs import Trained
from experiments.study.tasks import HIDDEN, Bank, Tasks, digits
from onn import qwen3, tree
from tests.support import BOUND, assert_close, assert_same, normal, tolerance

DOMAINS = 3
BANK = Bank(experts=12, width=5)


@pytest.fixture(scope="module")
def shared() -> text.Trunk:
    """An untrained dense model, and noise in the place of text."""
    config = text.dense(BANK)
    template = qwen3.abstract(config)
    noise = [normal(n, *leaf.shape) for n, leaf in enumerate(tree.leaves(template))]
    model = qwen3.init(tree.unflatten(template, noise), config=config, dtype=torch.float32)
    chance = torch.Generator().manual_seed(0)
    train, held_out = (
        [torch.randint(97, 123, (400,), generator=chance, dtype=torch.uint8) for _ in range(DOMAINS)] for _ in range(2)
    )
    marks = [torch.ones(400, dtype=torch.bool)] * DOMAINS
    parts = [text._positions(model, part, marks, config=config, wanted=2 * text.LENGTH) for part in (train, held_out)]
    return text.Trunk(BANK, model, *(text.Texts(*part) for part in zip(*parts, strict=True)))


def windows(values: Tensor) -> Tensor:
    return values.view(len(values), -1, text.LENGTH)


def test_held_tokens_are_what_is_read_where_the_labels_are_what_comes_next(shared: text.Trunk) -> None:
    data = text.text(shared, shared.test, 1)
    read, following = windows(data.held_tokens), windows(data.held_labels)
    assert read.dtype == torch.int64
    assert torch.equal(read[..., 1:], following[..., :-1])
    assert not torch.equal(read, following)
    assert not torch.equal(data.held_labels, data.labels)
    for task, tokens in enumerate(read):
        inputs, residual = text.before_last_mlp(shared.model, tokens, config=text.dense(BANK))
        assert_same(inputs, data.held_inputs[task])
        assert_same(residual, data.held_residual[task])
    assert_same(data.held_tokens, shared.test.held_out.tokens[[1, 2, 0]])


def test_tuning_reads_other_windows_than_the_test(shared: text.Trunk) -> None:
    """400 bytes in 4 windows of 64: none of one shares a byte with one of the other."""
    for one, other in zip(shared.test, shared.tuning, strict=True):
        assert one.labels.shape == other.labels.shape == (DOMAINS, 2 * text.LENGTH)
        for mine, theirs in zip(windows(one.tokens), windows(other.tokens), strict=True):
            stretches = {tuple(row[at : at + 8].tolist()) for row in mine for at in range(text.LENGTH - 8)}
            assert not stretches & {tuple(row[at : at + 8].tolist()) for row in theirs for at in range(text.LENGTH - 8)}


def test_the_bank_of_text_has_the_size_asked_for_and_a_quarter_of_its_sum_is_the_dense_layer(
    shared: text.Trunk,
) -> None:
    data = text.text(shared, shared.test, 1)
    assert data.net.experts.gate.shape == (*BANK, HIDDEN)
    assert data.net.prototypes.shape == (BANK.experts, HIDDEN)
    x, last = data.inputs[0], shared.model.layers[-1].mlp
    assert isinstance(last, qwen3.Mlp)
    y, _ = F.bank_forward(data.net.experts, x, torch.full((len(x), BANK.experts), 1 / 3))
    assert_close(y, qwen3.mlp_forward(last, x), bound=tolerance(torch.float32, terms=BANK.experts * BANK.width))


def untrained(data: Tasks, family: str) -> tuple[Specialisation, Tensor]:
    """What is found of a model before its first task, and the sets of experts that tokens then have."""
    key = Key(family, "experts", "all", "sgd", 0.1, 0.0, 5)
    net = tree.map1(lambda leaf: leaf[None], data.net)
    experts = len(data.net.prototypes)
    seen: list[Tensor] = []

    def saturation(before: Tensor, after: Tensor) -> float:
        seen.append(after)
        return 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specialisation, "PERMUTATIONS", 20)
        patch.setattr(measures, "saturation", saturation)
        count, size = data.held_labels.shape
        everyone = torch.ones(1, count * size, experts, dtype=torch.bool)
        own = torch.arange(count).repeat_interleave(size)[:, None] == torch.arange(experts)
        trained = Trained([], net, torch.zeros(1, experts), [everyone, own[None]])
        (found,) = specialisation.specialisations([Job(key, "evaluation", ARMS["all"])], [0], trained, {5: data})
    return found, seen[0]


def loop(active: Tensor, symbol: Tensor) -> list[float]:
    """For each expert, from the definition."""
    shares = []
    for column in active.unbind(1):
        served = symbol[column].tolist()
        each = [served.count(x) / int((symbol == x).sum()) for x in served]
        shares.append(sum(each) / len(each) if each else float("nan"))
    return shares


def agrees(found: Vocabulary, active: Tensor, symbol: Tensor) -> None:
    assert found.experts == pytest.approx(loop(active, symbol), nan_ok=True, abs=BOUND)
    known = [value for value in found.experts if value == value]
    assert found.mean == pytest.approx(sum(known) / len(known), abs=BOUND)
    assert len(found.permuted) == 20
    assert len(found.chance) == len(found.experts)
    of_experts = [value for value in found.chance if value == value]
    assert sum(of_experts) / len(of_experts) == pytest.approx(sum(found.permuted) / 20, abs=BOUND)
    share = active.double().mean(dim=0)
    assert all(chance >= mine - BOUND for chance, mine in zip(found.chance, share.tolist(), strict=True) if mine)


def test_text_has_vocabularies_of_what_is_read_and_of_what_comes_next(shared: text.Trunk) -> None:
    data = text.text(shared, shared.test, 5)
    found, active = untrained(data, "text")
    read, following = found.vocabulary
    assert (read.symbols, following.symbols) == ("input", "target")
    agrees(read, active, data.held_tokens.flatten())
    agrees(following, active, data.held_labels.flatten())
    assert read.mean > max(read.permuted)
    assert read.mean > following.mean


def test_the_course_of_information_begins_before_the_first_task() -> None:
    """None where all experts serve all tasks, all there is where each serves its own."""
    found, _ = untrained(data := digits(5, turned=True, bank=BANK), "digits-rotated")
    assert found.course == pytest.approx([0.0, math.log(len(data.held_labels))], abs=BOUND)


def test_digits_have_a_vocabulary_of_classes() -> None:
    data = digits(5, turned=True, bank=BANK)
    found, active = untrained(data, "digits-rotated")
    (classes,) = found.vocabulary
    assert classes.symbols == "class"
    agrees(classes, active, data.held_labels.flatten())
    assert classes.mean > max(classes.permuted)
