from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import onn.functional as F
from onn import carve, objective, qwen3, train, tree
from onn.functional.transform import Taps
from onn.objective import DistillConfig, StepConfig, distillation_loss, language_loss, soft_targets
from onn.qwen3 import Model
from onn.region import Region
from onn.train import Metrics, State
from tests.support import assert_close, assert_same, can_compile, normal, tolerance
from tests.test_qwen3 import parameters
from tests.test_train import ARCHITECTURE, SETTINGS, SPARSE, batch, changed, rounding, sparse

TEACHER = parameters(ARCHITECTURE)


def taught(*, weight: float, temperature: float = 2.0, settings: StepConfig = SETTINGS) -> StepConfig:
    return changed(settings, distill=DistillConfig(weight=weight, temperature=temperature))


def student() -> State:
    return train.init_state(carve.carve(TEACHER, num_experts=10))


def divergence(metrics: Metrics) -> Tensor:
    assert isinstance(metrics.divergence, Tensor)
    return metrics.divergence


def plain(student: list[float], teacher: list[float], temperature: float) -> float:
    """The definition, one row in Python's own numbers."""

    def softmax(row: list[float]) -> list[float]:
        powers = [math.exp((value - max(row)) / temperature) for value in row]
        return [power / sum(powers) for power in powers]

    p, q = softmax(teacher), softmax(student)
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


temperatures = st.sampled_from([0.5, 1.0, 3.0])
seeds = st.integers(0, 2**20)


@given(seed=seeds, rows=st.integers(0, 5), size=st.integers(1, 9), temperature=temperatures)
def test_the_loss_is_its_definition(seed: int, rows: int, size: int, temperature: float) -> None:
    logits, soft = 3 * normal(seed, rows, size), 3 * normal(seed + 1, rows, size)
    pairs = zip(logits.tolist(), soft.tolist(), strict=True)
    expected = torch.tensor([plain(s, t, temperature) for s, t in pairs], dtype=torch.float64)
    torch.testing.assert_close(
        distillation_loss(logits, soft, temperature=temperature), expected, rtol=1e-10, atol=1e-13 * temperature**2
    )


@given(seed=seeds, size=st.integers(1, 9), temperature=temperatures)
def test_the_loss_is_that_of_torch(seed: int, size: int, temperature: float) -> None:
    logits, soft = normal(seed, 6, size), normal(seed + 1, 6, size)
    rows = torch.nn.functional.kl_div(
        torch.log_softmax(logits / temperature, dim=-1),
        torch.softmax(soft / temperature, dim=-1),
        reduction="batchmean",
    )
    torch.testing.assert_close(
        distillation_loss(logits, soft, temperature=temperature).mean(), temperature**2 * rows, rtol=1e-10, atol=1e-13
    )


@given(seed=seeds, size=st.integers(1, 9), shift=st.sampled_from([0.0, 5.0, -40.0]), temperature=temperatures)
def test_a_student_that_says_what_the_teacher_says_has_nothing_to_learn(
    seed: int, size: int, shift: float, temperature: float
) -> None:
    soft = normal(seed, 4, size)

    def loss(logits: Tensor) -> Tensor:
        return distillation_loss(logits, soft, temperature=temperature).sum()

    bound = tolerance(torch.float64, terms=size) * temperature**2 * (1 + abs(shift))
    assert abs(float(loss(soft + shift))) <= bound
    assert float(tree.grad(loss)(soft + shift).abs().max()) <= bound


def test_a_hot_teacher_asks_for_equal_logits() -> None:
    """In the limit the loss is half the variance of the difference of the logits, and so has a size of its own."""
    logits, soft = normal(0, 5, 8), normal(1, 5, 8)
    limit = (soft - logits).var(dim=-1, correction=0) / 2
    for temperature in (1e2, 1e3):
        got = distillation_loss(logits, soft, temperature=temperature)
        assert_close(got, limit, bound=10 / temperature)


def test_the_loss_has_the_dtype_of_its_logits_and_survives_large_ones() -> None:
    logits = torch.tensor([[3e4, 0.0, -3e4], [1.0, 2.0, 3.0]])
    loss = distillation_loss(logits, logits.flip(-1), temperature=1.0)
    assert loss.dtype == torch.float32
    assert float(loss[0]) == pytest.approx(6e4)
    logits, soft = normal(0, 4, 300).bfloat16(), normal(1, 4, 300).bfloat16()
    narrow = distillation_loss(logits, soft, temperature=2.0)
    assert_same(narrow, distillation_loss(logits.float(), soft.float(), temperature=2.0))


@pytest.mark.parametrize(("weight", "temperature"), [(-0.1, 1.0), (1.1, 1.0), (0.5, 0.0), (0.5, -1.0)])
def test_values_that_mean_nothing_are_refused(weight: float, temperature: float) -> None:
    with pytest.raises(ValueError, match="DistillConfig: expected"):
        DistillConfig(weight=weight, temperature=temperature)


def test_weight_without_a_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match=r"distill\.weight=0\.5 needs a dense model as the teacher"):
        train.step(student(), batch(0), (), taught(weight=0.5))


def test_without_weight_no_teacher_is_asked_and_the_step_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train.step(student(), batch(0), (), SETTINGS)
    passes = []
    hidden_states = qwen3.hidden_states

    def counted(
        model: Model,
        tokens: Tensor,
        taps: Taps,
        *,
        config: qwen3.Qwen3Config,
        moe: qwen3.MoeConfig | None,
        region: Region,
    ) -> tuple[Tensor, tuple[qwen3.Carved, ...]]:
        passes.append(model)
        return hidden_states(model, tokens, taps, config=config, moe=moe, region=region)

    monkeypatch.setattr(qwen3, "hidden_states", counted)
    got = train.step(student(), batch(0), (), taught(weight=0.0), TEACHER)
    assert len(passes) == 1
    assert got[1].divergence == ()
    assert_same(got, expected)
    train.step(student(), batch(0), (), taught(weight=0.5), TEACHER)
    assert len(passes) == 3


def test_what_is_minimised_mixes_both_losses_and_so_are_its_gradients() -> None:
    data, state = batch(0), student()
    model = tree.map1(lambda leaf: leaf + 0.1 * normal(leaf.numel(), *leaf.shape), state.model)
    taps = objective.zero_taps(model, data.tokens.numel(), names=())

    def at(weight: float) -> tuple[tuple[Tensor, objective.Measured], Model]:
        settings = taught(weight=weight, settings=changed(SETTINGS, moe=replace(SPARSE.moe, min_k=10)))
        soft = soft_targets(TEACHER, data, config=settings)
        return tree.value_and_grad(language_loss, engine="autograd")(model, data, taps, soft, config=settings)

    (error, _), plain_gradient = at(0.0)
    (distance, alone), soft_gradient = at(1.0)
    (mixed, seen), gradient = at(0.3)
    assert_same((alone.error, seen.error), (error, error))
    assert isinstance(seen.divergence, Tensor)
    assert_close((seen.divergence, mixed), (distance, 0.7 * error + 0.3 * distance), bound=1e-12)
    expected = tree.map2(lambda a, b: 0.7 * a + 0.3 * b, plain_gradient, soft_gradient)
    assert_close(gradient, expected, bound=tolerance(torch.float32, terms=1))  # the gradients that pass the norms


def test_only_targets_that_count_are_taught() -> None:
    data, state = batch(1), student()
    settings = taught(weight=0.5, temperature=1.5)
    model = tree.map1(lambda leaf: leaf + 0.1 * normal(leaf.numel(), *leaf.shape), state.model)
    metrics = train.step(state._replace(model=model), data, (), settings, TEACHER)[1]
    taps = objective.zero_taps(model, 0, names=())
    logits = qwen3.forward(model, data.tokens, taps, config=ARCHITECTURE, moe=SPARSE.moe).logits
    soft = qwen3.forward(TEACHER, data.tokens, (), config=ARCHITECTURE, moe=None).logits
    rows = [
        plain(ours.tolist(), theirs.tolist(), 1.5)
        for ours, theirs in zip(logits[data.mask], soft[data.mask], strict=True)
    ]
    assert float(divergence(metrics)) == pytest.approx(sum(rows) / len(rows), rel=1e-10)


def test_the_teacher_is_a_constant_and_shares_what_the_carve_left_untouched() -> None:
    state = student()
    assert state.model.embedding.data_ptr() == TEACHER.embedding.data_ptr()
    assert state.model.layers[0].attention.q.data_ptr() == TEACHER.layers[0].attention.q.data_ptr()
    before = [leaf.clone() for leaf in tree.leaves(TEACHER)]
    wanting = tree.map1(lambda leaf: leaf.detach().requires_grad_(), TEACHER)
    soft = soft_targets(wanting, batch(0), config=taught(weight=0.5))
    assert isinstance(soft, Tensor)
    assert not soft.requires_grad
    for _ in range(3):
        state, _ = train.step(state, batch(0), (), taught(weight=0.5), TEACHER)
    assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves(TEACHER), strict=True))


def test_a_taught_step_is_pure_and_both_engines_agree() -> None:
    state, data, settings = student(), batch(0), taught(weight=0.5)
    state, _ = train.step(state, data, (), settings, TEACHER)
    before = [leaf.clone() for leaf in tree.leaves((state, data))]
    first = train.step(state, data, (), settings, TEACHER)
    assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves((state, data)), strict=True))
    assert_same(train.step(state, data, (), settings, TEACHER), first)
    assert_close(train.step(state, data, (), replace(settings, engine="func"), TEACHER), first, bound=1e-10)


@can_compile
def test_a_compiled_taught_step_is_the_eager_one() -> None:
    architecture = replace(ARCHITECTURE, num_hidden_layers=1)
    settings = taught(weight=0.5, settings=replace(SETTINGS, engine="func", model=architecture))
    teacher = parameters(architecture, dtype=torch.float32)
    state = train.init_state(carve.carve(teacher, num_experts=10))
    state, _ = train.step(state, batch(0), (), settings, teacher)
    compiled = torch.compile(train.step, fullgraph=True, backend="aot_eager")
    got, expected = (run(state, batch(1), (), settings, teacher) for run in (compiled, train.step))
    assert_close(got, expected, bound=tolerance(torch.float32, terms=1000))


def test_the_error_of_pi_is_the_main_loss() -> None:
    state, data = student(), batch(2)
    state, _ = train.step(state, data, (), SETTINGS)
    plain_metrics, metrics = (train.step(state, data, (), taught(weight=weight), TEACHER)[1] for weight in (0.0, 0.9))
    assert_same(metrics.loss, plain_metrics.loss)
    pi = F.predictive_integrity(
        metrics.loss, metrics.tau, sparse(metrics).surprise, alpha=1.0, gamma=0.2, tau_floor=0.1
    )
    assert_same(sparse(metrics).pi, pi)


def test_a_teacher_that_is_not_finite_changes_nothing_but_the_counter() -> None:
    state = student()
    broken = TEACHER._replace(norm=torch.full_like(TEACHER.norm, torch.nan))
    after, metrics = train.step(state, batch(0), (), taught(weight=0.5), broken)
    assert bool(metrics.skipped)
    assert bool(torch.isfinite(metrics.loss))
    assert_same((after.model, after.optimizer), (state.model, state.optimizer))


def test_a_model_just_carved_is_its_teacher() -> None:
    metrics = train.step(student(), batch(0), (), taught(weight=0.5), TEACHER)[1]
    assert abs(float(divergence(metrics))) <= tolerance(torch.float64, terms=100)


def test_distillation_brings_the_divergence_down_in_bfloat16_too() -> None:
    teacher = tree.map1(Tensor.bfloat16, TEACHER)

    def ends(weight: float) -> float:
        state = train.init_state(carve.carve(teacher, num_experts=10))
        for position in range(40):
            noise = rounding(state.model, position)
            state, _ = train.step(state, batch(position), noise, taught(weight=weight), teacher)
        settings = taught(weight=1.0)
        seen = [train.step(state, batch(100 + i), rounding(state.model, i), settings, teacher)[1] for i in range(5)]
        return float(torch.stack([divergence(metrics) for metrics in seen]).mean())

    assert ends(1.0) < 0.5 * ends(0.0)
