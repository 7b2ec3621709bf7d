from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import logging

from onn import qwen3, tree
from onn.config import Value, to_dict
from onn.functional.routing import Combine
from onn.hub import OnnConfig, OnnForCausalLM, OnnModel, architecture, to_tree
from onn.hub.convert import names
from onn.hub.model import OnnMoe
from tests.hub import SELECTIVE, Tiny, make_tiny, prompts, tinies
from tests.support import assert_same
from tests.test_qwen3 import MOE, config, parameters, reference

SAVED = Path(__file__).parent / "configs" / "hub"
"""`config.json` as every version so far has written it: `v{version}.json`. Never edit one; add the next."""


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def made(**changes: object) -> OnnConfig:
    stock = qwen3.transformers_config(config()).to_dict()
    del stock["model_type"]
    return OnnConfig.from_dict({**stock, "moe": to_dict(MOE), **changes})


@settings(max_examples=12)
@given(tiny=tinies(dtype=torch.bfloat16))
def test_what_is_saved_comes_back_bit_for_bit_through_auto_classes(tmp_path: Path, tiny: Tiny) -> None:
    folder = tmp_path / "model"
    tiny.module().save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    expected = dict(zip(names(tiny.model), tree.leaves(tiny.model), strict=True))
    assert stored.keys() == expected.keys()
    assert_same(stored, expected)
    assert isinstance(AutoConfig.from_pretrained(folder), OnnConfig)
    back = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(back, OnnForCausalLM)
    assert (architecture(back.config), back.config.moe_config()) == (tiny.config, tiny.moe)
    assert_same(to_tree(back), tiny.model)
    tokens = prompts(tiny, 1, 4)
    with torch.no_grad():
        assert_same(back(tokens).logits, tiny.logits(tokens))
    shutil.rmtree(folder)


def test_the_model_without_its_head_is_loaded_as_well(tmp_path: Path) -> None:
    tiny = make_tiny(config(), SELECTIVE)
    tiny.module().save_pretrained(tmp_path)
    back = AutoModel.from_pretrained(tmp_path)
    assert isinstance(back, OnnModel)
    tokens = prompts(tiny, 2, 5)
    with torch.no_grad():
        assert_same(back(tokens).last_hidden_state @ tiny.model.embedding.mT, tiny.logits(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_model_is_loaded_in_the_dtype_asked_for_and_its_thresholds_no_narrower_than_float32(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    tiny = make_tiny(config(), SELECTIVE)
    tiny.module().save_pretrained(tmp_path)
    back = OnnForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for name, parameter in back.named_parameters():
        assert parameter.dtype is (wide if "thresholds" in name else dtype), name
    expected = [
        leaf.to(wide if "thresholds" in name else dtype)
        for name, leaf in zip(names(tiny.model), tree.leaves(tiny.model), strict=True)
    ]
    assert_same(to_tree(back), tree.unflatten(tiny.model, expected))


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("offloaded", [False, True])
def test_device_maps_place_every_layer_whatever_is_offloaded(tmp_path: Path, offloaded: bool) -> None:
    tiny = make_tiny(config(), SELECTIVE)
    tiny.module().save_pretrained(tmp_path / "model")
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0", "model.layers.1")
    places = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
    back = OnnForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places if offloaded else "cpu", offload_folder=tmp_path / "offload"
    )
    gate = back.model.layers[1].mlp.experts.gate
    assert gate.device.type == ("meta" if offloaded else "cpu")
    tokens = prompts(tiny, 2, 5)
    with torch.no_grad():
        assert_same(back(tokens).logits, tiny.logits(tokens))


def test_on_meta_nothing_is_allocated_and_shapes_are_known(tmp_path: Path) -> None:
    tiny = make_tiny(config(), SELECTIVE)
    tiny.module().save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = OnnForCausalLM(made())
    for module in (empty, OnnForCausalLM.from_pretrained(tmp_path, device_map="meta")):
        assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
        assert module(torch.zeros(2, 3, dtype=torch.int64, device="meta")).logits.shape == (2, 3, 31)


def test_a_new_model_has_random_experts_and_routers_half_open() -> None:
    module = OnnForCausalLM(made(dense_layers=[0]))
    dense, carved = (layer.mlp for layer in module.model.layers)
    assert not isinstance(dense, OnnMoe)
    for weight in (*carved.experts(), carved.router().prototypes):
        assert 0.15 < float(weight.detach().std()) < 0.25
    assert not carved.router().thresholds.any()
    assert torch.isfinite(module(torch.zeros(1, 3, dtype=torch.int64)).logits).all()


def rewritten(folder: Path, drop: str = "", add: Mapping[str, torch.Tensor] = {}) -> Path:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not drop or drop not in name}
    save_file({**kept, **add}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_checkpoint_that_is_not_whole_is_an_error(tmp_path: Path) -> None:
    for kind in ("missing", "unexpected", "shape"):
        make_tiny(config(), MOE).module().save_pretrained(tmp_path / kind)
    with pytest.raises(
        ValueError, match=r"OnnForCausalLM\.from_pretrained: 13 missing .* such as model\.layers\.1\.inp"
    ):
        OnnForCausalLM.from_pretrained(rewritten(tmp_path / "missing", drop="layers.1."))
    extra = {"model.layers.2.mlp.experts.gate": torch.zeros(10, 4, 16)}
    with pytest.raises(
        ValueError, match=r"1 unexpected of the tensors .* such as model\.layers\.2\.mlp\.experts\.gate"
    ):
        AutoModelForCausalLM.from_pretrained(rewritten(tmp_path / "unexpected", add=extra))
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        OnnForCausalLM.from_pretrained(
            rewritten(tmp_path / "shape", drop="model.norm", add={"model.norm.weight": torch.ones(3)})
        )


def test_loading_info_is_given_to_who_asks_for_it(tmp_path: Path) -> None:
    make_tiny(config(), MOE).module().save_pretrained(tmp_path)
    loaded: object = OnnForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, tuple)
    model, info = loaded
    assert isinstance(model, OnnForCausalLM)
    assert not info["missing_keys"]


def test_a_dense_checkpoint_is_refused_with_what_to_do(tmp_path: Path) -> None:
    reference(parameters(config(), dtype=torch.float32), config()).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"OnnConfig: expected moe=\{\.\.\.\} .* before it is carved: onn\.hub\.to_tree"
    ):
        OnnForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe": to_dict(MOE) | {"num_exprts": 3}}, "moe: unknown value 'num_exprts'; did you mean 'num_experts'"),
        (
            {"moe": {name: v for name, v in to_dict(MOE).items() if name != "route"}},
            "moe: missing 'route' of MoeConfig",
        ),
        ({"moe": to_dict(MOE) | {"top_k": "3"}}, "moe: top_k: expected int, got '3'"),
        ({"moe": to_dict(MOE) | {"route": "best"}}, "moe: route: expected one of 'threshold', 'top_k', got 'best'"),
        ({"intermediate_size": 41}, "intermediate_size=41 does not divide into num_experts=10 of at most 96 neurons"),
        ({"intermediate_size": 970}, "intermediate_size=970 does not divide"),
        ({"hidden_act": "gelu"}, "only hidden_act='silu' is supported, found 'gelu'"),
        ({"dense_layers": [2]}, "expected 0 <= dense_layers=2 <= 1"),
        ({"onn_version": 2}, "expected onn_version=1, got 2"),
    ],
)
def test_a_configuration_that_is_no_hyper_smoe_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^OnnConfig: {message}"):
        made(**changes)


def test_a_configuration_without_experts_is_refused_where_it_is_used() -> None:
    empty = made(moe=None)
    for use in (empty.moe_config, lambda: OnnForCausalLM(empty), lambda: OnnModel(empty)):
        with pytest.raises(ValueError, match=r"^OnnConfig: expected moe="):
            use()


@given(k=st.integers(1, 10), combine=st.sampled_from(["sum", "uniform", "softmax"]), dense=st.booleans())
def test_a_configuration_comes_back_through_json(k: int, combine: Combine, dense: bool) -> None:
    moe = replace(MOE, top_k=k, combine=combine)
    first = made(moe=to_dict(moe), dense_layers=[1] if dense else [])
    read: dict[str, Value] = json.loads(first.to_json_string())
    back = OnnConfig.from_dict(read)
    assert back.moe_config() == moe
    assert back.dense_layers == first.dense_layers
    assert architecture(back) == config()


@pytest.mark.parametrize("path", sorted(SAVED.glob("*.json")), ids=lambda path: str(path.stem))
def test_a_configuration_saved_by_any_version_still_loads(path: Path) -> None:
    saved = AutoConfig.from_pretrained(path)
    assert isinstance(saved, OnnConfig)
    assert (architecture(saved), saved.moe_config(), saved.dense_layers) == (config(), MOE, [1])


def test_importing_does_not_load_what_is_not_used() -> None:
    """`onn` alone costs nothing, and `onn.hub` none of transformers' mixture-of-experts models."""
    code = """
        import sys
        import onn
        assert not any(name.startswith(("torch", "transformers")) for name in sys.modules)
        import onn.qwen3
        before = set(sys.modules)
        import onn.hub
        print(*(name for name in set(sys.modules) - before if "modeling" in name or "integrations" in name))
    """
    lines = "\n".join(line.strip() for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
