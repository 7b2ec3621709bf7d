from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen3MoeConfig

import onn.functional as F
from onn import carve, qwen3, tree
from onn.functional.transform import Taps
from onn.hub import OnnForCausalLM, architecture, tapped, to_module, to_tree
from onn.hub.convert import names
from onn.qwen3 import Model, Moe
from tests.hub import SELECTIVE, TOP_K, Tiny, generated, make_tiny, prompts, tinies
from tests.support import assert_close, assert_same
from tests.test_qwen3 import MOE, config, hub_names, parameters, reference

checkpointing_is_renamed = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
ROUTES = pytest.mark.parametrize("moe", [SELECTIVE, TOP_K], ids=["threshold", "top_k"])


def gradients(tiny: Tiny, tokens: Tensor, probe: Tensor) -> Model:
    def loss(model: Model) -> tuple[Tensor, tuple[()]]:
        output = qwen3.forward(model, tokens, tiny.taps, config=tiny.config, moe=tiny.moe)
        return (output.logits * probe).sum(), ()

    return tree.value_and_grad(loss, engine="autograd")(tiny.model)[1]


def train(module: OnnForCausalLM, *, checkpointing: bool) -> None:
    module.train()
    if checkpointing:
        module.gradient_checkpointing_enable()  # type: ignore[no-untyped-call]  # transformers does not annotate it


@settings(max_examples=20)
@given(tiny=tinies(dtype=torch.float32), batch=st.integers(1, 3), length=st.integers(1, 9))
def test_logits_are_those_of_the_functions_bit_for_bit(tiny: Tiny, batch: int, length: int) -> None:
    tokens = prompts(tiny, batch, length)
    with torch.no_grad():
        assert_same(tiny.module()(tokens).logits, tiny.logits(tokens))


@ROUTES
def test_bfloat16_logits_are_those_of_the_functions_bit_for_bit(moe: qwen3.MoeConfig) -> None:
    tiny = make_tiny(config(), moe, dtype=torch.bfloat16)
    tokens, module = prompts(tiny, 2, 9), tiny.module()
    assert {p.dtype for name, p in module.named_parameters() if "thresholds" in name} == {torch.float32}
    with torch.no_grad():
        assert_same(module(tokens).logits, tiny.logits(tokens))


@checkpointing_is_renamed
@settings(max_examples=12)
@given(tiny=tinies(dtype=torch.float64), min_k=st.sampled_from([1, 2, 10]), checkpointing=st.booleans())
def test_gradients_are_those_of_the_functions_smk_and_checkpointing_included(
    tiny: Tiny, min_k: int, checkpointing: bool
) -> None:
    tiny = tiny._replace(moe=replace(tiny.moe, min_k=min_k))
    tokens, module = prompts(tiny, 2, 5), tiny.module()
    probe = torch.randn(2, 5, tiny.config.vocab_size, dtype=torch.float64)
    expected = gradients(tiny, tokens, probe)
    train(module, checkpointing=checkpointing)
    (module(tokens, use_cache=False).logits * probe).sum().backward()
    parameters = dict(module.named_parameters())
    for name, grad in zip(names(expected), tree.leaves(expected), strict=True):
        found = parameters[name].grad
        assert_close(torch.zeros_like(grad) if found is None else found, grad, bound=1e-10)


@settings(max_examples=12)
@given(tiny=tinies(dtype=torch.float64), length=st.integers(2, 7), data=st.data())
def test_logits_with_a_cache_are_those_without(tiny: Tiny, length: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, length - 1))
    tokens, module = prompts(tiny, 2, length), tiny.module()
    with torch.no_grad():
        start = module(tokens[:, :first], use_cache=True)
        parts, cache = [start.logits], start.past_key_values
        for position in range(first, length):
            step = module(tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
            parts.append(step.logits)
            cache = step.past_key_values
        assert_close(torch.cat(parts, dim=1), tiny.logits(tokens), bound=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
@settings(max_examples=12)
@given(tiny=tinies(dtype=torch.float64), lengths=st.lists(st.integers(1, 6), min_size=2, max_size=3))
def test_padding_changes_nothing(side: str, tiny: Tiny, lengths: list[int]) -> None:
    size = max(lengths)
    texts = [prompts(tiny, 1, length, seed=row) for row, length in enumerate(lengths)]
    tokens, mask = prompts(tiny, len(lengths), size, seed=99), torch.zeros(len(lengths), size, dtype=torch.int64)
    places = [slice(size - length, size) if side == "left" else slice(0, length) for length in lengths]
    for row, (text, place) in enumerate(zip(texts, places, strict=True)):
        tokens[row, place], mask[row, place] = text[0], 1
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = tiny.module()(tokens, attention_mask=mask, position_ids=positions).logits
        for row, (text, place) in enumerate(zip(texts, places, strict=True)):
            assert_close(logits[row, place], tiny.logits(text)[0], bound=1e-10)


@ROUTES
def test_greedy_generation_takes_the_likeliest_token_of_the_functions(moe: qwen3.MoeConfig) -> None:
    tiny = make_tiny(config(), moe, dtype=torch.float64, seed=3)
    tokens = prompts(tiny, 2, 4)
    expected = tokens
    for _ in range(6):
        expected = torch.cat([expected, tiny.logits(expected)[:, -1:].argmax(dim=-1)], dim=1)
    for use_cache in (True, False):
        assert torch.equal(generated(tiny.module(), tokens, length=6, use_cache=use_cache), expected)


def test_generation_from_a_left_padded_batch_is_that_of_each_prompt_alone() -> None:
    tiny = make_tiny(config(), SELECTIVE, dtype=torch.float64, seed=3)
    module, long, short = tiny.module(), prompts(tiny, 1, 5), prompts(tiny, 1, 2, seed=2)
    both = torch.cat([long, torch.cat([torch.zeros(1, 3, dtype=torch.int64), short], dim=1)])
    mask = torch.ones_like(both)
    mask[1, :3] = 0
    got = generated(module, both, length=5, attention_mask=mask)
    for row, prompt in ((0, long), (1, short)):
        alone = generated(module, prompt, length=5)
        assert torch.equal(got[row, 5:], alone[0, prompt.shape[1] :])


@settings(max_examples=12)
@given(tiny=tinies(dtype=torch.bfloat16))
def test_tree_and_module_share_their_memory_both_ways(tiny: Tiny) -> None:
    module = tiny.module()
    back = to_tree(module)
    assert (architecture(module.config), module.config.moe_config()) == (tiny.config, tiny.moe)
    assert tree.paths(back) == tree.paths(tiny.model)
    assert_same(back, tiny.model)
    parameters = dict(module.named_parameters())
    for name, first, second in zip(names(tiny.model), tree.leaves(tiny.model), tree.leaves(back), strict=True):
        assert first.data_ptr() == second.data_ptr() == parameters.pop(name).data_ptr(), name
        assert not second.requires_grad
    assert not parameters
    if tiny.config.tie_word_embeddings:
        assert module.lm_head.weight is module.model.embed_tokens.weight
    with torch.no_grad():
        module.model.layers[0].input_layernorm.weight.fill_(3)
    assert bool((tiny.model.layers[0].input_norm == 3).all())


def test_a_stock_qwen3_becomes_a_tree_in_the_same_memory() -> None:
    dense = parameters(config(), dtype=torch.float32)
    stock = reference(dense, config())
    got = to_tree(stock)
    assert_same(got, dense)
    assert architecture(stock.config) == config()
    named = dict(stock.named_parameters())
    assert all(named[name].data_ptr() == leaf.data_ptr() for name, leaf in hub_names(got).items() if name in named)


def test_a_carved_module_computes_what_the_stock_model_does_that_it_came_from() -> None:
    stock = reference(parameters(config()), config())
    carved = carve.carve(to_tree(stock), num_experts=10)
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        got = to_module(carved, config=architecture(stock.config), moe=MOE)(tokens, labels=tokens)
        expected = stock(tokens, labels=tokens)
    assert_close((got.logits, got.loss), (expected.logits, expected.loss), bound=1e-10)


@checkpointing_is_renamed
@settings(max_examples=12)
@given(tiny=tinies(dtype=torch.float64), checkpointing=st.booleans())
def test_taps_measure_the_surprise_of_the_functions_and_are_gone_afterwards(tiny: Tiny, checkpointing: bool) -> None:
    tokens, module = prompts(tiny, 2, 4), tiny.module()
    sizes = [layer.mlp.experts for layer in tiny.model.layers if isinstance(layer.mlp, Moe)]
    zeros = tuple(F.zero_taps(("surprise", "neuron"), tokens=8, experts=experts) for experts in sizes)

    def loss(model: Model, inputs: Tensor, taps: Taps) -> tuple[Tensor, tuple[()]]:
        output = qwen3.forward(model, inputs, taps, config=tiny.config, moe=tiny.moe)
        return output.logits.square().sum(), ()

    expected = F.surprise_and_grad(loss, taps=zeros, engine="autograd")(tiny.model, tokens).surprise
    train(module, checkpointing=checkpointing)
    with tapped(module, names=("surprise", "neuron"), tokens=8) as taps:
        module(tokens, use_cache=False).logits.square().sum().backward()
    for tap, measured in zip(taps, expected, strict=True):
        grads = {name: leaf.grad for name, leaf in tap.items() if leaf.grad is not None}
        assert_close(grads, measured, bound=1e-10)
    assert all(not module.taps for module in module.modules() if hasattr(module, "taps"))


def test_taps_are_gone_after_an_error() -> None:
    module = make_tiny(config(), MOE).module()
    with pytest.raises(RuntimeError, match="inside"), tapped(module, names=("surprise",), tokens=3):
        raise RuntimeError("inside")
    assert not module.model.layers[0].mlp.taps


def test_hidden_states_and_attentions_are_those_of_transformers() -> None:
    stock = reference(parameters(config()), config())
    module = to_module(carve.carve(to_tree(stock), num_experts=10), config=config(), moe=MOE)
    tokens = torch.arange(6)[None]
    got, expected = (
        model(tokens, output_hidden_states=True, use_cache=False).hidden_states for model in (module, stock)
    )
    assert len(got) == config().num_hidden_layers + 1
    assert_close(tuple(h.detach() for h in got), tuple(h.detach() for h in expected), bound=1e-10)


@ROUTES
def test_autocast_computes_the_experts_in_its_dtype_and_keeps_gradients_wide(moe: qwen3.MoeConfig) -> None:
    tiny = make_tiny(config(), moe)
    module, seen = tiny.module(), list[torch.dtype]()
    module.model.layers[0].mlp.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(prompts(tiny, 2, 4), labels=prompts(tiny, 2, 4)).loss
    loss.backward()
    assert seen == [torch.bfloat16]
    assert module.model.layers[0].mlp.experts.gate.grad.dtype is torch.float32


def broken(tiny: Tiny, path: str, change: str) -> Model:
    """The model with one leaf made too small, or of another dtype."""
    leaves = dict(zip(tree.paths(tiny.model), tree.leaves(tiny.model), strict=True))
    leaves[path] = leaves[path][:-1] if change == "cut" else leaves[path].to(torch.float16)
    return tree.unflatten(tiny.model, list(leaves.values()))


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        (
            "layers.1.mlp.experts.up",
            "cut",
            "model.layers.1.mlp.experts.up: expected shape [10, 4, 16], found [9, 4, 16]",
        ),
        ("norm", "cut", "model.norm.weight: expected shape [16], found [15]"),
        ("layers.0.attention.q", "half", "expected one dtype, found torch.float32"),
        ("layers.0.mlp.router.thresholds", "half", "router.thresholds: expected torch.float32, found torch.float16"),
    ],
)
def test_a_tree_that_does_not_fit_is_refused(path: str, change: str, message: str) -> None:
    tiny = make_tiny(config(), MOE)
    with pytest.raises(ValueError, match=rf"^to_module: .*{re.escape(message)}"):
        to_module(broken(tiny, path, change), config=tiny.config, moe=tiny.moe)


def test_a_missing_layer_is_named() -> None:
    tiny = make_tiny(config(), MOE)
    short = tiny.model._replace(layers=tiny.model.layers[:1])
    with pytest.raises(ValueError, match=r"to_module: model\.layers\.1\.input_layernorm\.weight \[16\] is missing"):
        to_module(short, config=tiny.config, moe=tiny.moe)
    module = tiny.module()
    del module.model.layers[1]
    with pytest.raises(ValueError, match=r"to_tree: model\.layers\.1\.input_layernorm\.weight \[16\] is missing"):
        to_tree(module)


def test_a_mix_of_dtypes_in_a_module_is_named() -> None:
    module = make_tiny(config(), MOE).module()
    module.model.layers[1].mlp.experts.half()
    with pytest.raises(ValueError, match=r"to_tree: expected one dtype, found .*float16 \(model\.layers\.1\.mlp\.ex"):
        to_tree(module)
    with pytest.raises(ValueError, match="bank: experts, x and weights differ in dtype"):
        module(torch.zeros(1, 2, dtype=torch.int64))


def test_another_architecture_is_named() -> None:
    with pytest.raises(ValueError, match=r"to_tree: expected a Qwen3ForCausalLM or OnnForCausalLM, got Linear"):
        to_tree(torch.nn.Linear(1, 1))
    with pytest.raises(
        ValueError, match=r"architecture: expected a configuration of Qwen3, got model_type='qwen3_moe'"
    ):
        architecture(Qwen3MoeConfig())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_bias", True),
        ("attention_dropout", 0.1),
        ("hidden_act", "gelu"),
        ("layer_types", ["sliding_attention", "full_attention"]),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
    ],
)
def test_what_the_functions_do_not_compute_is_named(name: str, value: object) -> None:
    stock = qwen3.transformers_config(config())
    setattr(stock, name, value)
    with pytest.raises(ValueError, match=rf"architecture: only {name}=.* is supported, found {re.escape(repr(value))}"):
        architecture(stock)
