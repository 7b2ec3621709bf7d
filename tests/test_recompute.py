from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

import onn.functional as F
from experiments.measure import peak_bytes
from onn import carve, objective, qwen3, train, tree
from onn.functional.transform import Taps
from onn.qwen3 import Model
from onn.recompute import recomputed, recomputing_layers
from onn.region import Region, inline
from onn.tree import Engine
from tests.support import BOUND, Inputs, assert_close, assert_same, each_backend, inputs_of, make_case, normal
from tests.test_qwen3 import MOE, config, parameters
from tests.test_train import SETTINGS, batch, carved_state, rounding

ENGINES: tuple[Engine, ...] = get_args(Engine)
AGAIN = {engine: recomputing_layers(inline, engine=engine) for engine in ENGINES}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_step_that_recomputes_its_layers_is_the_step_bit_for_bit(engine: Engine, dtype: torch.dtype) -> None:
    state, settings = carved_state(dtype=dtype), replace(SETTINGS, engine=engine)
    noise = rounding(state.model, 0) if dtype == torch.bfloat16 else ()
    expected = train.step(state, batch(0), noise, settings)
    assert isinstance(expected[1].sparse, objective.SparseMetrics)
    assert float(expected[1].sparse.surprise) > 0
    assert_same(train.step(state, batch(0), noise, settings, (), AGAIN[engine]), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the device's memory is measured")
@pytest.mark.parametrize("engine", ENGINES)
def test_recomputed_layers_keep_less(engine: Engine) -> None:
    architecture = config(hidden_size=32, intermediate_size=160, num_hidden_layers=6)
    model = carve.carve(parameters(architecture, dtype=torch.float32), num_experts=10)
    tokens = torch.zeros(2, 64, dtype=torch.int64)
    taps = objective.zero_taps(model, 128, names=("surprise",))

    def peak(region: Region) -> int:
        def loss(model: Model, inputs: Tensor, taps: Taps) -> tuple[Tensor, tuple[()]]:
            output = qwen3.forward(model, inputs, taps, config=architecture, moe=MOE, region=region)
            return output.logits.square().mean(), ()

        gradient = F.surprise_and_grad(loss, taps=taps, engine=engine)
        return peak_bytes(lambda: gradient(model, tokens))

    assert peak(AGAIN[engine]) < 0.75 * peak(inline)


def energy(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    hidden = torch.tanh(x @ weight)
    return hidden.square().sum(dim=-1), hidden


def total(weight: Tensor, x: Tensor, *, engine: Engine) -> tuple[Tensor, Tensor]:
    value, hidden = recomputed(energy, engine=engine)(weight, x)
    return value.sum(), hidden


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_not_differentiated_comes_out_detached(engine: Engine) -> None:
    weight = normal(0, 4, 3).requires_grad_()
    value, hidden = recomputed(energy, engine=engine)(weight, normal(1, 5, 4))
    assert value.requires_grad
    assert not hidden.requires_grad
    assert_same((value.detach(), hidden), tree.detach(energy(weight, normal(1, 5, 4))))


def test_an_ensemble_recomputes_like_its_members() -> None:
    weights, x = normal(0, 3, 4, 3), normal(1, 5, 4)

    def gradient(weight: Tensor) -> Tensor:
        found: Tensor = tree.grad(lambda w: total(w, x, engine="func")[0])(weight)
        return found

    expected = torch.stack([gradient(weight) for weight in weights])
    assert_close(tree.vmap(gradient, (0,))(weights), expected, bound=BOUND)


def both(weight: Tensor, x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Of a loss in which what comes out detached stands too, and must not be differentiated."""

    def loss(weight: Tensor) -> tuple[Tensor, Tensor]:
        value, hidden = total(weight, x, engine="func")
        return value + hidden.sum(), hidden

    return tree.value_and_grad(loss, engine="func")(weight)


@pytest.mark.parametrize("ensemble", [False, True])
def test_a_compiled_gradient_is_the_eager_one_an_ensembles_too(ensemble: bool) -> None:
    run = tree.vmap(both, (0, None)) if ensemble else both
    weight = normal(0, 3, 4, 3) if ensemble else normal(0, 4, 3)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=False, backend="aot_eager")
    expected = run(weight, normal(1, 5, 4))
    assert float(expected[1].abs().sum()) > 0
    assert_close(compiled(weight, normal(1, 5, 4)), expected, bound=BOUND)


@each_backend("dense", "loop", "native")
def test_compiled_banks_that_are_recomputed_measure_the_same_surprise(backend: F.Backend) -> None:
    case = make_case(0, T=6, H=4, E=5, I=3)

    def layer(inputs: Inputs) -> tuple[Tensor, tuple[()]]:
        return inputs.x + F.bank(*inputs, min_k=2, backend=backend), ()

    def loss(inputs: Inputs) -> tuple[Tensor, Tensor]:
        first, _ = recomputed(layer, engine="func")(inputs)
        return (first * case.dy).sum(), first

    run = tree.value_and_grad(loss, engine="func")
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=False, backend="aot_eager")
    inputs = inputs_of(case, ("surprise",))
    expected = run(inputs)
    assert float(expected[1].taps["surprise"].sum()) > 0
    assert_close(compiled(inputs), expected, bound=BOUND)


def test_the_other_engine_and_a_second_derivative_are_refused() -> None:
    weight, x = normal(0, 4, 3), normal(1, 5, 4)
    with pytest.raises(RuntimeError, match=r"stands neither under torch\.func nor under a second derivative"):
        tree.grad(lambda w: total(w, x, engine="autograd")[0])(weight)
    with pytest.raises(RuntimeError, match="differentiable once"):
        tree.grad(lambda w: tree.grad(lambda v: total(v, x, engine="func")[0])(w).square().sum())(weight)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_was_computed_under_autocast_is_recomputed_under_it(engine: Engine) -> None:
    weight, x = normal(0, 4, 3).float(), normal(1, 5, 4).float()
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not enabled):
            values = []
            for function in (energy, recomputed(energy, engine=engine)):
                own = weight.clone().requires_grad_()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                    value = function(own, x)[0].sum()
                values.append((value.detach(), *torch.autograd.grad(value, own)))
        assert_same(values[1], values[0])
