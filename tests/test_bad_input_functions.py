"""Wrong shapes, dtypes, devices and numbers, to every public function of `onn.functional`.

`SPECS` has one entry for each function, and a function without one fails the suite. Each call must return results of
the right shapes or raise a `ValueError` that names the argument; where shapes contradict one another, a tensor holds
something else than it shall, or several devices meet, it must raise.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import onn.functional as F
from onn.tree import Tree
from tests.bad_arguments import Spec, Tensors, Wrong, arguments, assert_handled, wrongs
from tests.test_laws import public_functions

BANK = {"gate": "float E I H", "up": "float E I H", "down": "float E I H"}
LOCAL = {"c1": "float T E I", "c3": "float T E I", "a": "float T E I"}
ROUTER = {"prototypes": "float E H", "thresholds": "float E"}
X, W, DY = {"x": "float T H"}, {"weights": "float T E"}, {"dy": "float T H"}
SCORED = {"scores": "float T E", "surprise": "float T E", "active": "bool T E"}
LOGITS, ROUTED = {"logits": "float T E"}, ("T E", "T E", "T E")
THREE = ("E I H", "E I H", "E I H")
LAYER = (*THREE, "E H", "E")
PLAN = {"donor": "integer E", "reborn": "bool E", "halved": "bool E"}
HEIRS = F.heirs(torch.tensor([0, 3, 1, 0, 9, 2, 2, 0, 5, 1]))
VALUES = {"donor": HEIRS.donor, "reborn": HEIRS.reborn, "halved": HEIRS.halved}

Numbers = Mapping[str, float]


def experts(t: Tensors) -> F.Experts:
    return F.Experts(t["gate"], t["up"], t["down"])


def local(t: Tensors) -> F.Local:
    return F.Local(t["c1"], t["c3"], t["a"])


def router(t: Tensors) -> F.Router:
    return F.Router(t["prototypes"], t["thresholds"])


def heirs(t: Tensors) -> F.Heirs:
    return F.Heirs(t["donor"], t["reborn"], t["halved"])


def _grow(t: Tensors, n: Numbers) -> Tree:
    noise = F.Experts(*(t[f"noise.{name}"] for name in F.Experts._fields))
    return F.grow(experts(t), router(t), t["x"], t["unrouted"], noise, threshold=n["threshold"], scale=n["scale"])


SPECS: dict[str, Spec] = {
    "adaptive_mix": Spec(
        lambda t, n: F.adaptive_mix(t["pi"], sensitivity=n["sensitivity"], threshold=n["threshold"]),
        {"pi": "float N"},
        ("N",),
        {"sensitivity": 5.0, "threshold": 0.3},
        free=("pi",),
    ),
    "balance_bias": Spec(
        lambda t, n: F.balance_bias(t["bias"], t["counts"], rate=n["rate"]),
        {"bias": "float E", "counts": "real E"},
        ("E",),
        {"rate": 0.1},
    ),
    "bias_gradients": Spec(lambda t, n: F.bias_gradients(local(t), t["weights"]), {**LOCAL, **W}, ("2 E I",)),
    "biased_top_k_route": Spec(
        lambda t, n: F.biased_top_k_route(t["logits"], t["bias"], k=int(n["k"]), normalise=True),
        {**LOGITS, "bias": "float E"},
        ROUTED,
        {"k": 2},
    ),
    "centre_inputs": Spec(
        lambda t, n: F.centre_inputs(experts(t), t["biases"], t["centre"]),
        {**BANK, "biases": "float 2 E I", "centre": "float E H"},
        THREE,
    ),
    "consolidate": Spec(
        lambda t, n: F.consolidate(experts(t), t["importance"], form="root", strength=n["strength"], eps=n["eps"]),
        {**BANK, "importance": "float E I"},
        THREE,
        {"strength": 1.0, "eps": 1e-3},
    ),
    "cosine_affinity": Spec(
        lambda t, n: F.cosine_affinity(t["x"], t["prototypes"], eps=n["eps"]),
        {**X, "prototypes": "float E H"},
        ("T E",),
        {"eps": 1e-6},
    ),
    "counterfactual_surprise": Spec(
        lambda t, n: F.counterfactual_surprise(local(t), t["x"], t["dy"]), {**LOCAL, **X, **DY}, ("T E",)
    ),
    "diversity_loss": Spec(
        lambda t, n: F.diversity_loss(t["prototypes"], eps=n["eps"]), {"prototypes": "float E H"}, ("",), {"eps": 1e-6}
    ),
    "expected_surprise": Spec(lambda t, n: F.expected_surprise(t["scores"], t["surprise"], t["active"]), SCORED, ("",)),
    "expert_choice_route": Spec(
        lambda t, n: F.expert_choice_route(t["logits"], capacity=int(n["capacity"])), LOGITS, ROUTED, {"capacity": 2}
    ),
    "expert_means": Spec(lambda t, n: F.expert_means(t["x"], t["weights"]), {**X, **W}, ("E H",)),
    "expert_norms": Spec(lambda t, n: F.expert_norms(experts(t)), BANK, ("E",)),
    "first_k": Spec(
        lambda t, n: F.first_k(t["keys"], k=int(n["k"])), {"keys": "real T E"}, ("T E",), {"k": 2}, free=("keys",)
    ),
    "forget_reborn": Spec(
        lambda t, n: F.forget_reborn(t["state"], F.Heirs(HEIRS.donor, t["reborn"], HEIRS.halved)),
        {"state": "E I H", "reborn": "bool E"},
        ("E I H",),
        values={"reborn": HEIRS.reborn},
        free=("state",),
    ),
    "gate_accuracy": Spec(lambda t, n: F.gate_accuracy(t["scores"], t["surprise"], t["active"]), SCORED, ("", "")),
    "grow": Spec(
        _grow,
        {**BANK, **ROUTER, **X, "unrouted": "bool T", **{f"noise.{name}": "float 1 I H" for name in BANK}},
        ("11 I H", "11 I H", "11 I H", "11 H", "11"),
        {"threshold": 0.5, "scale": 0.1},
    ),
    "heirs": Spec(lambda t, n: F.heirs(t["counts"]), {"counts": "integer E"}, ("E", "E", "E")),
    "input_surprise": Spec(
        lambda t, n: F.input_surprise(local(t), experts(t), t["weights"]), {**LOCAL, **BANK, **W}, ("T E",)
    ),
    "integrity_integral": Spec(
        lambda t, n: F.integrity_integral(t["pi"], delta=n["delta"]), {"pi": "float N"}, ("",), {"delta": 2.0}
    ),
    "load_balance_loss": Spec(
        lambda t, n: F.load_balance_loss(t["scores"], t["active"]), {"scores": "float T E", "active": "bool T E"}, ("",)
    ),
    "matrix_shares": Spec(lambda t, n: F.matrix_shares(t["squares"]), {"squares": "float 3 E I"}, ("3",)),
    "matrix_surprise": Spec(
        lambda t, n: F.matrix_surprise(local(t), t["x"], t["weights"], t["dy"]), {**LOCAL, **X, **W, **DY}, ("3 E I",)
    ),
    "max_k_mask": Spec(
        lambda t, n: F.max_k_mask(t["surprise"], t["active"], max_k=int(n["max_k"])),
        {"surprise": "float T E", "active": "bool T E"},
        ("T E",),
        {"max_k": 2},
    ),
    "min_k_indices": Spec(
        lambda t, n: F.min_k_indices(t["surprise"], t["active"], min_k=int(n["min_k"])),
        {"surprise": "float T E", "active": "bool T E"},
        ("T min_k", "T min_k"),
        {"min_k": 2},
    ),
    "min_k_mask": Spec(
        lambda t, n: F.min_k_mask(t["surprise"], t["active"], min_k=int(n["min_k"])),
        {"surprise": "float T E", "active": "bool T E"},
        ("T E",),
        {"min_k": 2},
    ),
    "neuron_surprise": Spec(
        lambda t, n: F.neuron_surprise(local(t), t["x"], t["weights"], t["dy"]), {**LOCAL, **X, **W, **DY}, ("E I",)
    ),
    "non_finite": Spec(
        lambda t, n: F.non_finite(t["surprise"], t["active"]), {"surprise": "float T E", "active": "bool T E"}, ("",)
    ),
    "normalised_surprise": Spec(
        lambda t, n: F.normalised_surprise(t["surprise"], t["weights"]), {"surprise": "float T E", **W}, ("T E",)
    ),
    "output_surprise": Spec(lambda t, n: F.output_surprise(t["weights"], t["dy"]), {**W, **DY}, ("T E",)),
    "parameter_surprise": Spec(
        lambda t, n: F.parameter_surprise(local(t), t["x"], t["weights"], t["dy"]), {**LOCAL, **X, **W, **DY}, ("T E",)
    ),
    "predictive_integrity": Spec(
        lambda t, n: F.predictive_integrity(
            t["error"], t["tau"], t["surprise"], alpha=n["alpha"], gamma=n["gamma"], tau_floor=n["tau_floor"]
        ),
        {"error": "float", "tau": "float", "surprise": "float"},
        ("",),
        {"alpha": 1.0, "gamma": 0.2, "tau_floor": 0.1},
        free=("error", "tau", "surprise"),
    ),
    "prune": Spec(
        lambda t, n: F.prune(experts(t), router(t), t["lifetime"], keep=int(n["keep"])),
        {**BANK, **ROUTER, "lifetime": "real E"},
        ("keep I H", "keep I H", "keep I H", "keep H", "keep"),
        {"keep": 3},
    ),
    "random_k_mask": Spec(
        lambda t, n: F.random_k_mask(t["noise"], t["active"], random_k=int(n["random_k"])),
        {"noise": "float T E", "active": "bool T E"},
        ("T E",),
        {"random_k": 2},
    ),
    "rebirth": Spec(
        lambda t, n: F.rebirth(experts(t), router(t), heirs(t), t["noise"], scale=n["scale"], share=n["share"]),
        {**BANK, **ROUTER, **PLAN, "noise": "float E H"},
        LAYER,
        {"scale": 0.1, "share": 0.5},
        VALUES,
    ),
    "relu_route": Spec(lambda t, n: F.relu_route(t["logits"]), LOGITS, ROUTED),
    "router_loss": Spec(
        lambda t, n: F.router_loss(t["scores"], t["surprise"], t["active"], w_ce=n["w_ce"], w_kl=n["w_kl"]),
        SCORED,
        ("",),
        {"w_ce": 1.0, "w_kl": 0.5},
    ),
    "select_min_k": Spec(lambda t, n: F.select_min_k(experts(t), min_k=int(n["min_k"])), BANK, THREE, {"min_k": 2}),
    "share_threshold_shift": Spec(
        lambda t, n: F.share_threshold_shift(t["affinity"], t["thresholds"], squash="sigmoid", target=t["target"]),
        {"affinity": "float T E", "thresholds": "float E", "target": "float"},
        ("",),
    ),
    "simplicity_loss": Spec(lambda t, n: F.simplicity_loss(t["prototypes"]), {"prototypes": "float E H"}, ("",)),
    "sparsity_coefficient": Spec(
        lambda t, n: F.sparsity_coefficient(t["coefficient"], t["active_share"], target=n["target"], rate=n["rate"]),
        {"coefficient": "float", "active_share": "float"},
        ("",),
        {"target": 0.5, "rate": 1.2},
        free=("coefficient", "active_share"),
    ),
    "threshold_route": Spec(
        lambda t, n: F.threshold_route(
            t["affinity"], t["thresholds"], squash="sigmoid", fallback_k=int(n["fallback_k"]), combine="softmax"
        ),
        {"affinity": "float T E", "thresholds": "float E"},
        ROUTED,
        {"fallback_k": 2},
    ),
    "token_entropy": Spec(lambda t, n: F.token_entropy(t["logits"]), {"logits": "float T V"}, ("T",), free=("logits",)),
    "top_k_route": Spec(
        lambda t, n: F.top_k_route(t["logits"], k=int(n["k"]), normalise=True), LOGITS, ROUTED, {"k": 2}
    ),
    "top_p_route": Spec(lambda t, n: F.top_p_route(t["logits"], p=n["p"], normalise=True), LOGITS, ROUTED, {"p": 0.7}),
    "usage": Spec(
        lambda t, n: F.usage(F.Routing(t["scores"], t["active"], t["active"])),
        {"scores": "float T E", "active": "bool T E"},
        ("E", "E"),
    ),
    "weight_surprise": Spec(
        lambda t, n: F.weight_surprise(t["counterfactual"], t["weights"]),
        {"counterfactual": "float T E", **W},
        ("T E",),
    ),
    "whiten_inputs": Spec(
        lambda t, n: F.whiten_inputs(experts(t), t["x"], damping=n["damping"]), {**BANK, **X}, THREE, {"damping": 1.0}
    ),
    "whitening": Spec(lambda t, n: F.whitening(t["x"], damping=n["damping"]), X, ("H H",), {"damping": 1.0}),
    "z_loss": Spec(lambda t, n: F.z_loss(t["logits"]), LOGITS, ("",)),
}
BANKS = ("bank", "bank_forward", "bank_local", "bank_vjp", "segment_outer", "surprise_and_grad", "zero_taps")
"""Of `tests/test_bank.py` and `tests/test_segments.py`, and a transform, whose arguments are functions."""


def test_every_public_function_is_tried() -> None:
    assert public_functions().keys() - {*BANKS, "reduction_dtype"} == SPECS.keys()


@pytest.mark.parametrize("name", SPECS)
def test_a_valid_call_has_results_of_the_shapes_said(name: str) -> None:
    spec = SPECS[name]
    assert_handled(spec, Wrong("nothing", next(iter(spec.tensors)), arguments(spec), spec.numbers), accepted=True)


@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("name", SPECS)
def test_one_wrong_argument_is_refused_by_name_or_makes_no_difference_to_the_shapes(
    name: str, data: st.DataObject
) -> None:
    assert_handled(SPECS[name], data.draw(wrongs(SPECS[name])))
