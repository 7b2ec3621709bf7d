"""Reading checkpoints and exporting them: parity with transformers, damage, memory, configurations, no network."""

from __future__ import annotations

import json
import os
import pickle
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3ForCausalLM

from experiments.make_checkpoint import REAL_CONFIG
from onn import carve, qwen3, tree, weights
from onn.qwen3 import Qwen3Config
from onn.weights import CONFIG_FILE, MODEL_FILE
from tests.checkpoints import (
    SMALL,
    UNTIED,
    any_bits,
    assert_same_bits,
    config_json,
    hub_tensors,
    manifest_of,
    write_checkpoint,
)
from tests.support import relative_error, tolerance

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DTYPES = [torch.float32, torch.bfloat16]
TIES = [SMALL, UNTIED]


def logits_of(folder: Path, tokens: Tensor) -> Tensor:
    hub = Qwen3ForCausalLM.from_pretrained(folder, local_files_only=True, attn_implementation="sdpa")
    logits: Tensor = hub(tokens, use_cache=False).logits
    return logits.detach()


def tokens_of(config: Qwen3Config) -> Tensor:
    return torch.randint(config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", TIES)
def test_a_loaded_checkpoint_computes_what_transformers_computes(
    tmp_path: Path, config: Qwen3Config, dtype: torch.dtype
) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", config, hub_tensors(config, dtype=dtype))
    values = json.loads((folder / CONFIG_FILE).read_text()) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / CONFIG_FILE).write_text(json.dumps(values))
    model, tokens = weights.load(folder, config=weights.read_config(folder / CONFIG_FILE)), tokens_of(config)
    assert {leaf.dtype for leaf in tree.leaves(model)} == {dtype}
    assert len(model.head) == (0 if config.tie_word_embeddings else 1)
    expected = logits_of(folder, tokens)
    assert expected.dtype == dtype
    ours = qwen3.forward(model, tokens, (), config=config, moe=None).logits
    assert relative_error(ours, expected) <= tolerance(dtype, terms=20 * config.num_hidden_layers, slack=1.0)


@pytest.mark.parametrize("config", TIES)
def test_hub_names_are_transformers_names_in_the_order_of_the_leaves(config: Qwen3Config) -> None:
    model = qwen3.abstract(config)
    names = weights.hub_names(model)
    with torch.device("meta"):
        hub = Qwen3ForCausalLM(qwen3.transformers_config(config))
    expected = {name: parameter.shape for name, parameter in hub.named_parameters()}
    assert len(names) == len(set(names))
    assert {name: leaf.shape for name, leaf in zip(names, tree.leaves(model), strict=True)} == expected
    by_name = dict(zip(names, tree.paths(model), strict=True))
    assert by_name["model.layers.1.self_attn.k_norm.weight"] == "layers.1.attention.k_norm"
    with pytest.raises(ValueError, match=r"expected a dense model, found layers\.0\.mlp\.experts\.gate"):
        weights.hub_names(carve.carve(model, num_experts=10))


def test_loaded_tensors_are_ordinary_writable_and_independent_of_the_file(tmp_path: Path) -> None:
    tensors = hub_tensors(SMALL)
    folder = write_checkpoint(tmp_path / "checkpoint", SMALL, tensors)
    model = weights.load(folder, config=SMALL)
    path = folder / MODEL_FILE
    with path.open("r+b") as stream:
        stream.write(bytes(path.stat().st_size))
    path.unlink()
    for name, leaf in zip(weights.hub_names(model), tree.leaves(model), strict=True):
        assert torch.equal(leaf, tensors[name]), name
        assert leaf.is_contiguous()
        assert leaf.untyped_storage().nbytes() == leaf.nbytes
        assert leaf.untyped_storage().resizable()
        assert not leaf.requires_grad
        leaf.add_(1)
        assert torch.equal(leaf, tensors[name] + 1), name


def peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak can be reset on Linux alone")
def test_loading_takes_little_more_memory_than_the_file_has(tmp_path: Path) -> None:
    config = replace(SMALL, vocab_size=8192, hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    model = tree.map1(lambda leaf: torch.zeros(leaf.shape), qwen3.abstract(config))
    tensors = dict(zip(weights.hub_names(model), tree.leaves(model), strict=True))
    folder = write_checkpoint(tmp_path / "checkpoint", config, {**tensors, HEAD: model.embedding.clone()})
    del model, tensors
    size = (folder / MODEL_FILE).stat().st_size / 2**20
    assert size > 100
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_mib()
    model = weights.load(folder, config=config)
    assert peak_mib() - before <= 1.3 * size
    assert len(tree.leaves(model)) == 2 + 11 * 6


@pytest.mark.parametrize("place", [0, 250, -1])
def test_a_tied_head_that_differs_in_one_bit_is_refused(tmp_path: Path, place: int) -> None:
    tensors = hub_tensors(SMALL)
    tensors[HEAD].view(torch.int16).view(-1)[place] ^= -(2**15)
    folder = write_checkpoint(tmp_path / "checkpoint", SMALL, tensors)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        weights.load(folder, config=SMALL)


def test_a_head_of_signed_zeros_and_nans_equal_in_every_bit_is_accepted(tmp_path: Path) -> None:
    tensors = hub_tensors(SMALL)
    for name in (EMBEDDING, HEAD):
        tensors[name][0] = torch.nan
    model = weights.load(write_checkpoint(tmp_path / "nan", SMALL, tensors), config=SMALL)
    assert bool(model.embedding[0].isnan().all())
    tensors[EMBEDDING][1], tensors[HEAD][1] = 0.0, -0.0
    with pytest.raises(ValueError, match="differs from"):
        weights.load(write_checkpoint(tmp_path / "zero", SMALL, tensors), config=SMALL)


def test_an_untied_model_is_not_loaded_without_its_head_nor_with_another_shape(tmp_path: Path) -> None:
    tensors = hub_tensors(SMALL)
    folder = write_checkpoint(tmp_path / "a", SMALL, {**tensors, HEAD: tensors[HEAD][:-1].clone()})
    with pytest.raises(ValueError, match=r"lm_head\.weight: expected shape \[31, 16\], found \[30, 16\]"):
        weights.load(folder, config=SMALL)
    del tensors[HEAD]
    folder = write_checkpoint(tmp_path / "b", SMALL, tensors)
    with pytest.raises(ValueError, match=r"lm_head\.weight \[31, 16\] is missing"):
        weights.load(folder, config=UNTIED)


def explode() -> NoReturn:
    raise AssertionError("unpickled")


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return explode, ()


@pytest.mark.parametrize("content", ["pickle", "torch", "stub", "cut"])
def test_what_is_no_whole_safetensors_file_is_refused_and_never_unpickled(tmp_path: Path, content: str) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", SMALL, hub_tensors(SMALL))
    path = folder / MODEL_FILE
    if content == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif content == "torch":
        torch.save({"a": Bomb()}, path)
    else:
        path.write_bytes(path.read_bytes()[: -1 if content == "cut" else 7])
    message = re.escape(f"{path}: not a whole safetensors file: ")
    with pytest.raises(ValueError, match=message):
        weights.load(folder, config=SMALL)
    with pytest.raises(ValueError, match=message):
        weights.restore(path, like=qwen3.abstract(SMALL))
    with pytest.raises(ValueError, match=message):
        weights.verify(folder, manifest_of(folder, SMALL, tensors=25))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.safetensors: no such file"):
        weights.load(tmp_path, config=SMALL)
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        weights.read_config(tmp_path / CONFIG_FILE)


def test_a_checkpoint_is_read_without_any_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", SMALL, hub_tensors(SMALL))
    manifest = manifest_of(folder, SMALL, tensors=25)

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise AssertionError("network")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    found = weights.find(tmp_path / "checkpoint", manifest)
    weights.verify(found, manifest)
    model = weights.load(found, config=weights.read_config(found / CONFIG_FILE))
    weights.save(model, tmp_path / "saved", metadata={})
    assert_same_bits(weights.restore(tmp_path / "saved", like=qwen3.abstract(SMALL)), model)
    with pytest.raises(ValueError, match="hf download"):
        weights.find(tmp_path / "nowhere", manifest)


def written(folder: Path, values: object) -> Path:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("config", TIES)
def test_read_config_reads_both_spellings_of_the_rotary_base(tmp_path: Path, config: Qwen3Config) -> None:
    old = config_json(config)
    assert set(old) == set(json.loads(REAL_CONFIG))
    assert weights.read_config(written(tmp_path, old)) == config
    new = json.loads(qwen3.transformers_config(config).to_json_string()) | {"architectures": ["Qwen3ForCausalLM"]}
    assert "rope_theta" not in new
    assert weights.read_config(written(tmp_path, new)) == config
    assert weights.read_config(written(tmp_path, {**new, "rope_theta": 10000})) == config


DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "expected model_type='qwen3', found 'qwen2'"),
        ({"model_type": None}, "expected model_type='qwen3', found None"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "expected architectures=['Qwen3ForCausalLM'], found ['Qwen2ForC"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "expected architectures=['Qwen3ForCausalLM'], found ['Qwen3Moe"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "only rope_scaling=None is supported, found {'rope"),
        ({"use_sliding_window": True}, "only use_sliding_window=False is supported, found True"),
        ({"attention_bias": True}, "only attention_bias=False is supported, found True"),
        ({"attention_dropout": 0.1}, "only attention_dropout=0.0 is supported, found 0.1"),
        ({"hidden_act": "gelu"}, "only hidden_act='silu' is supported, found 'gelu'"),
        ({"quantization_config": {}}, "only quantization_config=None is supported, found {}"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "only layer_types=['full_attention', 'full_att"),
        ({"rope_parameters": {**DEFAULT_ROPE, "rope_type": "yarn"}}, "only rope_parameters={'rope_type': 'default', "),
        ({"rope_parameters": {**DEFAULT_ROPE, "factor": 2.0}}, "only rope_parameters={'rope_type': 'default', "),
        ({"rope_parameters": {**DEFAULT_ROPE, "rope_theta": 5.0}}, "rope_theta=10000 here, 5.0 in rope_parameters"),
        ({"rope_parameters": 3}, "expected rope_parameters to be an object, got 3"),
        ({"hidden_size": "16"}, "hidden_size: expected int, got '16'"),
        ({"num_key_value_heads": 3}, "Qwen3Config: num_attention_heads=4 is not a multiple of"),
    ],
)
def test_a_config_that_is_not_computed_here_is_refused_by_its_key(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = written(tmp_path, {**config_json(SMALL), **changes})
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        weights.read_config(path)


@pytest.mark.parametrize("key", ["architectures", "model_type", "rope_theta", "head_dim", "tie_word_embeddings"])
def test_a_config_without_a_needed_key_is_refused_by_its_key(tmp_path: Path, key: str) -> None:
    path = written(tmp_path, {name: value for name, value in config_json(SMALL).items() if name != key})
    with pytest.raises(ValueError, match=rf"config\.json: .*\b{key}\b"):
        weights.read_config(path)


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "expected a JSON object, found []")])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"config.json: {message}")):
        weights.read_config(tmp_path / CONFIG_FILE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", TIES)
def test_an_exported_model_is_the_checkpoint_that_transformers_saves(
    tmp_path: Path, config: Qwen3Config, dtype: torch.dtype
) -> None:
    model = weights.load(write_checkpoint(tmp_path / "in", config, hub_tensors(config, dtype=dtype)), config=config)
    weights.save_hub(model, tmp_path / "out", config=config)
    tokens = tokens_of(config)
    ours = qwen3.forward(model, tokens, (), config=config, moe=None).logits
    expected = logits_of(tmp_path / "out", tokens)
    assert expected.dtype == dtype
    assert relative_error(ours, expected) <= tolerance(dtype, terms=20 * config.num_hidden_layers, slack=1.0)
    hub = Qwen3ForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    hub.save_pretrained(tmp_path / "again")
    theirs, saved = (load_file(tmp_path / name / MODEL_FILE) for name in ("again", "out"))
    assert theirs.keys() == saved.keys()
    assert all(torch.equal(theirs[name], saved[name]) for name in theirs)
    for name in ("again", "out"):
        assert weights.read_config(tmp_path / name / CONFIG_FILE) == config
        assert_same_bits(weights.load(tmp_path / name, config=config), model)


def test_only_a_dense_model_of_the_architecture_is_exported(tmp_path: Path) -> None:
    model = any_bits(SMALL, dtype=torch.float32, seed=0)
    with pytest.raises(ValueError, match="expected a dense model"):
        weights.save_hub(carve.carve(model, num_experts=10), tmp_path / "out", config=SMALL)
    with pytest.raises(ValueError, match=r"save_hub: lm_head\.weight \[31, 16\] is missing"):
        weights.save_hub(model, tmp_path / "out", config=UNTIED)
    assert not (tmp_path / "out").exists()
