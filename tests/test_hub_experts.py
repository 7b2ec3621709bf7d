"""`experts_implementation="onn"`: stock models on our bank against transformers' implementations and a plain loop."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import MixtralConfig, PreTrainedModel, Qwen3MoeForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import onn.functional as F
from onn.hub.experts import IMPLEMENTATION, StockExperts, dense_weights, experts_of, is_stock
from tests.hub_models import PLAIN, B, random_batch, random_model
from tests.support import BOUND, assert_close, assert_same, normal, relative_error, tolerance

EXPECTED = 1e-10
"""What parity in float64 must reach."""


class Pass(NamedTuple):
    logits: Tensor
    loss: Tensor
    grads: Mapping[str, Tensor]


def forward_and_backward(model: PreTrainedModel) -> Pass:
    model.zero_grad()
    output = model(**random_batch())
    output.loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(grads) == len(list(model.parameters()))
    return Pass(logits=output.logits.detach(), loss=output.loss.detach(), grads=grads)


class Choice(NamedTuple):
    """One layer's experts and what they are called with."""

    gate_up: Tensor
    down: Tensor
    x: Tensor
    chosen: Tensor
    weights: Tensor
    dy: Tensor


@st.composite
def choices(draw: st.DrawFn) -> Choice:
    """Every small size; a token may name an expert twice, and some weights are 0 or negative."""
    T, K, E = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    H, I, seed = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(0, 2**20))
    weights = normal(seed + 3, T, K)
    return Choice(
        gate_up=normal(seed, E, 2 * I, H) / H**0.5,
        down=normal(seed + 1, E, H, I) / I**0.5,
        x=normal(seed + 2, T, H),
        chosen=torch.randint(E, (T, K), generator=torch.Generator().manual_seed(seed)),
        weights=torch.where(weights.abs() < 0.2, 0, weights),
        dy=normal(seed + 4, T, H),
    )


def settings_of(choice: Choice, implementation: str, hidden_act: str) -> MixtralConfig:
    E, H, I = choice.down.shape
    config = MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=E, hidden_act=hidden_act)
    config._experts_implementation = implementation
    return config


def module_of(choice: Choice, implementation: str = IMPLEMENTATION, *, hidden_act: str = "silu") -> StockExperts:
    module = MixtralExperts(settings_of(choice, implementation, hidden_act))
    module.gate_up_proj = nn.Parameter(choice.gate_up.clone())
    module.down_proj = nn.Parameter(choice.down.clone())
    assert is_stock(module)
    return module


def example(dtype: torch.dtype = torch.float64, *, T: int = 8, E: int = 6) -> Choice:
    chosen = torch.stack([torch.arange(T) % E, (torch.arange(T) + 2) % E], dim=1)
    return Choice(
        gate_up=(normal(0, E, 8, 6) / 2).to(dtype),
        down=(normal(1, E, 6, 4) / 2).to(dtype),
        x=normal(2, T, 6).to(dtype),
        chosen=chosen,
        weights=normal(3, T, 2).abs().to(dtype),
        dy=normal(4, T, 6).to(dtype),
    )


def plain_loop(choice: Choice) -> Tensor:
    """The definition, one choice of one token after the other."""
    rows = []
    for x, experts, weights in zip(choice.x, choice.chosen.tolist(), choice.weights, strict=True):
        y = torch.zeros_like(x)
        for expert, weight in zip(experts, weights, strict=True):
            gate, up = choice.gate_up.unbind(0)[expert].chunk(2)
            y = y + weight * (choice.down.unbind(0)[expert] @ (silu(gate @ x) * (up @ x)))
        rows.append(y)
    return torch.stack(rows)


Layer = Callable[[Choice], Tensor]


def through(module: nn.Module) -> Layer:
    def layer(choice: Choice) -> Tensor:
        parameters = {"gate_up_proj": choice.gate_up, "down_proj": choice.down}
        arguments = (choice.x, choice.chosen, choice.weights)
        y: Tensor = torch.func.functional_call(module, parameters, arguments)
        return y

    return layer


def differentiated(layer: Layer, choice: Choice) -> tuple[Tensor, ...]:
    """The output and the gradients of everything that has one."""
    choice = Choice(*(leaf.clone().requires_grad_(leaf.is_floating_point()) for leaf in choice))
    y = layer(choice)
    grads = torch.autograd.grad(y, [choice.gate_up, choice.down, choice.x, choice.weights], choice.dy)
    return (y.detach(), *grads)


@given(choices())
def test_a_layer_and_all_its_gradients_are_those_of_a_loop_and_of_eager(choice: Choice) -> None:
    got = differentiated(through(module_of(choice)), choice)
    known = choice.weights != 0
    for oracle in (plain_loop, through(module_of(choice, "eager"))):
        expected = differentiated(oracle, choice)
        assert_close(got[:-1], expected[:-1], bound=BOUND)
        assert_close(torch.where(known, got[-1], 0), torch.where(known, expected[-1], 0), bound=BOUND)


@given(choices())
def test_the_most_experts_that_a_token_has_are_known(choice: Choice) -> None:
    """With room for no more, grouped products have room for every choice."""

    stock = F.bank

    def grouped(
        experts: F.Experts, x: Tensor, weights: Tensor, tap: dict[str, Tensor], *, backend: F.Bounded, min_k: int
    ) -> Tensor:
        return stock(experts, x, weights, tap, min_k=min_k, backend=F.Bounded("grouped", backend.per_token))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(F, "bank", grouped)
        got = differentiated(through(module_of(choice)), choice)
    assert_close(got[:-1], differentiated(plain_loop, choice)[:-1], bound=BOUND)


@given(choices())
def test_the_weights_of_an_expert_named_twice_add(choice: Choice) -> None:
    E = len(choice.down)
    got = dense_weights(choice.chosen, choice.weights, num_experts=E, dtype=torch.float64)
    expected = torch.zeros(len(choice.x), E, dtype=torch.float64)
    for token, (experts, weights) in enumerate(zip(choice.chosen.tolist(), choice.weights.tolist(), strict=True)):
        for expert, weight in zip(experts, weights, strict=True):
            expected[token, expert] += weight
    assert_close(got, expected, bound=tolerance(torch.float64, terms=4))
    twice = Choice(*choice)._replace(chosen=torch.zeros_like(choice.chosen))
    once = twice._replace(chosen=twice.chosen[:, :1], weights=twice.weights.sum(dim=1, keepdim=True))
    assert_close(through(module_of(twice))(twice), through(module_of(once))(once), bound=BOUND)


@pytest.mark.parametrize("family", PLAIN)
def test_a_model_and_all_its_gradients_are_those_of_eager(family: str) -> None:
    ours, theirs = (forward_and_backward(random_model(family, name)) for name in (IMPLEMENTATION, "eager"))
    assert_close(ours, theirs, bound=EXPECTED)
    assert all(bool(theirs.grads[name].any()) for name in theirs.grads if "experts" in name)


@pytest.mark.parametrize("family", PLAIN)
def test_a_model_and_all_its_gradients_are_those_of_grouped_mm_in_its_widest_dtype(family: str) -> None:
    ours, theirs = (
        forward_and_backward(random_model(family, name, dtype=torch.float32)) for name in (IMPLEMENTATION, "grouped_mm")
    )
    assert_close(ours, theirs, bound=tolerance(torch.float32, terms=100))


@pytest.mark.parametrize("family", PLAIN)
def test_one_training_step_is_that_of_eager(family: str) -> None:
    def stepped(implementation: str) -> dict[str, Tensor]:
        model = random_model(family, implementation).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        forward_and_backward(model)
        optimizer.step()
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    before = {name: p.detach() for name, p in random_model(family, "eager").named_parameters()}
    ours = stepped(IMPLEMENTATION)
    assert_close(ours, stepped("eager"), bound=EXPECTED)
    assert all(relative_error(ours[name], before[name]) > 1e-5 for name in before)


@pytest.mark.parametrize("family", PLAIN)
def test_generation_with_its_cache_is_that_of_eager_and_of_no_cache(family: str) -> None:
    def generated(implementation: str, *, use_cache: bool) -> Tensor:
        model = random_model(family, implementation).train(False)
        prompt = random_batch(length=3)["input_ids"]
        tokens: Tensor = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, use_cache=use_cache
        )
        return tokens

    got = generated(IMPLEMENTATION, use_cache=True)
    assert got.shape == (B, 9)
    assert torch.equal(got, generated(IMPLEMENTATION, use_cache=False))
    assert torch.equal(got, generated("eager", use_cache=True))


def test_from_pretrained_takes_the_name_and_the_checkpoint_does_not_keep_it(tmp_path: Path) -> None:
    model = random_model("qwen3_moe", IMPLEMENTATION, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = Qwen3MoeForCausalLM.from_pretrained(tmp_path, experts_implementation=IMPLEMENTATION)
    assert loaded.config._experts_implementation == IMPLEMENTATION
    tokens = random_batch()["input_ids"]
    assert_same(loaded(tokens).logits, model(tokens).logits)
    assert IMPLEMENTATION not in (tmp_path / "config.json").read_text().replace("_config", "")
    assert Qwen3MoeForCausalLM.from_pretrained(tmp_path).config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("T", [2, 8])
def test_a_compiled_layer_is_the_layer(T: int) -> None:
    choice = example(T=T)
    compiled = torch.compile(through(module_of(choice)), fullgraph=True, backend="aot_eager")
    assert_close(differentiated(compiled, choice), differentiated(plain_loop, choice), bound=BOUND)


def test_the_experts_are_views_of_the_parameters() -> None:
    module = module_of(example())
    gate, up, down = experts_of(module)
    assert gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr() == module.gate_up_proj.data_ptr()
    assert down.untyped_storage().data_ptr() == module.down_proj.data_ptr()


def test_tokens_fewer_than_the_experts_touch_only_those_that_they_name() -> None:
    choice = example(T=2, E=9)
    unnamed = torch.ones(9, dtype=torch.bool).index_fill(0, choice.chosen.flatten(), False)
    broken = choice._replace(gate_up=choice.gate_up.masked_fill(unnamed[:, None, None], torch.nan))
    assert int(unnamed.sum()) == 5
    assert_same(through(module_of(broken))(broken), through(module_of(choice))(choice))


def test_the_output_has_the_dtype_of_the_hidden_states_and_the_precision_of_the_experts() -> None:
    choice = example(torch.bfloat16)
    exact = Choice(*(leaf.double() if leaf.is_floating_point() else leaf for leaf in choice))
    y = through(module_of(choice))(choice)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, plain_loop(exact)) < tolerance(torch.bfloat16, terms=4)
    mixed = through(module_of(exact))(exact._replace(x=choice.x, weights=exact.weights.float()))
    assert mixed.dtype == torch.bfloat16
    assert relative_error(mixed, plain_loop(exact)) < tolerance(torch.bfloat16, terms=1, slack=1)


def test_autocast_leaves_the_experts_in_their_own_dtype() -> None:
    model = random_model("qwen3_moe", IMPLEMENTATION, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**random_batch())
    output.loss.backward()
    plain = forward_and_backward(random_model("qwen3_moe", IMPLEMENTATION, dtype=torch.float32))
    assert relative_error(output.logits, plain.logits) < tolerance(torch.bfloat16, terms=4)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("has_gate", False),
        ("has_bias", True),
        ("is_transposed", True),
        ("is_concatenated", False),
        ("has_post_expert_norm", True),
        ("_is_expert_parallel", True),
    ],
)
def test_a_layout_that_is_not_plain_is_refused_by_its_setting(setting: str, value: bool) -> None:
    module = module_of(example())
    setattr(module, setting, value)
    with pytest.raises(ValueError, match=f"MixtralExperts has {setting}={value}"):
        through(module)(example())


def test_another_activation_is_refused_by_its_setting() -> None:
    with pytest.raises(ValueError, match="MixtralExperts has hidden_act='gelu'"):
        through(module_of(example(), hidden_act="gelu"))(example())


def test_both_names_of_silu_are_taken() -> None:
    choice = example()
    assert_same(through(module_of(choice, hidden_act="swish"))(choice), through(module_of(choice))(choice))


def test_another_gate_is_refused() -> None:
    class Doubled(MixtralExperts):
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            return 2 * gate_up.chunk(2, dim=-1)[0]

    with pytest.raises(ValueError, match="Doubled has a gate of its own"):
        through(Doubled(settings_of(example(), IMPLEMENTATION, "silu")))(example())


def test_a_model_that_the_bank_cannot_compute_says_which_setting_and_what_to_do() -> None:
    model = random_model("gpt_oss", IMPLEMENTATION)
    with pytest.raises(ValueError, match=r"GptOssExperts has has_bias=True\. Leave experts_implementation"):
        model(**random_batch())


def test_importing_the_hub_registers_the_name_and_imports_no_mixture_of_experts() -> None:
    code = (
        "import sys, onn.hub; from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as known; "
        "assert 'onn' in known; "
        "assert not [name for name in sys.modules if 'modeling_' in name and 'moe' in name], 'a model was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
