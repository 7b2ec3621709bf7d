"""Wrong shapes, dtypes, devices and numbers, to the bank of `onn.functional`, to the parts of `onn.qwen3` and of
`onn.objective`, to trees and figures; and batches, noise and states that do not fit, to a step of `onn.train`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import cast

import pytest
import torch
from torch import Tensor

import onn.functional as F
from onn import carve, data, objective, observe, optim, qwen3, train, tree
from onn.data import Batch
from onn.functional.transform import Taps
from onn.qwen3 import Mlp, Model, MoeConfig
from onn.tree import Engine, Tree
from tests.bad_arguments import Spec, Tensors
from tests.bad_calls import assert_all_handled, refused
from tests.test_bad_input_functions import BANK, ROUTER, experts, router
from tests.test_qwen3 import MOE, parameters
from tests.test_train import ARCHITECTURE, DENSE, SETTINGS, SPARSE, batch, carved_state, rounding

X, W, DY = {"x": "float T H"}, {"weights": "float T E"}, {"dy": "float T H"}
RESIDUALS = {"h1": "float T E I", "h3": "float T E I"}
TOP = replace(MOE, route="top_k")


def passed(t: Tensors) -> Tree:
    residuals = F.Residuals(t["h1"], t["h3"])
    return F.bank_vjp(experts(t), t["x"], t["weights"], residuals, t["dy"], select=None)


def banked(t: Tensors, n: dict[str, float], *, backend: F.Backend) -> Tree:
    taps = {"surprise": t["surprise"], "neuron": t["neuron"]}
    return F.bank(experts(t), t["x"], t["weights"], taps, min_k=int(n["min_k"]), backend=backend)


def routed(t: Tensors, config: MoeConfig) -> Tree:
    affinity, routing = qwen3.route(router(t), t["x"], config=config)
    return affinity, routing


TAPS = {"surprise": "float T E", "neuron": "float E I"}
SPECS: dict[str, Spec] = {
    "bank, dense": Spec(
        lambda t, n: banked(t, dict(n), backend="dense"), {**BANK, **X, **W, **TAPS}, ("T H",), {"min_k": 2}
    ),
    "bank, loop": Spec(
        lambda t, n: banked(t, dict(n), backend="loop"), {**BANK, **X, **W, **TAPS}, ("T H",), {"min_k": 2}
    ),
    "bank_forward": Spec(
        lambda t, n: F.bank_forward(experts(t), t["x"], t["weights"]), {**BANK, **X, **W}, ("T H", "T E I", "T E I")
    ),
    "bank_local": Spec(
        lambda t, n: F.bank_local(experts(t), F.Residuals(t["h1"], t["h3"]), t["dy"]),
        {**BANK, **RESIDUALS, **DY},
        ("T E I", "T E I", "T E I", "T E"),
    ),
    "bank_vjp": Spec(
        lambda t, n: passed(t), {**BANK, **X, **W, **RESIDUALS, **DY}, ("E I H", "E I H", "E I H", "T H", "T E", "T E")
    ),
    "mlp_forward": Spec(
        lambda t, n: qwen3.mlp_forward(Mlp(t["gate"], t["up"], t["down"]), t["x"]),
        {"gate": "float M H", "up": "float M H", "down": "float H M", **X},
        ("T H",),
        free=("x",),
    ),
    "route, threshold": Spec(lambda t, n: routed(t, MOE), {**ROUTER, **X}, ("T E", "T E", "T E", "T E")),
    "route, top k": Spec(lambda t, n: routed(t, TOP), {**ROUTER, **X}, ("T E", "T E", "T E", "T E")),
    "distillation_loss": Spec(
        lambda t, n: objective.distillation_loss(t["logits"], t["soft"], temperature=n["temperature"]),
        {"logits": "float T V", "soft": "float T V"},
        ("T",),
        {"temperature": 2.0},
    ),
    "target_share": Spec(
        lambda t, n: objective.target_share(t["step"], config=SPARSE.density), {"step": "real"}, ("",), free=("step",)
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_one_wrong_argument_is_refused_by_name_or_makes_no_difference_to_the_shapes(name: str) -> None:
    assert_all_handled(SPECS[name])


STATE, TEXT = carved_state(), batch(0)
WHOLE = parameters(ARCHITECTURE)


def step(text: Batch, *, state: train.State = STATE, noise: Model | tuple[()] = ()) -> object:
    return train.step(state, text, noise, SETTINGS)


@pytest.mark.parametrize("place", [-1, ARCHITECTURE.vocab_size, 2**40])
def test_ids_outside_the_vocabulary_are_refused_at_the_edge_and_by_a_step_on_a_cpu(place: int) -> None:
    for name in ("tokens", "targets"):
        ids = getattr(TEXT, name).clone()
        ids[1, 2] = place
        wrong = TEXT._replace(**{name: ids})
        vocabulary = f"vocab_size={ARCHITECTURE.vocab_size}"
        with pytest.raises(
            ValueError, match=rf"check_batch: {name} from .*{place}.*{vocabulary}" if place > 0 else name
        ):
            data.check_batch(wrong, vocab_size=ARCHITECTURE.vocab_size)
        with pytest.raises(ValueError, match=f"{name} that are not below {vocabulary}"):
            step(wrong)


@pytest.mark.parametrize("name", ["tokens", "targets", "mask"])
def test_a_batch_whose_parts_do_not_fit_is_refused(name: str) -> None:
    part: Tensor = getattr(TEXT, name)
    for other in (part[:, :-1], part[:-1], part[0], part[None], part.double(), part.to("meta")):
        wrong = TEXT._replace(**{name: other})
        with pytest.raises(ValueError, match=rf"language_loss: .*\b{name}\b"):
            step(wrong)
        with pytest.raises(ValueError, match=rf"check_batch: .*\b{name}\b"):
            data.check_batch(wrong, vocab_size=ARCHITECTURE.vocab_size)
    data.check_batch(TEXT, vocab_size=ARCHITECTURE.vocab_size)


def test_a_state_that_does_not_fit_its_model_is_refused() -> None:
    dense = train.init_state(WHOLE)
    refused(lambda: step(TEXT, state=dense), "step", "sparse", "dense")
    refused(lambda: train.step(STATE, TEXT, (), DENSE), "forward", "moe=MoeConfig")
    refused(lambda: step(TEXT, state=STATE._replace(usage=STATE.usage[:1])), "step", "usage of 1")
    short = tuple(counts[:3] for counts in STATE.lifetime)
    refused(lambda: step(TEXT, state=STATE._replace(lifetime=short)), "step", "lifetime [3]")
    moments = STATE.optimizer._replace(mean=STATE.model._replace(norm=STATE.model.norm[:3]))
    refused(lambda: step(TEXT, state=STATE._replace(optimizer=moments)), "optimizer.mean", "norm", "got [3]")


def test_noise_of_another_model_is_refused() -> None:
    noise = rounding(STATE.model, 0)
    refused(lambda: step(TEXT, noise=noise._replace(layers=noise.layers[:1])), "noise", "layers.1", "got nothing")
    refused(lambda: step(TEXT, noise=rounding(WHOLE, 0)), "noise does not fit", "mlp")


def test_lifecycle_takes_carved_models_and_noise_for_each_layer() -> None:
    fresh = tuple(torch.zeros(10, ARCHITECTURE.hidden_size, dtype=torch.float64) for _ in range(2))
    train.lifecycle(STATE, fresh, config=SPARSE, scale=0.1)
    refused(lambda: train.lifecycle(STATE, fresh[:1], config=SPARSE, scale=0.1), "lifecycle", "got 1")
    refused(lambda: train.lifecycle(train.init_state(WHOLE), (), config=SPARSE, scale=0.1), "lifecycle", "dense")
    refused(lambda: train.lifecycle(STATE, (fresh[0][:3],) * 2, config=SPARSE, scale=0.1), "noise", "[3, ")


def forward(model: Model, tokens: Tensor = TEXT.tokens) -> object:
    return qwen3.forward(model, tokens, (), config=ARCHITECTURE, moe=None)


def test_a_model_of_another_architecture_is_refused() -> None:
    layer = WHOLE.layers[0]
    for path in tree.paths(WHOLE.layers[0]):
        at = tree.paths(layer).index(path)
        shorter = [leaf[:-1] if place == at else leaf for place, leaf in enumerate(tree.leaves(layer))]
        layers = (WHOLE.layers[1], tree.unflatten(layer, shorter))
        with pytest.raises(ValueError, match="forward, layer 1: "):
            forward(WHOLE._replace(layers=layers))
    refused(lambda: forward(WHOLE._replace(layers=WHOLE.layers[:1])), "forward", "1 layers, the configuration 2")
    refused(lambda: forward(WHOLE._replace(head=(WHOLE.embedding,) * 2)), "forward", "2 heads")
    refused(lambda: forward(WHOLE._replace(embedding=WHOLE.embedding[:-1])), "forward", "V=30", "V=31")
    mixed = WHOLE._replace(layers=(layer, layer._replace(input_norm=layer.input_norm.float())))
    refused(lambda: forward(mixed), "forward, layer 1", "torch.float32", "torch.float64")
    refused(lambda: forward(WHOLE, TEXT.tokens[0]), "forward", "tokens [8]")
    refused(lambda: forward(WHOLE, TEXT.tokens.double()), "forward", "tokens", "float64")
    refused(lambda: forward(WHOLE, TEXT.tokens.to(torch.int8)), "forward", "tokens", "int8")


def test_another_number_of_experts_than_configured_is_refused() -> None:
    carved = carve.carve(WHOLE, num_experts=20)
    refused(
        lambda: qwen3.forward(carved, TEXT.tokens, ({}, {}), config=ARCHITECTURE, moe=MOE), "forward", "E=20", "E=10"
    )


def test_figures_need_a_surprise_for_each_layer() -> None:
    seen = objective.measure(STATE.model, TEXT, config=SETTINGS)
    share = torch.tensor(0.5)

    def figures(taps: Taps) -> object:
        return objective.sparse_metrics(seen[0], seen[1], taps, share, config=SETTINGS)

    refused(lambda: figures(seen[2][:1]), "sparse_metrics", "each of 2 carved layers")
    refused(lambda: figures(()), "sparse_metrics", "'surprise'")
    refused(lambda: figures(({}, {})), "sparse_metrics", "'surprise'")
    dense = replace(SETTINGS, sparse=None)
    refused(lambda: objective.sparse_metrics(*seen[:2], seen[2], share, config=dense), "sparse_metrics", "sparse=None")
    refused(lambda: objective.zero_taps(STATE.model, -1, names=("surprise",)), "zero_taps", "tokens=-1")
    refused(lambda: objective.soft_targets((), TEXT, config=taught()), "soft_targets", "distill.weight=0.5")


def taught() -> objective.StepConfig:
    return replace(SETTINGS, sparse=replace(SPARSE, distill=objective.DistillConfig(weight=0.5, temperature=1.0)))


def test_trees_name_what_does_not_fit() -> None:
    def first(leaves: Mapping[str, Tensor]) -> tuple[Tensor, tuple[()]]:
        return leaves["a"], ()

    refused(lambda: tree.value_and_grad(first, engine=cast("Engine", "fun")), "value_and_grad", "engine='fun'")
    for whole in (tree.value_and_grad(first, engine="autograd"), tree.value_and_grad(first, engine="func")):
        for wrong, words in ((torch.ones(2), "value [2]"), (torch.ones((), dtype=torch.int64), "leaf a")):
            refused(partial(whole, {"a": wrong}), "value_and_grad", words)
    assert bool(tree.all_finite(()))
    refused(lambda: optim.global_norm(()), "global_norm", "grads")


def test_figures_of_what_is_no_table_are_refused() -> None:
    refused(lambda: observe.usage_figure(torch.ones(2, 3), ["a", "b", "c"]), "expert_by_domain", "usage [2, 3]")
    refused(lambda: observe.usage_figure(torch.ones(1, 2, 0), ["a", "b"]), "expert_by_domain", "usage [1, 2, 0]")
    for kind in (torch.bool, torch.complex64):
        refused(partial(observe.mutual_information, torch.ones(2, 3).to(kind)), "mutual_information", "counts")
    refused(lambda: observe.mutual_information(torch.ones(2, 3, device="meta")), "mutual_information", "counts")
