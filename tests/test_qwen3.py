from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen3ForCausalLM

import onn.functional as F
from onn import carve, qwen3, tree, weights
from onn.functional.transform import Taps
from onn.qwen3 import Mlp, Model, MoeConfig, Qwen3Config
from tests.support import assert_close, normal, relative_error, tolerance

MOE = MoeConfig(
    num_experts=10,
    route="threshold",
    top_k=3,
    normalise=True,
    squash="sigmoid",
    combine="sum",
    fallback_k=1,
    cosine_eps=1e-6,
    min_k=10,
    backend="dense",
)


def config(**changes: int | float | bool) -> Qwen3Config:
    base = Qwen3Config(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=32,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@st.composite
def configs(draw: st.DrawFn) -> Qwen3Config:
    groups, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    return config(
        vocab_size=draw(st.integers(2, 40)),
        hidden_size=draw(st.integers(1, 12)),
        intermediate_size=10 * draw(st.integers(1, 3)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=groups * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 4)),
        rope_theta=draw(st.sampled_from([1e4, 1e6])),
        tie_word_embeddings=draw(st.booleans()),
    )


def parameters(config: Qwen3Config, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Model:
    """Random parameters, norms included."""
    source = torch.Generator().manual_seed(seed)
    noise = tree.map1(
        lambda leaf: torch.randn(leaf.shape, generator=source, dtype=torch.float64), qwen3.abstract(config)
    )
    drawn = qwen3.init(noise, config=config, dtype=dtype)
    return tree.map2(lambda p, n: p + (0.1 * n).to(dtype) if p.ndim == 1 else p, drawn, noise)


def hub_names(model: Model) -> dict[str, Tensor]:
    """A dense model under transformers' names, a tied head under its own as well."""
    named = dict(zip(weights.hub_names(model), tree.leaves(model), strict=True))
    return {"lm_head.weight": model.embedding, **named}


def reference(model: Model, config: Qwen3Config) -> Qwen3ForCausalLM:
    hub: Qwen3ForCausalLM = Qwen3ForCausalLM(qwen3.transformers_config(config))
    for parameter in hub.parameters():
        parameter.data = parameter.data.to(model.embedding.dtype)
    hub.load_state_dict(hub_names(model))
    return hub


def random_tokens(config: Qwen3Config, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=12)
@given(config=configs(), batch=st.integers(1, 3), length=st.integers(1, 9))
def test_logits_and_every_gradient_equal_transformers(config: Qwen3Config, batch: int, length: int) -> None:
    model, tokens = parameters(config), random_tokens(config, batch, length)
    probe = normal(3, batch, length, config.vocab_size)
    hub = reference(model, config)
    hub_logits = hub(tokens, use_cache=False).logits
    (hub_logits * probe).sum().backward()

    def loss(model: Model) -> tuple[Tensor, Tensor]:
        logits = qwen3.forward(model, tokens, (), config=config, moe=None).logits
        return (logits * probe).sum(), logits

    (_, logits), grads = tree.value_and_grad(loss, engine="autograd")(model)
    assert_close(logits, hub_logits.detach(), bound=1e-10)
    expected = dict(hub.named_parameters())
    for name, grad in hub_names(grads).items():
        if name in expected:
            found = expected[name].grad
            assert found is not None
            assert relative_error(grad, found) <= 1e-10, name


def test_bfloat16_logits_within_the_bound_of_their_depth() -> None:
    settings = config(hidden_size=64, intermediate_size=160)
    wide, tokens = parameters(settings, dtype=torch.bfloat16), random_tokens(settings, 2, 16)
    exact = qwen3.forward(tree.map1(Tensor.double, wide), tokens, (), config=settings, moe=None).logits
    ours = qwen3.forward(wide, tokens, (), config=settings, moe=None).logits
    theirs = reference(wide, settings)(tokens, use_cache=False).logits
    roundings = 20 * settings.num_hidden_layers
    assert relative_error(ours, exact) <= tolerance(torch.bfloat16, terms=roundings, slack=1.0)
    assert relative_error(ours, theirs.detach()) <= tolerance(torch.bfloat16, terms=roundings, slack=1.0)


@settings(max_examples=12)
@given(config=configs(), seed=st.integers(0, 99))
def test_a_carved_model_with_every_expert_open_is_the_dense_model(config: Qwen3Config, seed: int) -> None:
    dense, tokens = parameters(config, seed=seed), random_tokens(config, 2, 7)
    carved = carve.carve(dense, num_experts=10)
    expected = qwen3.forward(dense, tokens, (), config=config, moe=None).logits
    output = qwen3.forward(carved, tokens, ({},) * config.num_hidden_layers, config=config, moe=MOE)
    assert all(bool(layer.routing.active.all()) for layer in output.carved)
    assert_close(output.logits, expected, bound=1e-10)


@pytest.mark.parametrize("engine", ["autograd", "func"])
def test_the_last_carved_layer_has_the_gradient_of_the_dense_one(engine: tree.Engine) -> None:
    """Of the last alone: into earlier layers the straight-through gradient of the routers flows as well."""
    settings = config()
    dense, tokens = parameters(settings), random_tokens(settings, 2, 7)

    def loss(model: Model, moe: MoeConfig | None) -> tuple[Tensor, tuple[()]]:
        taps: Taps = ({},) * (settings.num_hidden_layers if moe else 0)
        return qwen3.forward(model, tokens, taps, config=settings, moe=moe).logits.square().sum(), ()

    _, expected = tree.value_and_grad(loss, engine=engine)(dense, None)
    _, grads = tree.value_and_grad(loss, engine=engine)(carve.carve(dense, num_experts=10), MOE)
    mlp, target = grads.layers[-1].mlp, expected.layers[-1].mlp
    assert isinstance(mlp, qwen3.Moe)
    assert isinstance(target, Mlp)
    assert_close(carve.merge_experts(mlp.experts), target, bound=1e-10)


@given(seed=st.integers(0, 99), experts=st.sampled_from([10, 20, 40]))
def test_merging_undoes_splitting_bit_for_bit(seed: int, experts: int) -> None:
    mlp = Mlp(gate=normal(seed, 40, 6), up=normal(seed + 1, 40, 6), down=normal(seed + 2, 6, 40))
    split = carve.split_mlp(mlp, num_experts=experts)
    assert split.gate.data_ptr() == mlp.gate.data_ptr()
    for got, expected in zip(carve.merge_experts(split), mlp, strict=True):
        assert torch.equal(got, expected)


def test_prototypes_are_the_mean_gate_rows() -> None:
    experts = F.Experts(*(normal(i, 10, 4, 6) for i in range(3)))
    assert_close(carve.gate_prototypes(experts), torch.stack([g.mean(0) for g in experts.gate]), bound=1e-15)


def test_only_earlier_tokens_reach_a_position() -> None:
    settings = config()
    model, tokens = parameters(settings), random_tokens(settings, 1, 8)
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % settings.vocab_size
    first, second = (qwen3.forward(model, t, (), config=settings, moe=None).logits for t in (tokens, changed))
    assert torch.equal(first[:, :5], second[:, :5])
    assert not torch.equal(first[:, 5:], second[:, 5:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads=3 is not a multiple of num_key_value_heads=2"),
        ({"head_dim": 5}, "head_dim=5 is odd"),
        ({"hidden_size": 0}, "hidden_size=0"),
    ],
)
def test_impossible_architectures_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(("experts", "message"), [(8, "num_experts=8"), (9, "num_experts=9"), (11, "do not divide")])
def test_only_hyper_smoe_is_carved(experts: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        carve.carve(parameters(config(intermediate_size=72 if experts != 11 else 40)), num_experts=experts)


def test_experts_of_more_than_96_neurons_are_refused() -> None:
    mlp = Mlp(gate=torch.zeros(970, 2), up=torch.zeros(970, 2), down=torch.zeros(2, 970))
    with pytest.raises(ValueError, match="at most 96 neurons, num_experts=10 gives 97; take at least 11"):
        carve.split_mlp(mlp, num_experts=10)
    with pytest.raises(ValueError, match="num_experts=9"):
        replace(MOE, num_experts=9)


def test_a_carved_model_is_not_carved_again_and_needs_its_routing_and_taps() -> None:
    settings = config()
    carved = carve.carve(parameters(settings), num_experts=10)
    tokens = random_tokens(settings, 1, 3)
    with pytest.raises(ValueError, match="carved already"):
        carve.carve(carved, num_experts=10)
    with pytest.raises(ValueError, match=r"expected moe=MoeConfig"):
        qwen3.forward(carved, tokens, ({}, {}), config=settings, moe=None)
    with pytest.raises(ValueError, match="2 carved layers, got 0"):
        qwen3.forward(carved, tokens, (), config=settings, moe=MOE)


def routed(moe: MoeConfig) -> qwen3.Output:
    """A carved model with random routers under one routing."""
    settings = config()
    carved = carve.carve(parameters(settings, seed=3), num_experts=10)
    router = F.Router(prototypes=normal(4, 10, 16), thresholds=normal(5, 10) / 8)
    layers = tuple(layer._replace(mlp=layer.mlp._replace(router=router)) for layer in carved.layers)  # type: ignore[call-arg]
    tokens = random_tokens(settings, 2, 9)
    return qwen3.forward(carved._replace(layers=layers), tokens, ({}, {}), config=settings, moe=moe)


@pytest.mark.parametrize(("k", "normalise"), [(1, False), (3, False), (3, True), (10, True)])
def test_top_k_opens_the_experts_of_the_largest_logits_with_their_probabilities(k: int, normalise: bool) -> None:
    output = routed(replace(MOE, route="top_k", top_k=k, normalise=normalise))
    for layer in output.carved:
        logits = layer.x @ normal(4, 10, 16).mT
        assert_close(layer.affinity, logits, bound=1e-12)
        for row, shares in zip(logits.tolist(), layer.routing.weights, strict=True):
            best = sorted(range(10), key=lambda expert: -row[expert])[:k]
            odds = [math.exp(row[expert]) for expert in best]
            total = sum(odds) if normalise else sum(math.exp(value) for value in row)
            expected = torch.zeros(10, dtype=torch.float64)
            expected[best] = torch.tensor([odd / total for odd in odds], dtype=torch.float64)
            assert_close(shares, expected, bound=1e-12)


@pytest.mark.parametrize(
    ("used", "unused"),
    [
        (MOE, {"top_k": 7, "normalise": False}),
        (
            replace(MOE, route="top_k"),
            {"squash": "identity", "combine": "uniform", "fallback_k": 9, "cosine_eps": 1.0},
        ),
    ],
    ids=["threshold", "top_k"],
)
def test_what_belongs_to_the_other_route_changes_nothing(used: MoeConfig, unused: dict[str, str | int | float]) -> None:
    got, expected = (routed(moe).logits for moe in (replace(used, **unused), used))  # type: ignore[arg-type]
    assert torch.equal(got, expected)
    assert not torch.equal(
        expected, routed(replace(used, route="threshold" if used.route == "top_k" else "top_k")).logits
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, "expected 1 <= top_k=0 <= 10"),
        ({"top_k": 11}, "expected 1 <= top_k=11 <= 10"),
        ({"min_k": 11}, "expected 1 <= min_k=11 <= 10"),
        ({"fallback_k": 0}, "expected 1 <= fallback_k=0 <= 10"),
        ({"route": "topk"}, "unknown route='topk'; did you mean 'top_k'"),
        ({"squash": "sigmod"}, "unknown squash='sigmod'; did you mean 'sigmoid'"),
        ({"combine": "summ"}, "unknown combine='summ'; did you mean 'sum'"),
        ({"normalise": "no"}, "expected normalise of type bool"),
        ({"cosine_eps": 0.0}, "expected 0 < cosine_eps=0.0"),
        ({"num_experts": 9}, "expected 10 <= num_experts=9"),
        ({"num_experts": 12.5}, "expected num_experts as a whole number"),
        ({"min_k": 2.0}, "expected min_k as a whole number"),
    ],
)
def test_impossible_routings_are_refused(changes: dict[str, str | int | float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^MoeConfig: {re.escape(message)}"):
        replace(MOE, **changes)  # type: ignore[arg-type]


def test_the_real_model_divides_without_a_rest() -> None:
    from experiments.presets import QWEN3_06B

    abstract = qwen3.abstract(QWEN3_06B.model)
    carved = carve.carve(abstract, num_experts=32)
    assert [list(w.shape) for w in carved.layers[0].mlp[0]] == [[32, 96, 1024]] * 3
    routers = sum(r.numel() for layer in carved.layers for r in tree.leaves(layer.mlp[1]))
    count = sum(leaf.numel() for leaf in tree.leaves(carved)) - routers
    assert count == sum(leaf.numel() for leaf in tree.leaves(abstract)) == 596_049_920
