from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP, Qwen3MoeTopKRouter
from transformers.utils import logging

from onn import qwen3
from onn.hub import export_qwen3_moe
from onn.qwen3 import Moe
from tests.hub import SELECTIVE, TOP_K, Tiny, generated, make_tiny, prompts, tinies
from tests.support import assert_close, assert_same, normal, relative_error, tolerance
from tests.test_qwen3 import config

EVERY_SIZE = pytest.mark.parametrize(("k", "normalise"), [(1, True), (1, False), (3, True), (4, False), (10, True)])


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def exported(tiny: Tiny, folder: Path) -> Qwen3MoeForCausalLM:
    """As plain transformers loads it, computed expert by expert (`grouped_mm` knows no float64)."""
    export_qwen3_moe(tiny.model, folder, config=tiny.config, moe=tiny.moe)
    stock = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    assert isinstance(stock, Qwen3MoeForCausalLM)
    return stock


def ranked(tiny: Tiny) -> Tiny:
    return tiny if tiny.moe.route == "top_k" else tiny._replace(moe=replace(TOP_K, top_k=tiny.moe.fallback_k))


class Wide(Qwen3MoeTopKRouter):
    """Qwen3-MoE's gate with its softmax in float64: stock rounds the weights of float64 models to float32."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        values, indices = torch.topk(torch.softmax(logits, dim=-1), self.top_k, dim=-1)
        return logits, values / values.sum(dim=-1, keepdim=True) if self.norm_topk_prob else values, indices


@settings(max_examples=12)
@given(tiny=tinies(dtype=torch.float64), wide=st.booleans())
def test_plain_transformers_gives_the_same_logits(tmp_path: Path, tiny: Tiny, wide: bool) -> None:
    tiny = ranked(tiny)
    stock, tokens = exported(tiny, tmp_path / "stock"), prompts(tiny, 2, 7)
    for gate in (module for module in stock.modules() if isinstance(module, Qwen3MoeTopKRouter) and wide):
        gate.__class__ = Wide
    bound = 1e-10 if wide else tolerance(torch.float32, terms=16)
    with torch.no_grad():
        assert_close(stock(tokens).logits, tiny.logits(tokens), bound=bound)
    shutil.rmtree(tmp_path / "stock")


@EVERY_SIZE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_models_keep_their_dtype_and_differ_by_the_order_of_sums_alone(
    tmp_path: Path, dtype: torch.dtype, k: int, normalise: bool
) -> None:
    tiny = make_tiny(config(), replace(TOP_K, top_k=k, normalise=normalise), dtype=dtype)
    stock, tokens = exported(tiny, tmp_path), prompts(tiny, 2, 9)
    assert {parameter.dtype for parameter in stock.parameters()} == {dtype}
    with torch.no_grad():
        got, expected = stock(tokens).logits, tiny.logits(tokens)
    assert relative_error(got, expected) <= tolerance(dtype, terms=20 * tiny.config.num_hidden_layers, slack=1.0)


@settings(max_examples=12)
@given(tiny=tinies(dtype=torch.bfloat16))
def test_the_files_are_those_that_transformers_itself_writes(tmp_path: Path, tiny: Tiny) -> None:
    assume(min(tiny.config.hidden_size, tiny.config.intermediate_size // 10) > 1)  # 5.17 squeezes
    tiny = ranked(tiny)
    exported(tiny, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert_same(ours, theirs)
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs"))
    assert first == {name: second[name] for name in first}
    assert first["architectures"] == ["Qwen3MoeForCausalLM"]
    for name in ("ours", "theirs"):
        shutil.rmtree(tmp_path / name)


def test_dense_layers_stay_dense(tmp_path: Path) -> None:
    tiny = make_tiny(config(num_hidden_layers=3), TOP_K, dense_layers=(1,))
    stock = exported(tiny, tmp_path)
    assert [isinstance(layer.mlp, Qwen3MoeMLP) for layer in stock.model.layers] == [False, True, False]


def test_what_is_exported_generates_as_the_module_does(tmp_path: Path) -> None:
    tiny = make_tiny(config(), TOP_K, dtype=torch.float64)
    tokens = prompts(tiny, 2, 4)
    got, expected = (generated(model, tokens, length=6) for model in (exported(tiny, tmp_path), tiny.module()))
    assert torch.equal(got, expected)


@EVERY_SIZE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_route_is_bit_for_bit_that_of_the_exported_gate(
    tmp_path: Path, dtype: torch.dtype, k: int, normalise: bool
) -> None:
    tiny = make_tiny(config(), replace(TOP_K, top_k=k, normalise=normalise), dtype=dtype)
    gate, moe = exported(tiny, tmp_path).model.layers[0].mlp.gate, tiny.model.layers[0].mlp
    assert isinstance(moe, Moe)
    x = normal(5, 30, tiny.config.hidden_size, dtype=dtype)
    with torch.no_grad():
        logits, weights, indices = gate(x)
    affinity, routing = qwen3.route(moe.router, x, config=tiny.moe)
    assert_same(affinity, logits)
    assert_same(routing.weights.gather(1, indices), weights)
    assert torch.equal(routing.active.sum(dim=1), torch.full((30,), k))


def test_thresholds_are_refused(tmp_path: Path) -> None:
    tiny = make_tiny(config(), SELECTIVE)
    with pytest.raises(ValueError, match=r"export_qwen3_moe: expected route='top_k', got 'threshold'; .*to_module"):
        export_qwen3_moe(tiny.model, tmp_path / "stock", config=tiny.config, moe=tiny.moe)
    assert not (tmp_path / "stock").exists()


def test_another_architecture_a_missing_layer_and_a_mix_of_dtypes_are_refused(tmp_path: Path) -> None:
    tiny = make_tiny(config(), TOP_K)
    mixed = tiny.model._replace(norm=tiny.model.norm.double())
    short = tiny.model._replace(layers=tiny.model.layers[:1])
    for model, architecture, message in (
        (tiny.model, config(hidden_size=8), r"embed_tokens\.weight: expected shape \[31, 8\], found \[31, 16\]"),
        (short, tiny.config, r"model\.layers\.1\.input_layernorm\.weight \[16\] is missing"),
        (mixed, tiny.config, r"expected one dtype, found .*torch\.float64 \(model\.norm\.weight\)"),
    ):
        with pytest.raises(ValueError, match=f"^export_qwen3_moe: .*{message}"):
            export_qwen3_moe(model, tmp_path / "stock", config=architecture, moe=TOP_K)
    assert not (tmp_path / "stock").exists()
