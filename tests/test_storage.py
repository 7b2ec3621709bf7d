"""Trees in safetensors files: what is saved is restored to the bit, whole files alone, and errors name the tensor."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from onn import carve, qwen3, tree, weights
from onn.qwen3 import Model, Qwen3Config
from onn.tree import Tree
from tests.checkpoints import SMALL, UNTIED, any_bits, assert_same_bits
from tests.support import normal


def of_kind(model: Model, kind: str) -> Model:
    if kind == "dense":
        return model
    carved = carve.carve(model, num_experts=10)
    return carved if kind == "carved" else carved._replace(layers=(model.layers[0], *carved.layers[1:]))


@given(
    kind=st.sampled_from(["dense", "carved", "mixed"]),
    config=st.sampled_from([SMALL, UNTIED]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**20),
)
def test_restore_undoes_save_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, kind: str, config: Qwen3Config, dtype: torch.dtype, seed: int
) -> None:
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    model = of_kind(any_bits(config, dtype=dtype, seed=seed), kind)
    weights.save(model, path, metadata={"seed": str(seed), "kind": kind})
    restored = weights.restore(path, like=of_kind(qwen3.abstract(config), kind))
    assert_same_bits(restored, model)
    with safe_open(path, framework="pt") as reader:
        assert reader.metadata() == {"seed": str(seed), "kind": kind}
    assert sorted(load_file(path)) == sorted(tree.paths(model))


def test_views_and_shared_memory_are_saved_by_value(tmp_path: Path) -> None:
    buffer = normal(0, 12, 5)
    parts: dict[str, Tree] = {
        "whole": buffer,
        "same": buffer,
        "transposed": buffer.mT,
        "overlapping": buffer[2:9],
        "strided": buffer[::2, 1:3],
        "broadcast": buffer[0].expand(3, 5),
        "graph": buffer.clone().requires_grad_(),
        "empty": buffer[:0],
        "scalar": buffer[3, 3],
    }
    weights.save(parts, tmp_path / "parts", metadata={})
    restored = weights.restore(tmp_path / "parts", like=parts)
    for got, expected in zip(tree.leaves(restored), tree.leaves(parts), strict=True):
        assert torch.equal(got, expected)
        assert not got.requires_grad
    places = [leaf.data_ptr() for leaf in tree.leaves(restored) if leaf.numel()]
    assert len(places) == len(set(places))


def test_saving_changes_nothing_and_replaces_a_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    first, second = (normal(seed, 4, 3) for seed in (0, 1))
    kept = first.clone()
    weights.save({"a": first}, path, metadata={})
    assert torch.equal(first, kept)
    with pytest.raises(NotImplementedError, match="meta"):
        weights.save({"a": torch.empty(2, device="meta")}, path, metadata={})
    with pytest.raises(ValueError, match="expected strings in metadata, got \\('step', 3\\)"):
        weights.save({"a": second}, path, metadata={"step": 3})  # type: ignore[dict-item]
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert torch.equal(weights.restore(path, like={"a": first})["a"], first)
    events: list[str] = []
    flush, rename = os.fsync, Path.replace

    def flushed(descriptor: int) -> None:
        events.append("flush")
        flush(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        events.append(f"{self.name} to {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    weights.save({"a": second}, path, metadata={})
    assert events == ["flush", "model.partial to model", "flush"]
    assert torch.equal(weights.restore(path, like={"a": first})["a"], second)
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    with pytest.raises(ValueError, match="gone: no such folder"):
        weights.save({"a": second}, tmp_path / "gone" / "model", metadata={})


def test_restore_names_the_first_tensor_that_differs(tmp_path: Path) -> None:
    path, template = tmp_path / "moe.safetensors", qwen3.abstract(SMALL)
    weights.save(carve.carve(any_bits(SMALL, dtype=torch.bfloat16, seed=0), num_experts=10), path, metadata={})
    for like, message in (
        (template, "layers.0.mlp.gate [40, 16] is missing"),
        (
            carve.carve(template, num_experts=20),
            "layers.0.mlp.experts.gate: expected shape [20, 2, 16], found [10, 4, 16]",
        ),
        (
            carve.carve(qwen3.abstract(replace(SMALL, num_hidden_layers=1)), num_experts=10),
            "layers.1.attention.k [12, 16] is not expected",
        ),
        (carve.carve(qwen3.abstract(UNTIED), num_experts=10), "head.0 [31, 16] is missing"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
            weights.restore(path, like=like)
