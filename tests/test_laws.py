"""What every public function of `onn.functional` keeps: it is pure, repeatable, keeps its dtype, maps and compiles.

`LAWS` has one entry for each function, and a function without one fails the suite.

Shape letters: T tokens, H hidden, E experts, I expert intermediate size, N steps.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from types import FunctionType
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

import onn.functional as F
from onn import tree
from onn.functional.transform import Taps
from onn.tree import Tree
from tests.support import BOUND, assert_close, assert_same, can_compile, make_case, normal

T, H, E, I, N = 6, 5, 4, 3, 7


class Material(NamedTuple):
    """Arguments of every kind; a law takes what it needs."""

    experts: F.Experts
    x: Tensor
    weights: Tensor
    dy: Tensor
    residuals: F.Residuals
    local: F.Local
    router: F.Router
    routing: F.Routing
    logits: Tensor
    """[T, E]"""
    surprise: Tensor
    """[T, E], in the dtype of reductions, as are `affinity`, `pi` and the scalars."""
    affinity: Tensor
    """[T, E]"""
    active: Tensor
    """[T, E] bool"""
    unrouted: Tensor
    """[T] bool"""
    counts: Tensor
    """[E] int64, one of them 0"""
    plan: F.Heirs
    pi: Tensor
    """[N]"""
    share: Tensor
    """Scalar in (0, 1)."""


def material(seed: int, dtype: torch.dtype) -> Material:
    case = make_case(seed, T=T, H=H, E=E, I=I, dtype=dtype)
    _, residuals = F.bank_forward(case.experts, case.x, case.weights)
    local, _ = F.bank_local(case.experts, residuals, case.dy)
    router = F.Router(prototypes=normal(seed + 10, E, H, dtype=dtype), thresholds=normal(seed + 11, E, dtype=dtype))
    affinity = F.cosine_affinity(case.x, router.prototypes, eps=1e-6)
    routing = F.threshold_route(affinity, router.thresholds, squash="sigmoid", fallback_k=2, combine="softmax")
    source = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 99, (E,), generator=source).index_fill(0, torch.randint(E, (1,), generator=source), 0)
    return Material(
        experts=case.experts,
        x=case.x,
        weights=case.weights,
        dy=case.dy,
        residuals=residuals,
        local=local,
        router=router,
        routing=routing,
        logits=normal(seed + 12, T, E, dtype=dtype),
        surprise=F.parameter_surprise(local, case.x, case.weights, case.dy),
        affinity=affinity,
        active=routing.active,
        unrouted=normal(seed + 13, T) > 0,
        counts=counts,
        plan=F.heirs(counts),
        pi=torch.rand(N, generator=source).to(affinity.dtype),
        share=torch.rand((), generator=source).to(affinity.dtype),
    )


class Law(NamedTuple):
    """One function under the laws."""

    call: Callable[[Material], Tree]
    reduced: tuple[str, ...] = ()
    """Paths (or their beginnings) of results in the dtype of reductions; `""` means all. The others keep the dtype."""


def _bank(m: Material) -> Tree:
    zeros = F.zero_taps(get_args(F.TapName), tokens=T, experts=m.experts)
    return F.bank(m.experts, m.x, m.weights, zeros, min_k=2, backend="dense")


def _surprise_and_grad(m: Material) -> Tree:
    taps = (F.zero_taps(get_args(F.TapName), tokens=T, experts=m.experts),)

    def loss(experts: F.Experts, x: Tensor, taps: Taps) -> tuple[Tensor, Tensor]:
        y = F.bank(experts, x, m.weights, taps[0], min_k=2, backend="dense")
        return (y * m.dy).sum(), y

    return F.surprise_and_grad(loss, taps=taps, engine="func")(m.experts, m.x)


LAWS: dict[str, Law] = {
    "adaptive_mix": Law(lambda m: F.adaptive_mix(m.pi, sensitivity=5.0, threshold=0.3), ("",)),
    "balance_bias": Law(lambda m: F.balance_bias(m.router.thresholds, m.counts, rate=0.1)),
    "bank": Law(_bank),
    "bank_forward": Law(lambda m: F.bank_forward(m.experts, m.x, m.weights)),
    "bank_local": Law(lambda m: F.bank_local(m.experts, m.residuals, m.dy)),
    "bank_vjp": Law(
        lambda m: F.bank_vjp(
            m.experts, m.x, m.weights, m.residuals, m.dy, select=lambda s, a: F.min_k_mask(s, a, min_k=2)
        ),
        ("surprise",),
    ),
    "bias_gradients": Law(lambda m: F.bias_gradients(m.local, m.weights), ("",)),
    "biased_top_k_route": Law(lambda m: F.biased_top_k_route(m.logits, m.router.thresholds, k=2, normalise=True)),
    "centre_inputs": Law(lambda m: F.centre_inputs(m.experts, m.local.c1[:2], F.expert_means(m.x, m.weights))),
    "consolidate": Law(
        lambda m: (
            F.consolidate(m.experts, m.surprise[:E, :I], form="root", strength=1.0, eps=1e-3),
            F.consolidate(m.experts, m.surprise[:3, :E, None].expand(3, E, I), form="root", strength=1.0, eps=1e-3),
            F.consolidate(m.experts, m.surprise[0], form="bounded", strength=1.0, eps=1e-3),
        )
    ),
    "cosine_affinity": Law(lambda m: F.cosine_affinity(m.x, m.router.prototypes, eps=1e-6), ("",)),
    "counterfactual_surprise": Law(lambda m: F.counterfactual_surprise(m.local, m.x, m.dy), ("",)),
    "diversity_loss": Law(lambda m: F.diversity_loss(m.router.prototypes, eps=1e-6), ("",)),
    "expected_surprise": Law(lambda m: F.expected_surprise(m.logits, m.surprise, m.active), ("",)),
    "expert_choice_route": Law(lambda m: F.expert_choice_route(m.logits, capacity=2)),
    "expert_means": Law(lambda m: F.expert_means(m.x, m.weights), ("",)),
    "expert_norms": Law(lambda m: F.expert_norms(m.experts), ("",)),
    "first_k": Law(lambda m: F.first_k(m.logits, k=2)),
    "forget_reborn": Law(lambda m: F.forget_reborn(m.experts.gate, m.plan)),
    "gate_accuracy": Law(lambda m: F.gate_accuracy(m.logits, m.surprise, m.active), ("",)),
    "grow": Law(
        lambda m: F.grow(
            m.experts, m.router, m.x, m.unrouted, tree.map1(lambda w: w[:1], m.experts), threshold=0.5, scale=0.1
        )
    ),
    "heirs": Law(lambda m: F.heirs(m.counts)),
    "input_surprise": Law(lambda m: F.input_surprise(m.local, m.experts, m.weights), ("",)),
    "integrity_integral": Law(lambda m: F.integrity_integral(m.pi, delta=2.0), ("",)),
    "load_balance_loss": Law(lambda m: F.load_balance_loss(m.logits, m.active), ("",)),
    "matrix_shares": Law(lambda m: F.matrix_shares(m.local.c1[:3].square()), ("",)),
    "matrix_surprise": Law(lambda m: F.matrix_surprise(m.local, m.x, m.weights, m.dy), ("",)),
    "max_k_mask": Law(lambda m: F.max_k_mask(m.surprise, m.active, max_k=2)),
    "min_k_indices": Law(lambda m: F.min_k_indices(m.surprise, m.active, min_k=2)),
    "min_k_mask": Law(lambda m: F.min_k_mask(m.surprise, m.active, min_k=2)),
    "neuron_surprise": Law(lambda m: F.neuron_surprise(m.local, m.x, m.weights, m.dy), ("",)),
    "non_finite": Law(lambda m: F.non_finite(torch.where(m.logits > 0, m.surprise, torch.nan), m.active)),
    "normalised_surprise": Law(lambda m: F.normalised_surprise(m.surprise, m.weights), ("",)),
    "output_surprise": Law(lambda m: F.output_surprise(m.weights, m.dy), ("",)),
    "parameter_surprise": Law(lambda m: F.parameter_surprise(m.local, m.x, m.weights, m.dy), ("",)),
    "predictive_integrity": Law(
        lambda m: F.predictive_integrity(m.pi, m.share, m.pi.flip(0), alpha=1.0, gamma=0.2, tau_floor=0.1), ("",)
    ),
    "prune": Law(lambda m: F.prune(m.experts, m.router, m.counts, keep=2)),
    "random_k_mask": Law(lambda m: F.random_k_mask(m.affinity, m.active, random_k=2)),
    "rebirth": Law(
        lambda m: F.rebirth(m.experts, m.router, m.plan, m.x[:E].to(m.affinity.dtype), scale=0.1, share=0.5)
    ),
    "reduction_dtype": Law(lambda m: torch.zeros((), dtype=F.reduction_dtype(m.x.dtype)), ("",)),
    "relu_route": Law(lambda m: F.relu_route(m.logits)),
    "router_loss": Law(lambda m: F.router_loss(m.logits, m.surprise, m.active, w_ce=1.0, w_kl=0.5), ("",)),
    "select_min_k": Law(lambda m: F.select_min_k(m.experts, min_k=2)),
    "share_threshold_shift": Law(
        lambda m: F.share_threshold_shift(m.affinity, m.router.thresholds, squash="sigmoid", target=m.share), ("",)
    ),
    "simplicity_loss": Law(lambda m: F.simplicity_loss(m.router.prototypes), ("",)),
    "sparsity_coefficient": Law(lambda m: F.sparsity_coefficient(m.pi[0], m.share, target=0.5, rate=1.2), ("",)),
    "surprise_and_grad": Law(_surprise_and_grad, ("surprise",)),
    "threshold_route": Law(
        lambda m: (
            F.threshold_route(m.affinity, m.router.thresholds, squash="sigmoid", fallback_k=2, combine="softmax"),
            F.threshold_route(m.affinity, m.router.thresholds, squash="identity", fallback_k=1, combine="uniform"),
        ),
        ("",),
    ),
    "token_entropy": Law(lambda m: F.token_entropy(m.logits), ("",)),
    "top_k_route": Law(lambda m: F.top_k_route(m.logits, k=2, normalise=True)),
    "top_p_route": Law(lambda m: F.top_p_route(m.logits, p=0.7, normalise=True)),
    "usage": Law(lambda m: F.usage(m.routing)),
    "weight_surprise": Law(lambda m: F.weight_surprise(m.surprise, m.weights), ("",)),
    "whiten_inputs": Law(lambda m: F.whiten_inputs(m.experts, m.x, damping=1.0)),
    "whitening": Law(lambda m: F.whitening(m.x, damping=1.0), ("",)),
    "z_loss": Law(lambda m: F.z_loss(m.logits), ("",)),
    "zero_taps": Law(lambda m: F.zero_taps(get_args(F.TapName), tokens=T, experts=m.experts), ("",)),
}
every_law = pytest.mark.parametrize("name", LAWS)


def public_functions() -> dict[str, FunctionType]:
    """Every function that a module of `onn.functional` defines without an underscore."""
    modules = [importlib.import_module(f"onn.functional.{found.name}") for found in pkgutil.iter_modules(F.__path__)]
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, FunctionType) and value.__module__ == module.__name__ and not name.startswith("_")
    }


def test_every_public_function_has_its_law_and_is_exported() -> None:
    assert sorted(LAWS) == sorted(public_functions())
    exported = {name for name, value in vars(F).items() if isinstance(value, FunctionType)}
    assert exported == set(LAWS)


@every_law
def test_a_law_calls_the_function_that_it_is_named_after(name: str) -> None:
    call = LAWS[name].call
    assert isinstance(call, FunctionType)
    assert name in call.__code__.co_names


@every_law
def test_hyperparameters_are_keyword_only_and_nothing_has_a_default(name: str) -> None:
    function = public_functions()[name]
    hints = get_type_hints(function)
    for parameter in inspect.signature(function).parameters.values():
        assert parameter.default is parameter.empty, parameter
        assert parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY), parameter
        if hints[parameter.name] in (int, float, bool, str) or get_origin(hints[parameter.name]) is Literal:
            assert parameter.kind is parameter.KEYWORD_ONLY, parameter


@every_law
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_calls_change_no_argument_repeat_bit_for_bit_and_keep_the_dtype(name: str, dtype: torch.dtype) -> None:
    law, arguments = LAWS[name], material(0, dtype)
    before = tree.map1(Tensor.clone, arguments)
    first = law.call(arguments)
    assert_same(law.call(arguments), first)
    assert_same(arguments, before)
    for path, leaf in zip(tree.paths(first), tree.leaves(first), strict=True):
        if leaf.is_floating_point():
            reduced = any(path.startswith(start) for start in law.reduced)
            assert leaf.dtype == (F.reduction_dtype(dtype) if reduced else dtype), path
        else:
            assert leaf.dtype in (torch.bool, torch.int64), path


def assert_agrees(got: Tree, expected: Tree) -> None:
    assert tree.paths(got) == tree.paths(expected)
    assert_close(got, expected, bound=BOUND)


def assert_maps(call: Callable[[Material], Tree]) -> None:
    many = [material(seed, torch.float64) for seed in (0, 100, 200)]
    stacked = tree.unflatten(many[0], [torch.stack(column) for column in zip(*map(tree.leaves, many), strict=True)])
    got = tree.vmap(call, (0,))(stacked)
    for position, one in enumerate(many):
        assert_agrees(tree.unflatten(got, [leaf[position] for leaf in tree.leaves(got)]), call(one))


def assert_compiles(call: Callable[[Material], Tree], backend: str) -> None:
    first, second = (material(seed, torch.float64) for seed in (0, 100))
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    assert_agrees(compiled(first), call(first))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_agrees(compiled(second), call(second))


@every_law
def test_vmap_is_the_loop(name: str) -> None:
    assert_maps(LAWS[name].call)


@every_law
def test_compiled_is_eager_and_the_second_call_does_not_recompile(name: str) -> None:
    assert_compiles(LAWS[name].call, "aot_eager")


@can_compile
@pytest.mark.parametrize("name", ["threshold_route", "router_loss", "bank_vjp"])
def test_compiled_by_inductor_is_eager_and_the_second_call_does_not_recompile(name: str) -> None:
    assert_compiles(LAWS[name].call, "inductor")


def test_the_laws_refuse_what_breaks_them() -> None:
    calls: list[int] = []

    def reads_a_value(m: Material) -> Tree:
        return m.x * m.pi.sum().item()

    def remembers(m: Material) -> Tree:
        calls.append(1)
        return m.x * len(calls)

    def plain(m: Material) -> Tree:
        return m.x + 1

    with pytest.raises(RuntimeError, match="vmap"):
        assert_maps(reads_a_value)
    with pytest.raises(AssertionError, match="relative error"):
        assert_maps(remembers)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    compiled(material(0, torch.float64))
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
        compiled(material(0, torch.float32))
