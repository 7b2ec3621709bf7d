"""Small checkpoints in exactly the format of the real one, made by transformers, and manifests that describe them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3ForCausalLM

from experiments.make_checkpoint import config_text
from onn import qwen3, tree, weights
from onn.qwen3 import Model, Qwen3Config
from onn.tree import Tree

NAME, REPOSITORY, REVISION = "small", "Somebody/Small-1", "0123456789abcdef0123456789abcdef01234567"

SMALL = Qwen3Config(
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
    initializer_range=0.02,
    tie_word_embeddings=True,
)
UNTIED = replace(SMALL, tie_word_embeddings=False)


def assert_same_bits(got: Tree, expected: Tree) -> None:
    """Every leaf has the same name, dtype, shape and bytes."""
    assert tree.paths(got) == tree.paths(expected)
    for name, a, b in zip(tree.paths(got), tree.leaves(got), tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8)), name


def any_bits(config: Qwen3Config, *, dtype: torch.dtype, seed: int) -> Model:
    """Parameters of arbitrary bits: NaN of every payload, infinities, signed zeros and subnormals among them."""
    source = torch.Generator().manual_seed(seed)

    def drawn(leaf: Tensor) -> Tensor:
        raw = torch.randint(256, (*leaf.shape[:-1], leaf.shape[-1] * dtype.itemsize), generator=source)
        return raw.to(torch.uint8).view(dtype)

    return tree.map1(drawn, qwen3.abstract(config))


def config_json(config: Qwen3Config) -> dict[str, object]:
    """The real `config.json` with the values of another architecture."""
    values: dict[str, object] = json.loads(config_text(config))
    return values


def hub_tensors(config: Qwen3Config, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """Random parameters, norms included, under the names of transformers' own model; a tied head is a copy."""
    hub = Qwen3ForCausalLM(qwen3.transformers_config(config))
    source = torch.Generator().manual_seed(seed)
    for parameter in hub.parameters():
        noise = torch.randn(parameter.shape, generator=source)
        parameter.data = 1 + 0.1 * noise if noise.ndim == 1 else noise / noise.shape[-1] ** 0.5
    return {name: tensor.to(dtype, copy=True) for name, tensor in hub.state_dict().items()}


def write_checkpoint(folder: Path, config: Qwen3Config, tensors: Mapping[str, Tensor]) -> Path:
    """`config.json` and `model.safetensors` in a new folder."""
    folder.mkdir(parents=True)
    (folder / weights.CONFIG_FILE).write_text(json.dumps(config_json(config), indent=2))
    save_file(dict(tensors), folder / weights.MODEL_FILE, metadata={"format": "pt"})
    return folder


def write_shards(folder: Path, config: Qwen3Config, tensors: Mapping[str, Tensor]) -> Path:
    """The same in two files and their index, the tensors dealt out by turns."""
    write_checkpoint(folder, config, tensors)
    (folder / weights.MODEL_FILE).unlink()
    shards = {f"model-0000{i + 1}-of-00002.safetensors": sorted(tensors)[i::2] for i in range(2)}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in shards.items() for name in names}}
    (folder / weights.INDEX_FILE).write_text(json.dumps(index))
    return folder


def manifest_text(folder: Path, config: Qwen3Config, *, tensors: int) -> str:
    """A manifest of what is in a folder now, without the size of `config.json`."""
    lines = [f"[{NAME}]", f'repository = "{REPOSITORY}"', f'revision = "{REVISION}"', 'license = "Apache-2.0"']
    lines += ['dtype = "bfloat16"', f"tensors = {tensors}", f"[{NAME}.architecture]"]
    lines += [f"{name} = {json.dumps(value)}" for name, value in asdict(config).items()]
    for path in sorted(folder.iterdir()):
        lines.append(f'[{NAME}.files."{path.name}"]')
        if path.name != weights.CONFIG_FILE:
            lines.append(f"bytes = {path.stat().st_size}")
        lines.append(f'sha256 = "{hashlib.sha256(path.read_bytes()).hexdigest()}"')
    return "\n".join(lines) + "\n"


def manifest_of(folder: Path, config: Qwen3Config, *, tensors: int) -> weights.Manifest:
    """`manifest_text`, written beside the folder and read."""
    path = folder.parent / "manifest.toml"
    path.write_text(manifest_text(folder, config, tensors=tensors))
    return weights.read_manifest(path, NAME)
