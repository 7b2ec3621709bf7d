"""`onn.hub.surprise` against untied copies of the experts' weights, and what it leaves behind: nothing.

Shape letters: B batch, S sequence, T = B S tokens, K experts of a token, E experts, I expert intermediate size,
P pre-activations of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import relu, silu
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

import onn.hub
from onn.hub import ModelSurprise
from onn.hub.experts import IMPLEMENTATION
from tests.hub_models import FAMILIES, PLAIN, B, S, experts_modules, random_batch, random_model
from tests.support import BOUND, assert_close, assert_same, relative_error, tolerance

RENAMED = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
"""Its new name is not in every version."""
Activation = Callable[[Tensor], Tensor]


def swiglu(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return silu(gate) * up


def clamped_swiglu(h: Tensor) -> Tensor:
    gate, up = h[..., 0::2].clamp(max=0.5), h[..., 1::2].clamp(-0.5, 0.5)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def squared_relu(h: Tensor) -> Tensor:
    return relu(h).square()


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType({"gpt_oss": clamped_swiglu, "nemotron_h": squared_relu})


class Untied(nn.Module):
    """Experts [T, E, ...] of which no two tokens share a weight; a token's choices are computed one by one."""

    def __init__(self, module: nn.Module, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.transposed = bool(module.is_transposed)
        names = [name for name, _ in module.named_parameters()]
        self.names = sorted(names, key=lambda name: "down" in name)
        for name in names:
            value = module.get_parameter(name).detach()
            self.register_parameter(name, nn.Parameter(value.expand(B * S, *value.shape).clone()))
        self.chosen = self.weights = torch.empty(0)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self.chosen, self.weights = top_k_index, top_k_weights.detach().double()
        rows = []
        for t, x in enumerate(hidden_states):
            y = torch.zeros_like(x)
            for e, w in zip(top_k_index[t].tolist(), top_k_weights[t], strict=True):
                y = y + w * self.affine("down", t, e, self.activation(self.affine("up", t, e, x)))
            rows.append(y)
        return torch.stack(rows)

    def affine(self, kind: str, t: int, e: int, x: Tensor) -> Tensor:
        found = {name.endswith("bias"): self.get_parameter(name)[t, e] for name in self.names if kind in name}
        matrix = found[False].mT if self.transposed else found[False]
        return matrix @ x + found.get(True, torch.zeros((), dtype=x.dtype))


class Oracle(NamedTuple):
    """What stock autograd says of a model's layers."""

    loss: Tensor
    surprise: dict[str, Tensor]
    weights: dict[str, Tensor]


def oracle(family: str, batch: Mapping[str, Tensor]) -> Oracle:
    model = random_model(family, "eager")
    layers: dict[str, Untied] = {}
    for name, module in experts_modules(model).items():
        layers[name] = Untied(module, ACTIVATIONS.get(family, swiglu))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[name])
    loss = model(**batch).loss
    squares, weights = {}, {}
    for name, layer in layers.items():
        grads = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
        squares[name] = torch.stack([grad.square().flatten(2).sum(dim=-1) for grad in grads]).sum(dim=0)
        weights[name] = torch.zeros_like(squares[name]).scatter(1, layer.chosen, layer.weights)
    return Oracle(loss=loss.detach(), surprise={n: s.sqrt() for n, s in squares.items()}, weights=weights)


def surprises(measured: ModelSurprise) -> dict[str, Tensor]:
    return {name: layer.surprise for name, layer in measured.layers.items()}


def measured(family: str, implementation: str = "eager", *, dtype: torch.dtype = torch.float64) -> ModelSurprise:
    return onn.hub.surprise(random_model(family, implementation, dtype=dtype), random_batch())


@pytest.mark.parametrize("family", FAMILIES)
def test_surprise_is_the_norm_of_the_gradient_of_each_tokens_untied_copy_in_every_layer(family: str) -> None:
    # the eager experts of nemotron_h add up in the dtype of their weights, which is float32
    expected, got = (
        oracle(family, random_batch()),
        measured(family, "batched_mm" if family == "nemotron_h" else "eager"),
    )
    assert list(got.layers) == list(expected.surprise) == list(experts_modules(random_model(family, "eager")))
    assert len(got.layers) == 2
    assert_close(got.loss, expected.loss, bound=BOUND)
    assert_close(surprises(got), expected.surprise, bound=BOUND)
    for name, layer in got.layers.items():
        assert_close(layer.weights, expected.weights[name], bound=BOUND)
        assert torch.equal(layer.active, expected.weights[name] != 0)
        assert torch.equal(layer.active.sum(dim=1), torch.full((B * S,), 2))
        assert not layer.surprise[~layer.active].any()
        assert bool((expected.surprise[name] > 0).any(dim=0).sum() > 1)


@pytest.mark.parametrize("family", PLAIN)
def test_every_implementation_gives_the_same_surprise(family: str) -> None:
    expected = measured(family)
    for implementation in (IMPLEMENTATION, "batched_mm"):
        assert_close(measured(family, implementation), expected, bound=BOUND)
    wide = tolerance(torch.float32, terms=100)
    assert_close(measured(family, "grouped_mm", dtype=torch.float32), expected, bound=wide)


def test_bfloat16_models_are_measured_in_float32() -> None:
    got = measured("qwen3_moe", dtype=torch.bfloat16)
    assert all(layer.surprise.dtype == torch.float32 for layer in got.layers.values())
    assert all(layer.weights.dtype == torch.bfloat16 for layer in got.layers.values())


def test_surprise_scales_with_the_loss_that_the_model_returns() -> None:
    model, batch = random_model("qwen3_moe", "eager"), random_batch()
    counted = int((batch["labels"][:, 1:] != -100).sum())
    mean = onn.hub.surprise(model, batch)
    total = onn.hub.surprise(model, {**batch, "num_items_in_batch": 1})
    assert_close(total.loss, mean.loss * counted, bound=tolerance(torch.float32, terms=1))
    for name, layer in mean.layers.items():
        assert_close(total.layers[name].surprise, layer.surprise * counted, bound=tolerance(torch.float32, terms=1))


def test_a_position_that_the_loss_does_not_see_is_active_without_surprise() -> None:
    model, batch = random_model("qwen3_moe", "eager"), random_batch(rows=1)
    batch["labels"] = batch["input_ids"].index_fill(1, torch.arange(5, S), -100)
    for layer in onn.hub.surprise(model, batch).layers.values():
        assert bool((layer.surprise[:4] > 0).any(dim=1).all())
        assert not layer.surprise[4:].any()
        assert bool(layer.active.any(dim=1).all())


class State(NamedTuple):
    """Everything of a model that a measurement could touch."""

    tensors: dict[str, Tensor]
    grads: dict[str, Tensor | None]
    required: list[bool]
    training: list[bool]
    attributes: list[list[str]]
    hooks: list[int]
    implementation: dict[str, str | None]
    config: str


def state_of(model: PreTrainedModel) -> State:
    modules = list(model.modules())
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    kept = {name: p.grad for name, p in model.named_parameters()}
    return State(
        tensors={name: value.clone() for name, value in model.state_dict().items()},
        grads={name: None if grad is None else grad.clone() for name, grad in kept.items()},
        required=[p.requires_grad for p in model.parameters()],
        training=[module.training for module in modules],
        attributes=[sorted(vars(module)) for module in modules],
        hooks=[len(vars(module)[kind]) for module in modules for kind in (*kinds, "_forward_hooks_with_kwargs")],
        implementation=model.get_experts_implementation(),
        config=str(model.config.to_dict()),
    )


def assert_untouched(model: PreTrainedModel, before: State) -> None:
    after = state_of(model)
    assert_same(after.tensors, before.tensors)
    assert after._replace(tensors={}, grads={}) == before._replace(tensors={}, grads={})
    for name, grad in before.grads.items():
        now = after.grads[name]
        assert (grad is None) == (now is None), name
        assert grad is None or now is None or torch.equal(grad, now), name


def lived_in(family: str, implementation: str) -> PreTrainedModel:
    """A model in the middle of something: some parameters frozen, some with a gradient, one module in another mode."""
    model = random_model(family, implementation)
    model(**random_batch()).loss.backward()
    for position, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(position % 3 > 0)
        if position % 2:
            parameter.grad = None
    next(iter(experts_modules(model).values())).train(False)
    return model


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", IMPLEMENTATION])
@pytest.mark.parametrize("family", PLAIN)
def test_nothing_is_left_behind_on_the_model(family: str, implementation: str) -> None:
    model = lived_in(family, implementation)
    before = state_of(model)
    onn.hub.surprise(model, random_batch())
    assert_untouched(model, before)


class BrokenError(RuntimeError):
    """What a model raises in a test."""


def breaks(*_: object) -> None:
    raise BrokenError


@pytest.mark.parametrize("when", ["forward", "backward", "no labels"])
def test_nothing_is_left_behind_after_an_error(when: str) -> None:
    model = lived_in("qwen3_moe", "eager")
    last = list(experts_modules(model).values())[-1]
    if when == "forward":
        last.register_forward_pre_hook(breaks)
    elif when == "backward":
        last.register_full_backward_hook(breaks)
    before = state_of(model)
    batch = random_batch()
    if when == "no labels":
        del batch["labels"]
    with pytest.raises(ValueError if when == "no labels" else BrokenError):
        onn.hub.surprise(model, batch)
    assert_untouched(model, before)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("family", PLAIN)
def test_frozen_parameters_are_measured_all_the_same(family: str) -> None:
    model = random_model(family, "eager").requires_grad_(False)
    assert_close(onn.hub.surprise(model, random_batch()), measured(family), bound=BOUND)


def test_no_gradient_of_a_parameter_is_computed() -> None:
    model = random_model("qwen3_moe", "eager")
    for parameter in model.parameters():
        parameter.register_hook(breaks)
    with pytest.raises(BrokenError):
        model(**random_batch()).loss.backward()
    onn.hub.surprise(model, random_batch())


def checkpointed(family: str, *, use_reentrant: bool) -> PreTrainedModel:
    model = random_model(family, "eager")
    enable: Callable[[Mapping[str, bool]], None] = model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    assert model.training
    return model


@RENAMED
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("family", PLAIN)
def test_gradient_checkpointing_changes_nothing(family: str, frozen: bool) -> None:
    model = checkpointed(family, use_reentrant=False)
    model.requires_grad_(not frozen)
    before = state_of(model)
    assert_close(onn.hub.surprise(model, random_batch()), measured(family), bound=BOUND)
    assert_untouched(model, before)


@RENAMED
def test_reentrant_checkpointing_is_refused_with_what_to_do_instead() -> None:
    model = checkpointed("mixtral", use_reentrant=True)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts ran without gradients.*use_reentrant"):
        onn.hub.surprise(model, random_batch())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_does_not_matter(mode: Callable[[], torch.no_grad]) -> None:
    model, batch = random_model("olmoe", "eager"), random_batch()
    with mode():
        got = onn.hub.surprise(model, batch)
    assert_same(surprises(got), surprises(measured("olmoe")))


class Counter:
    """A compiler that counts what it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        self.graphs += 1
        return graph


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own tracing
def test_a_compiled_model_is_measured_eagerly_and_stays_compiled() -> None:
    compiler = Counter()
    model, batch = random_model("olmoe", "batched_mm"), random_batch()
    for module in experts_modules(model).values():
        module.compile(backend=compiler, fullgraph=True)
    assert_close(onn.hub.surprise(model, batch), measured("olmoe"), bound=BOUND)
    with pytest.raises(ValueError, match="no scalar loss"):
        onn.hub.surprise(model, {"input_ids": batch["input_ids"]})
    assert compiler.graphs == 0
    model(**batch)
    graphs = compiler.graphs
    assert graphs > 0
    assert_close(onn.hub.surprise(model, batch), measured("olmoe"), bound=BOUND)
    assert compiler.graphs == graphs


def test_under_autocast_the_surprise_is_that_of_the_autocast_loss() -> None:
    model = random_model("qwen3_moe", "eager", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = onn.hub.surprise(model, random_batch())
    for name, layer in measured("qwen3_moe").layers.items():
        assert relative_error(got.layers[name].surprise, layer.surprise) < tolerance(torch.bfloat16, terms=16)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_that_writes_into_the_output_of_its_experts_is_measured_before_that(frozen: bool) -> None:
    def doubles(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output * 2

    def doubles_in_place(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output.mul_(2)

    found = []
    for hook in (doubles, doubles_in_place):
        model = random_model("mixtral", "eager").requires_grad_(not frozen)
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(hook)
        found.append(surprises(onn.hub.surprise(model, random_batch())))
    assert_close(found[1], found[0], bound=BOUND)


def test_layers_that_did_not_run_are_left_out() -> None:
    model = random_model("mixtral", "eager")
    model.extra = deepcopy(model.model.layers[0].mlp.experts)
    assert list(onn.hub.surprise(model, random_batch()).layers) == list(measured("mixtral").layers)


def test_a_layer_that_runs_twice_is_refused() -> None:
    model = random_model("mixtral", "eager")
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    with pytest.raises(ValueError, match="ran twice"):
        onn.hub.surprise(model, random_batch())


@pytest.mark.parametrize("setting", ["has_post_expert_norm", "_is_expert_parallel"])
def test_experts_that_the_formula_does_not_cover_are_refused_by_their_setting(setting: str) -> None:
    model = random_model("mixtral", "eager")
    setattr(model.model.layers[1].mlp.experts, setting, True)
    with pytest.raises(ValueError, match=rf"model\.layers\.1\.mlp\.experts has {setting}=True"):
        onn.hub.surprise(model, random_batch())


def on_meta(parameter: Tensor) -> Tensor:
    return parameter.to("meta")


@pytest.mark.parametrize(("put", "message"), [(on_meta, "is offloaded"), (Tensor.char, "is quantised: .* torch.int8")])
def test_experts_that_are_not_there_as_floats_are_refused(put: Callable[[Tensor], Tensor], message: str) -> None:
    def leaves(module: nn.Module, args: object, output: object) -> None:
        moved = put(module.get_parameter("gate_up_proj").detach())
        module.register_parameter("gate_up_proj", nn.Parameter(moved, requires_grad=False))

    model = random_model("mixtral", "eager")
    model.model.layers[1].mlp.experts.register_forward_hook(leaves)
    with pytest.raises(ValueError, match=rf"model\.layers\.1\.mlp\.experts {message}"):
        onn.hub.surprise(model, random_batch())


def test_a_dense_model_is_refused() -> None:
    config = Qwen3Config(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=4)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no mixture-of-experts layer"):
        onn.hub.surprise(Qwen3ForCausalLM(config), random_batch())


def test_a_batch_without_labels_is_refused() -> None:
    tokens = {"input_ids": random_batch()["input_ids"]}
    with pytest.raises(ValueError, match=r"MixtralForCausalLM returned no scalar loss for a batch of input_ids; give"):
        onn.hub.surprise(random_model("mixtral", "eager"), tokens)
