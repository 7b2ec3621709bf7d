"""Wrong shapes, dtypes, devices and structures, to the layers of `onn.qwen3` and the parts of a step of `onn.train`.

Shape letters as in `bad_arguments.SIZES`; C rows of N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import cast

import pytest
import torch
from torch import Tensor

import onn.functional as F
from onn import lessons, objective, qwen3, train, tree
from onn.data import Batch
from onn.objective import ExpertOptimizer, Measured, MoeTraining, Regime, RouterTarget
from onn.qwen3 import Attention, Carved, Layer, Mlp, Model, Moe
from onn.region import inline
from onn.tree import Tree
from tests.bad_arguments import Spec, Tensors, tensor
from tests.bad_calls import Refusal, assert_all_handled, assert_all_tried, refused
from tests.test_bad_input_functions import BANK, ROUTER, experts, router
from tests.test_qwen3 import MOE, config, parameters
from tests.test_train import ARCHITECTURE, SETTINGS, SPARSE, batch, carved_state

CONFIG = config(
    vocab_size=11,
    hidden_size=5,
    intermediate_size=30,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
)
ATTENTION = {
    "q": "float 8 H",
    "k": "float 4 H",
    "v": "float 4 H",
    "o": "float H 8",
    "q_norm": "float 4",
    "k_norm": "float 4",
}
POSITIONS = {"cosines": "float 1 N 4", "sines": "float 1 N 4"}
NORMS = {"input_norm": "float H", "post_attention_norm": "float H"}
DENSE = {"gate": "float M H", "up": "float M H", "down": "float H M"}
X, X_TH = {"x": "float C N H"}, {"x": "float T H"}


def attention(t: Tensors) -> Attention:
    return Attention(*(t[name] for name in ATTENTION))


def positions(t: Tensors) -> tuple[Tensor, Tensor]:
    return t["cosines"], t["sines"]


def layer(t: Tensors, mlp: Mlp | Moe, taps: Mapping[str, Tensor]) -> Tree:
    whole = Layer(t["input_norm"], attention(t), t["post_attention_norm"], mlp)
    y, seen = qwen3.layer_forward(whole, t["x"], positions(t), taps, config=CONFIG, moe=MOE)
    return y, seen


def tapped(t: Tensors) -> Tree:
    y, seen = qwen3.moe_forward(Moe(experts(t), router(t)), t["x"], {"surprise": t["tap"]}, config=MOE)
    return y, seen.affinity, seen.routing


LAYERS: dict[str, Spec] = {
    "apply_attention": Spec(
        lambda t, n: qwen3.apply_attention(attention(t), t["x"], positions(t), CONFIG),
        {**ATTENTION, **POSITIONS, **X},
        ("C N H",),
    ),
    "apply_norm": Spec(
        lambda t, n: qwen3.apply_norm(t["weight"], t["x"], CONFIG),
        {"weight": "float H", **X_TH},
        ("T H",),
        free=("x",),
    ),
    "layer_forward, carved": Spec(
        lambda t, n: layer(t, Moe(experts(t), router(t)), {"surprise": t["tap"]}),
        {**NORMS, **ATTENTION, **POSITIONS, **BANK, **ROUTER, **X, "tap": "float 14 E"},
        ("C N H", "14 H", "14 E", "14 E", "14 E", "14 E"),
    ),
    "layer_forward, dense": Spec(
        lambda t, n: layer(t, Mlp(t["gate"], t["up"], t["down"]), {}),
        {**NORMS, **ATTENTION, **POSITIONS, **DENSE, **X},
        ("C N H",),
    ),
    "moe_forward": Spec(
        lambda t, n: tapped(t), {**BANK, **ROUTER, **X_TH, "tap": "float T E"}, ("T H", "T E", "T E", "T E", "T E")
    ),
    "readout": Spec(
        lambda t, n: qwen3.readout(t["norm"], t["head"], t["x"], config=CONFIG),
        {"norm": "float H", "head": "float V H", **X},
        ("C N V",),
    ),
    "rotary_positions": Spec(lambda t, n: qwen3.rotary_positions(t["x"], CONFIG), X, ("1 N 4", "1 N 4")),
}


def teaching(target: RouterTarget) -> MoeTraining:
    return replace(SPARSE, moe=MOE, router=replace(SPARSE.router, target=target))


def carved(t: Tensors) -> Carved:
    routing = F.Routing(t["scores"], t["active"], t["weights"])
    return Carved(x=t["scores"], affinity=t["scores"], routing=routing)


def lesson(t: Tensors, target: RouterTarget) -> Tree:
    seen = Carved(x=t["x"], affinity=t["x"], routing=F.Routing(t["x"], t["x"], t["x"]))
    name = "counterfactual" if target == "counterfactual" else "surprise"
    return lessons.router_lesson(router(t), seen, {name: t["tap"]}, t["mix"], config=teaching(target))


def aim(t: Tensors) -> Tree:
    seen = Carved(x=t["x"], affinity=t["x"], routing=F.Routing(t["x"], t["x"], t["x"]))
    return lessons.router_objective(router(t), seen, {"surprise": t["tap"]}, t["mix"], config=teaching("surprise"))


def figures(t: Tensors) -> Tree:
    nothing = torch.zeros(())
    seen = Measured(error=nothing, divergence=(), tau=t["tau"], accuracy=nothing, carved=(carved(t),))
    return objective.sparse_metrics(t["loss"], seen, ({"surprise": t["tap"]},), t["share"], config=SETTINGS)


def scaled(t: Tensors) -> Tree:
    text = Batch(t["tokens"], t["targets"], t["mask"], torch.zeros(2))
    return objective.scaled_surprise(({"surprise": t["surprise"], "neuron": t["neuron"]},), text)


TAUGHT = {**ROUTER, **X_TH, "tap": "float T E", "mix": "float"}
TEXT = {"tokens": "integer C N", "targets": "integer C N", "mask": "bool C N"}


def taught(t: Tensors, *taps: str) -> Tree:
    routing = F.Routing(t["weights"], t["weights"], t["weights"])
    seen = Carved(x=t["x"], affinity=t["x"], routing=routing)
    found = {name: t[name] for name in taps}
    return lessons.expert_lesson(experts(t), t["importance"], seen, found, config=SPARSE.consolidation)


CONSOLIDATED = {
    **BANK,
    "importance": "float E I",
    "x": "float T H",
    "weights": "float T E",
    "matrix": "float 3 E I",
    "bias": "float 2 E I",
}
PARTS: dict[str, Spec] = {
    "expert_lesson": Spec(lambda t, n: taught(t, "matrix", "bias"), CONSOLIDATED, (*("E I H",) * 3, "E I")),
    "router_objective": Spec(lambda t, n: aim(t), TAUGHT, ("",)),
    "router_lesson, normalised": Spec(lambda t, n: lesson(t, "normalised"), TAUGHT, ("E H", "E")),
    "router_lesson, counterfactual": Spec(lambda t, n: lesson(t, "counterfactual"), TAUGHT, ("E H", "E")),
    "scaled_surprise": Spec(
        lambda t, n: scaled(t), {**TEXT, "surprise": "float 14 E", "neuron": "float E I"}, ("E I", "14 E")
    ),
    "sparse_metrics": Spec(
        lambda t, n: figures(t),
        {
            "scores": "float T E",
            "active": "bool T E",
            "weights": "float T E",
            "tap": "float T E",
            "loss": "float",
            "tau": "float",
            "share": "float",
        },
        ("", "", "", "", "", "", "1 E", "1 E", "1 E", ""),
    ),
}
SPECS = {**LAYERS, **PARTS}


@pytest.mark.parametrize("name", SPECS)
def test_one_wrong_argument_is_refused_by_name_or_makes_no_difference_to_the_shapes(name: str) -> None:
    assert_all_handled(SPECS[name])


WHOLE, STATE, WORDS = parameters(ARCHITECTURE), carved_state(), batch(0)
FIRST = WHOLE.layers[0]
NO_MOE = cast("Moe", FIRST.attention)


def with_first(layer: Layer) -> Model:
    return WHOLE._replace(layers=(layer, WHOLE.layers[1]))


def states(model: Model, tokens: Tensor = WORDS.tokens) -> object:
    return qwen3.hidden_states(model, tokens, (), config=ARCHITECTURE, moe=None, region=inline)


def with_distill(weight: float) -> objective.StepConfig:
    return replace(SETTINGS, sparse=replace(SPARSE, distill=objective.DistillConfig(weight=weight, temperature=1.0)))


def loss(soft: Tensor, settings: objective.StepConfig) -> object:
    if settings.sparse is None:
        return objective.language_loss(WHOLE, WORDS, (), soft, config=settings)
    return objective.language_loss(STATE.model, WORDS, ({}, {}), soft, config=settings)


SOFT = torch.zeros(WORDS.tokens.numel(), ARCHITECTURE.vocab_size, dtype=torch.float64)
ROUTED: Tensors = {name: tensor(dims, seed=3) for name, dims in ROUTER.items()}
SEEN = Carved(x=torch.ones(4, 5), affinity=torch.ones(4, 10), routing=F.Routing(*(torch.ones(4, 10),) * 3))
REFUSALS: dict[str, Refusal] = {
    "check_structure": Refusal(
        lambda: qwen3.check_structure("here", cast("Model", FIRST)), ("here: expected a Model, got Layer",)
    ),
    "check_structure, a layer": Refusal(
        lambda: qwen3.check_structure("here", with_first(cast("Layer", FIRST.mlp))), ("here, layer 0", "found Mlp")
    ),
    "check_structure, an mlp": Refusal(
        lambda: qwen3.check_structure("here", with_first(FIRST._replace(mlp=NO_MOE))),
        ("here, layer 0", "an Mlp or a Moe, found Attention"),
    ),
    "check_layers": Refusal(
        lambda: qwen3.check_layers("here", WHOLE._replace(norm=WHOLE.norm[:3])), ("here, layer 0", "norm [3]")
    ),
    "check_layers, the norm": Refusal(
        lambda: qwen3.check_layers("here", WHOLE._replace(norm=WHOLE.norm.float())),
        ("here, layer 0", "torch.float32", "torch.float64"),
    ),
    "check_layers, the head": Refusal(
        lambda: qwen3.check_layers("here", WHOLE._replace(head=(WHOLE.embedding.bfloat16(),))), ("torch.bfloat16",)
    ),
    "check_layers, devices": Refusal(
        lambda: qwen3.check_layers("here", WHOLE._replace(norm=WHOLE.norm.to("meta"))), ("norm on meta",)
    ),
    "check_model": Refusal(
        lambda: qwen3.check_model("here", WHOLE, config=config(hidden_size=8), moe=None), ("H=16", "H=8")
    ),
    "check_model, a part": Refusal(
        lambda: qwen3.check_model("here", cast("Model", WHOLE.embedding), config=ARCHITECTURE, moe=None),
        ("expected a Model, got Tensor",),
    ),
    "init": Refusal(
        lambda: qwen3.init(WHOLE, config=ARCHITECTURE, dtype=torch.int64), ("init", "dtype", "torch.int64")
    ),
    "init, float8": Refusal(
        lambda: qwen3.init(WHOLE, config=ARCHITECTURE, dtype=torch.float8_e4m3fn), ("init", "float8_e4m3fn")
    ),
    "init, noise": Refusal(
        lambda: qwen3.init(tree.map1(Tensor.long, WHOLE), config=ARCHITECTURE, dtype=torch.float32),
        ("init", "float embedding", "torch.int64"),
    ),
    "hidden_states": Refusal(lambda: states(WHOLE, WORDS.tokens[:0]), ("forward", "tokens [0, 8]")),
    "hidden_states, no window": Refusal(lambda: states(WHOLE, WORDS.tokens[:, :0]), ("forward", "tokens [3, 0]")),
    "hidden_states, a carved one": Refusal(lambda: states(STATE.model), ("forward", "2 carved layers, got 0")),
    "forward": Refusal(
        lambda: qwen3.forward(with_first(FIRST._replace(mlp=NO_MOE)), WORDS.tokens, (), config=ARCHITECTURE, moe=None),
        ("forward, layer 0", "found Attention"),
    ),
    "forward, taps": Refusal(
        lambda: qwen3.forward(
            *(STATE.model, WORDS.tokens, ({"surprise": torch.zeros(23, 10)}, {})), config=ARCHITECTURE, moe=MOE
        ),
        ("tap surprise", "[23, 10]"),
    ),
    "soft_targets": Refusal(
        lambda: objective.soft_targets(STATE.model, WORDS, config=with_distill(0.5)), ("teacher", "carved")
    ),
    "soft_targets, none": Refusal(
        lambda: objective.soft_targets((), WORDS, config=with_distill(0.5)), ("distill.weight=0.5", "none")
    ),
    "language_loss": Refusal(lambda: loss(SOFT, replace(SETTINGS, sparse=None)), ("soft", "config.sparse=None")),
    "language_loss, integers": Refusal(
        lambda: loss(SOFT.long(), with_distill(0.5)), ("language_loss", "soft", "torch.int64")
    ),
    "language_loss, rows": Refusal(lambda: loss(SOFT[1:], with_distill(0.5)), ("soft [23, 31]",)),
    "language_loss, meta": Refusal(lambda: loss(SOFT.to("meta"), with_distill(0.5)), ("soft on meta",)),
    "measure": Refusal(
        lambda: objective.measure(STATE.model, WORDS, config=replace(SETTINGS, sparse=None)), ("moe=MoeConfig",)
    ),
    "measure, a batch": Refusal(
        lambda: objective.measure(WHOLE, WORDS._replace(mask=WORDS.mask.long()), config=SETTINGS), ("mask",)
    ),
    "zero_taps": Refusal(
        lambda: objective.zero_taps(STATE.model, 2**62, names=("surprise",)), ("zero_taps", f"tokens={2**62}")
    ),
    "zero_taps, a name": Refusal(
        lambda: objective.zero_taps(STATE.model, 3, names=cast("tuple[F.TapName, ...]", ("surprises",))),
        ("zero_taps", "'surprises'", "did you mean 'surprise'"),
    ),
    "scaled_surprise, a name": Refusal(
        lambda: objective.scaled_surprise(({"surprises": torch.zeros(24, 10)},), WORDS), ("tap='surprises'",)
    ),
    "router_objective, no tap": Refusal(
        lambda: lessons.router_objective(
            *(router(ROUTED), SEEN, {"surprise": torch.zeros(4, 10)}, torch.tensor(0.5)),
            config=teaching("counterfactual"),
        ),
        ("target='counterfactual'", "'counterfactual'", "['surprise']"),
    ),
    "expert_lesson, no tap": Refusal(
        lambda: taught({name: tensor(dims, seed=0) for name, dims in CONSOLIDATED.items()}, "bias"),
        ("expert_lesson", "'matrix'", "['bias']"),
    ),
    "init_state, another optimizer": Refusal(
        lambda: train.init_state(STATE.model, experts=cast("ExpertOptimizer", "adam")),
        ("init_state", "experts", "'adam'"),
    ),
    "init_state, another regime": Refusal(
        lambda: train.init_state(STATE.model, regime=cast("Regime", "router")), ("init_state", "regime", "'router'")
    ),
    "init_state": Refusal(lambda: train.init_state(cast("Model", FIRST)), ("init_state", "got Layer")),
    "init_state, a bank": Refusal(
        lambda: train.init_state(broken_bank(STATE.model)), ("init_state, layer 0", "experts.down [10, 4, 15]")
    ),
    "step": Refusal(lambda: train.step(STATE, WORDS._replace(mask=WORDS.mask[:2]), (), SETTINGS), ("mask [2, 8]",)),
    "step, no text": Refusal(
        lambda: train.step(STATE, Batch(*(part[:0] for part in WORDS)), (), SETTINGS), ("tokens [0, 8]",)
    ),
    "lifecycle": Refusal(
        lambda: train.lifecycle(STATE, (torch.zeros(10, 16).long(),) * 2, config=SPARSE, scale=0.1), ("float noise",)
    ),
    "lifecycle, a scale": Refusal(
        lambda: train.lifecycle(STATE, (torch.zeros(10, 16).double(),) * 2, config=SPARSE, scale=-1.0), ("scale=-1.0",)
    ),
}


def broken_bank(model: Model) -> Model:
    layer = model.layers[0]
    assert isinstance(layer.mlp, Moe)
    bank = layer.mlp.experts._replace(down=layer.mlp.experts.down[..., 1:])
    return model._replace(layers=(layer._replace(mlp=layer.mlp._replace(experts=bank)), model.layers[1]))


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused_with_what_was_wrong(name: str) -> None:
    refused(REFUSALS[name].call, *REFUSALS[name].words)


ELSEWHERE = {"mlp_forward", "route", "distillation_loss", "target_share"}
"""`tests/test_bad_input_models.py` changes their arguments one by one."""
NOTHING_TO_REFUSE = {
    "abstract": "takes a configuration alone, which refuses wrong sizes when it is made",
    "carved_layers": "picks layers of a model, whatever they hold",
    "output_weight": "picks one of two leaves",
}


MODULES = (qwen3, objective, lessons, train)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.__name__))
def test_every_public_function_is_tried_with_wrong_arguments(module: ModuleType) -> None:
    assert_all_tried((*SPECS, *REFUSALS, *ELSEWHERE, *NOTHING_TO_REFUSE), module, MODULES)
