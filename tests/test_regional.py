"""A step compiled by regions is the step; what is compiled does not grow with the layers or with the steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from experiments import compiling
from onn import carve, objective, optim, train
from onn.recompute import recomputing_layers
from onn.region import inline
from onn.train import State
from tests.support import assert_close, assert_same, can_compile, normal, tolerance
from tests.test_qwen3 import parameters
from tests.test_train import ARCHITECTURE, SETTINGS, batch, rounding

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
"""torch._dynamo looks at it when a layer's input is the output of another."""


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_can_compile", lambda: True)
    torch._dynamo.reset()
    compiling._region.cache_clear()


def start(layers: int) -> State:
    architecture = replace(ARCHITECTURE, num_hidden_layers=layers)
    return train.init_state(carve.carve(parameters(architecture, dtype=torch.bfloat16), num_experts=10))


def graphs(layers: int) -> int:
    settings = replace(SETTINGS, model=replace(ARCHITECTURE, num_hidden_layers=layers))
    state = start(layers)
    before = counters["stats"]["unique_graphs"]
    train.step(state, batch(0), rounding(state.model, 0), settings, (), compiling.by_region("eager"))
    return counters["stats"]["unique_graphs"] - before


def test_more_layers_need_no_more_graphs() -> None:
    assert graphs(1) == 7
    assert graphs(4) == 0


def test_a_process_may_hold_the_graphs_of_many_models() -> None:
    def doubled(x: Tensor) -> Tensor:
        return 2 * x

    with torch._dynamo.config.patch(recompile_limit=8):
        part = compiling.by_region("eager")(doubled, kind="layer")
        for size in range(1, 12):
            assert_same(part(torch.ones(size)), torch.full((size,), 2.0))


def test_a_step_by_regions_is_the_eager_one_repeats_its_bits_and_never_compiles_again() -> None:
    state, region = start(2), compiling.by_region("aot_eager")
    noise = [rounding(state.model, seed) for seed in range(3)]
    expected = train.step(state, batch(0), noise[0], SETTINGS)
    got = train.step(state, batch(0), noise[0], SETTINGS, (), region)
    assert_close(got[1], expected[1], bound=tolerance(torch.bfloat16, terms=100))
    assert_close(got[0].model, expected[0].model, bound=tolerance(torch.bfloat16, terms=100))
    assert isinstance(got[1].sparse, objective.SparseMetrics)
    assert float(got[1].sparse.surprise) > 0
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same(train.step(state, batch(0), noise[0], SETTINGS, (), region), got)
        after = got[0]
        for position in (1, 2):
            after, _ = train.step(after, batch(position), noise[position], SETTINGS, (), region)


def test_recomputed_layers_are_compiled_too() -> None:
    state, settings = start(1), replace(SETTINGS, model=replace(ARCHITECTURE, num_hidden_layers=1))
    region = recomputing_layers(compiling.by_region("eager"), engine="autograd")
    noise = rounding(state.model, 0)
    expected = train.step(state, batch(0), noise, settings)
    assert_close(
        train.step(state, batch(0), noise, settings, (), region), expected, bound=tolerance(torch.bfloat16, terms=100)
    )
    assert counters["stats"]["unique_graphs"] > 0


@can_compile
def test_the_optimizer_compiled_for_any_size_is_the_eager_one() -> None:
    region, rates = compiling.by_region(), optim.Rates(beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
    outcomes = []
    for carried_out in (inline, region):
        moved = []
        for seed, shape in enumerate([(7, 5), (30, 2), (64,)]):
            entry = optim.Entry(
                param=normal(seed, *shape, dtype=torch.float32),
                grad=normal(seed + 3, *shape, dtype=torch.float32),
                steps=torch.tensor(2),
                mean=normal(seed + 6, *shape, dtype=torch.float32),
                square=normal(seed + 9, *shape, dtype=torch.float32).square(),
                learns=torch.tensor(True),
                bits=(),
            )
            moved.append(
                optim.adamw_leaf(entry, lr=torch.tensor(0.1), scale=torch.tensor(0.5), rates=rates, region=carried_out)
            )
        outcomes.append(tuple(moved))
    assert_close(outcomes[1], outcomes[0], bound=tolerance(torch.float32, terms=10))


def test_without_a_compiler_a_step_runs_as_it_is_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    compiling._can_compile.cache_clear()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert compiling.by_region() is inline
        assert compiling.compiled(train.step) is train.step
    assert capsys.readouterr().out.count("No C++ compiler found") == 1
    compiling._can_compile.cache_clear()
