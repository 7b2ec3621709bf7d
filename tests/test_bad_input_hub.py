"""Wrong shapes, dtypes, devices, structures and kinds, to every public function of `onn.hub`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import Qwen3Config as TransformersConfig

import onn.functional as F
from onn import qwen3, tree
from onn.hub import convert, experts, export, model
from onn.hub.experts import StockExperts
from onn.hub.surprise import surprise
from onn.qwen3 import Layer, Mlp, Model, MoeConfig, Qwen3Config
from tests.bad_arguments import Spec
from tests.bad_calls import Refusal, assert_all_handled, assert_all_tried, refused
from tests.hub import TOP_K, make_tiny
from tests.hub_models import experts_modules, random_batch, random_model
from tests.test_qwen3 import config

TINY = make_tiny(config(), TOP_K)
LAYER = TINY.model.layers[0]


@cache
def stock() -> nn.Module:
    return random_model("mixtral", "eager", dtype=torch.float32)


@cache
def bank() -> StockExperts:
    """4 experts of hidden size 16."""
    return next(iter(experts_modules(stock()).values()))


INDEX, FEW = torch.tensor([[0, 1], [2, 3], [1, 1]]), torch.tensor([[3, 1]])
SPECS: dict[str, Spec] = {
    "bank_experts": Spec(
        lambda t, n: experts.bank_experts(bank(), t["hidden_states"], t["top_k_index"], t["top_k_weights"]),
        {"hidden_states": "float T 16", "top_k_index": "integer T C", "top_k_weights": "float T C"},
        ("T 16",),
        values={"hidden_states": torch.ones(3, 16), "top_k_index": INDEX, "top_k_weights": torch.ones(3, 2)},
    ),
    "bank_experts, few tokens": Spec(
        lambda t, n: experts.bank_experts(bank(), t["hidden_states"], t["top_k_index"], t["top_k_weights"]),
        {"hidden_states": "float T 16", "top_k_index": "integer T C", "top_k_weights": "float T C"},
        ("T 16",),
        values={"hidden_states": torch.ones(1, 16), "top_k_index": FEW, "top_k_weights": torch.ones(1, 2)},
    ),
    "dense_weights": Spec(
        lambda t, n: experts.dense_weights(
            t["index"], t["weights"], num_experts=int(n["num_experts"]), dtype=torch.float32
        ),
        {"index": "integer T C", "weights": "float T C"},
        ("T num_experts",),
        {"num_experts": 4},
        {"index": INDEX, "weights": torch.ones(3, 2)},
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_one_wrong_argument_is_refused_by_name_or_makes_no_difference_to_the_shapes(name: str) -> None:
    assert_all_handled(SPECS[name])


@pytest.mark.parametrize("index", [INDEX, FEW])
def test_an_index_may_be_any_integer(index: Tensor) -> None:
    x, weights = torch.ones(len(index), 16), torch.ones(index.shape)
    got, expected = (experts.bank_experts(bank(), x, own, weights) for own in (index.to(torch.uint8), index))
    assert torch.equal(got, expected)


def rotary(values: dict[str, str] | None) -> TransformersConfig:
    made = qwen3.transformers_config(config())
    made.rope_parameters = values
    return made


def with_first(layer: Layer) -> Model:
    return TINY.model._replace(layers=(layer, TINY.model.layers[1]))


def to_module(model: Model, config: Qwen3Config = TINY.config, moe: MoeConfig = TOP_K) -> object:
    return convert.to_module(model, config=config, moe=moe)


def exported(model: Model, config: Qwen3Config = TINY.config, moe: MoeConfig = TOP_K) -> object:
    export.export_qwen3_moe(model, Path("never made"), config=config, moe=moe)
    return None


def all_to(dtype: torch.dtype) -> Model:
    return tree.map1(lambda leaf: leaf.to(dtype), TINY.model)


def tapped(module: nn.Module, tokens: int = 2, name: str = "surprise") -> None:
    with model.tapped(module, names=cast("tuple[F.TapName, ...]", (name,)), tokens=tokens):
        pass


def tapped_twice() -> None:
    module = TINY.module()
    with model.tapped(module, names=("surprise",), tokens=2):
        tapped(module)


def surprised(**changes: Tensor | None) -> object:
    return surprise(stock(), cast("Mapping[str, object]", random_batch() | changes))


IDS, LABELS = (random_batch()[name] for name in ("input_ids", "labels"))
MIXED = TINY.model._replace(norm=TINY.model.norm.to("meta"))
WRONG_MODELS: Mapping[str, tuple[Model, str]] = {
    "a tensor": (cast("Model", TINY.model.norm), "expected a Model, got Tensor"),
    "a layer that is none": (with_first(cast("Layer", LAYER.mlp)), "layer 0: expected a Layer with"),
    "an mlp that is none": (with_first(LAYER._replace(mlp=cast("Mlp", LAYER.attention))), "found Attention"),
    "layers too many": (TINY.model._replace(layers=TINY.model.layers * 2), "4 layers, the configuration 2"),
    "integers": (all_to(torch.int64), "expected float model.embed_tokens.weight, got torch.int64"),
    "complex numbers": (all_to(torch.complex64), "expected float"),
    "eighths": (all_to(torch.float8_e4m3fn), "expected float"),
    "no vocabulary": (TINY.model._replace(embedding=TINY.model.embedding[:0]), "expected shape [31, 16]"),
}
REFUSALS: dict[str, Refusal] = {
    **{
        f"architecture, {values}": Refusal(
            partial(convert.architecture, rotary(values)), ("architecture", "rope_theta", str(values))
        )
        for values in (None, {}, {"rope_type": "default"}, {"rope_type": "default", "rope_theta": "x"})
    },
    "architecture, no configuration": Refusal(
        lambda: convert.architecture(cast("PreTrainedConfig", {})), ("architecture", "'dict'")
    ),
    "architecture, ours": Refusal(
        lambda: convert.architecture(cast("PreTrainedConfig", config())), ("architecture", "'Qwen3Config'")
    ),
    **{
        f"{function}, {name}": Refusal(partial(call, wrong), (where, words))
        for function, call, where in (
            ("to_module", to_module, "to_module"),
            ("export_qwen3_moe", exported, "export_qwen3_moe"),
            ("checked", partial(convert.checked, "here", config=TINY.config, moe=TOP_K), "here"),
        )
        for name, (wrong, words) in WRONG_MODELS.items()
    },
    "to_module, devices": Refusal(lambda: to_module(MIXED), ("one device", "cpu", "meta")),
    "to_module, no routing": Refusal(lambda: to_module(TINY.model, moe=cast("MoeConfig", None)), ("moe", "NoneType")),
    "to_module, their configuration": Refusal(
        lambda: to_module(TINY.model, config=cast("Qwen3Config", qwen3.transformers_config(TINY.config))),
        ("config", "onn.qwen3.Qwen3Config", "transformers"),
    ),
    "to_module, more experts": Refusal(
        lambda: to_module(TINY.model, moe=replace(TOP_K, num_experts=20)), ("expected shape [20, ",)
    ),
    "export_qwen3_moe, on meta": Refusal(lambda: exported(MIXED), ("export_qwen3_moe", "no values", "model.norm")),
    "export_qwen3_moe, no routing": Refusal(
        lambda: exported(TINY.model, moe=cast("MoeConfig", None)), ("moe", "NoneType")
    ),
    "to_tree": Refusal(lambda: convert.to_tree(cast("nn.Module", TINY.model)), ("to_tree", "got Model")),
    "to_tree, no head": Refusal(lambda: convert.to_tree(TINY.module().model), ("to_tree", "got OnnModel")),
    "to_tree, integers": Refusal(
        lambda: convert.to_tree(in_place(TINY.module(), torch.int8)), ("to_tree", "expected float", "int8")
    ),
    "abstract": Refusal(lambda: convert.abstract(config(), TOP_K, dense_layers=[2]), ("dense_layers=2",)),
    "abstract, from the end": Refusal(
        lambda: convert.abstract(config(), TOP_K, dense_layers=[-1]), ("dense_layers=-1",)
    ),
    "names": Refusal(lambda: convert.names(cast("Model", LAYER)), ("names", "got Layer")),
    "check_leaves": Refusal(
        lambda: convert.check_leaves("here", {}, TINY.model), ("here", "model.embed_tokens.weight", "missing")
    ),
    "experts_of": Refusal(
        lambda: experts.experts_of(cast("StockExperts", nn.Linear(1, 1))), ("experts_of", "Linear", "interface")
    ),
    **{
        f"bank_experts, index {wrong} of {len(index)}": Refusal(
            partial(experts.bank_experts, bank(), torch.ones(len(index), 16), index + wrong, torch.ones(index.shape)),
            ("index", "4"),
        )
        for index in (INDEX, FEW)
        for wrong in (-9, 7)
    },
    "dense_weights, a dtype": Refusal(
        lambda: experts.dense_weights(INDEX, torch.ones(3, 2), num_experts=4, dtype=torch.int64), ("dtype", "int64")
    ),
    "tapped, tokens": Refusal(lambda: tapped(TINY.module(), tokens=-1), ("zero_taps", "tokens=-1")),
    "tapped, too many": Refusal(lambda: tapped(TINY.module(), tokens=2**62), ("zero_taps", f"tokens={2**62}")),
    "tapped, a name": Refusal(lambda: tapped(TINY.module(), name="surprises"), ("'surprises'", "did you mean")),
    "tapped, a stock model": Refusal(lambda: tapped(stock()), ("tapped", "MixtralForCausalLM", "OnnMoe")),
    "tapped, no model": Refusal(lambda: tapped(cast("nn.Module", TINY.model)), ("tapped", "got Model")),
    "tapped, twice": Refusal(tapped_twice, ("tapped", "measured already")),
    "surprise, no mapping": Refusal(
        lambda: surprise(stock(), cast("Mapping[str, object]", IDS)), ("surprise", "batch Tensor")
    ),
    "surprise, no module": Refusal(
        lambda: surprise(cast("nn.Module", random_batch()), random_batch()), ("surprise", "model dict")
    ),
    "surprise, numbers": Refusal(lambda: surprised(input_ids=IDS.float()), ("input_ids", "torch.float32")),
    "surprise, truths": Refusal(lambda: surprised(input_ids=IDS > 3), ("input_ids", "torch.bool")),
    "surprise, one row": Refusal(lambda: surprised(input_ids=IDS[0]), ("input_ids [9]",)),
    "surprise, no row": Refusal(lambda: surprised(input_ids=IDS[:0], labels=LABELS[:0]), ("input_ids [0, 9]",)),
    "surprise, on meta": Refusal(lambda: surprised(input_ids=IDS.to("meta")), ("input_ids", "meta")),
    "surprise, strange tokens": Refusal(lambda: surprised(input_ids=IDS + 100), ("surprise", "unknown", "input_ids")),
    "surprise, strange labels": Refusal(lambda: surprised(labels=IDS + 100), ("surprise", "unknown", "labels")),
    "surprise, labels that are numbers": Refusal(lambda: surprised(labels=LABELS.float()), ("labels", "float32")),
    "surprise, no labels": Refusal(lambda: surprised(labels=None), ("no scalar loss", "labels")),
}


def in_place(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    return module


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused_with_what_was_wrong(name: str) -> None:
    refused(REFUSALS[name].call, *REFUSALS[name].words)
    assert not Path("never made").exists()


def test_a_model_without_values_becomes_a_module_without_values() -> None:
    module = convert.to_module(tree.map1(lambda leaf: leaf.to("meta"), TINY.model), config=TINY.config, moe=TOP_K)
    assert all(parameter.is_meta for parameter in module.parameters())


NOTHING_TO_REFUSE = {"is_stock": "says of any object whether it is such experts"}
MODULES = (convert, experts, export, model, import_module("onn.hub.surprise"))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.__name__))
def test_every_public_function_is_tried_with_wrong_arguments(module: ModuleType) -> None:
    assert_all_tried((*SPECS, *REFUSALS, *NOTHING_TO_REFUSE), module, MODULES)
