"""Manifests, finding and verifying: every way in which a checkpoint on disk can be the wrong one."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.make_checkpoint import REAL_CONFIG
from experiments.presets import QWEN3_06B
from onn import qwen3, tree, weights
from onn.weights import CONFIG_FILE, INDEX_FILE, MODEL_FILE
from tests.checkpoints import (
    NAME,
    REPOSITORY,
    REVISION,
    SMALL,
    UNTIED,
    hub_tensors,
    manifest_of,
    manifest_text,
    write_checkpoint,
    write_shards,
)

REAL_MANIFEST = Path(__file__).parents[1] / "weights_manifest.toml"
SNAPSHOT = f"models--Somebody--Small-1/snapshots/{REVISION}"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"
STORED = 2 + 11 * SMALL.num_hidden_layers + 1

TENSORS = hub_tensors(SMALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", SMALL, TENSORS)


def refusal(folder: Path, manifest: weights.Manifest) -> str:
    with pytest.raises(ValueError, match=r"^verify: ") as caught:
        weights.verify(folder, manifest)
    return str(caught.value)


def test_the_real_manifest_describes_the_model_of_the_preset() -> None:
    manifest = weights.read_manifest(REAL_MANIFEST, QWEN3_06B.checkpoint.name)
    assert manifest.checkpoint.architecture == QWEN3_06B.model
    parameters = tree.leaves(qwen3.abstract(QWEN3_06B.model))
    assert manifest.checkpoint.tensors == len(manifest.checkpoint.shapes) == len(parameters) + 1 == 311
    assert list(manifest.checkpoint.shapes[HEAD]) == [151936, 1024]
    assert set(manifest.files) >= {MODEL_FILE, CONFIG_FILE, "tokenizer.json", "tokenizer_config.json"}
    assert QWEN3_06B.checkpoint.manifest == Path(REAL_MANIFEST.name)


def test_the_real_manifest_agrees_with_itself(tmp_path: Path) -> None:
    """The size follows from the names, shapes and dtype; the hash of `config.json` from the architecture."""
    manifest = weights.read_manifest(REAL_MANIFEST, "qwen3-0.6b")
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in sorted(manifest.checkpoint.shapes.items()):
        end = offset + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":")))
    assert manifest.files[MODEL_FILE].bytes == 8 + length + -length % 8 + offset
    path = tmp_path / CONFIG_FILE
    path.write_text(REAL_CONFIG)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == manifest.files[CONFIG_FILE].sha256
    assert path.stat().st_size == manifest.files[CONFIG_FILE].bytes
    assert weights.read_config(path) == manifest.checkpoint.architecture


def test_a_manifest_says_all_it_says(folder: Path) -> None:
    manifest = manifest_of(folder, SMALL, tensors=STORED)
    checkpoint = manifest.checkpoint
    assert (manifest.name, checkpoint.repository, checkpoint.revision) == (NAME, REPOSITORY, REVISION)
    assert (checkpoint.license, checkpoint.dtype, checkpoint.architecture) == ("Apache-2.0", "bfloat16", SMALL)
    assert {name: file.bytes for name, file in manifest.files.items()} == {
        CONFIG_FILE: None,
        MODEL_FILE: (folder / MODEL_FILE).stat().st_size,
    }


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("license", "licence", "small: unknown value 'licence'; did you mean 'license'?"),
        ('license = "Apache-2.0"\n', "", "small: missing 'license' of Checkpoint"),
        ("tensors = 25", 'tensors = "25"', "small: tensors: expected int, got '25'"),
        ("tensors = 25", "tensors = 23", "small: Checkpoint: expected tensors=24 of this architecture, got 23"),
        ("tensors = 25", "tensors = 26", "small: Checkpoint: expected tensors=24 of this architecture, got 26"),
        ('"bfloat16"', '"bf16"', "small: dtype: expected one of 'bfloat16', 'float16', 'float32', got 'bf16'"),
        (REVISION, "main", "small: Checkpoint: malformed revision='main'"),
        (REPOSITORY, "Small-1", "small: Checkpoint: malformed repository='Small-1'"),
        ("head_dim = 6\n", "", "small: architecture: missing 'head_dim' of Qwen3Config"),
        ("head_dim", "head_dims", "small: architecture: unknown value 'head_dims'; did you mean 'head_dim'?"),
        ("hidden_size = 16", "hidden_size = 1.5", "small: architecture: hidden_size: expected int, got 1.5"),
        (
            "hidden_size = 16",
            "hidden_size = 0",
            "small: architecture: Qwen3Config: expected 1 <= hidden_size=0 <= 4194304",
        ),
        ("sha256", "sha265", "small: config.json: unknown value 'sha265'; did you mean 'sha256'?"),
        (
            'sha256 = "',
            'sha256 = "0',
            "small: config.json: File: expected 64 lower-case hexadecimal digits, got sha256=",
        ),
        ("bytes = ", "bytes = -", "small: model.safetensors: File: expected bytes=-"),
        ("bytes = ", "size = ", "small: model.safetensors: unknown value 'size'"),
        ('files."config.json"', 'files."../config.json"', "small: files: expected plain names, got '../config.json'"),
        (".files.", ".file.", "small: missing 'files'"),
        (
            "[small.architecture]",
            "architecture = 3\n[other]",
            "small: architecture: expected the values of Qwen3Config",
        ),
        (
            '[small.files."config.json"]',
            '[small.files]\n"config.json" = 3\n[other]',
            "small: config.json: expected a table, got 3",
        ),
        ("[small", "[smell", "unknown model='small'; did you mean 'smell'?"),
        ("[small]", "[small", "not TOML"),
    ],
)
def test_a_malformed_manifest_names_file_model_and_key(folder: Path, old: str, new: str, message: str) -> None:
    path = folder.parent / "m.toml"
    text = manifest_text(folder, SMALL, tensors=STORED)
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        weights.read_manifest(path, NAME)


def test_a_manifest_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"m\.toml: no such file"):
        weights.read_manifest(tmp_path / "m.toml", NAME)


@pytest.mark.parametrize("place", [".", NAME, SNAPSHOT, f"hub/{SNAPSHOT}"])
@pytest.mark.parametrize("linked", [False, True])
def test_every_layout_is_found_and_verified(folder: Path, place: str, linked: bool) -> None:
    manifest, root = manifest_of(folder, SMALL, tensors=STORED), folder.parent / "root"
    target = root / place
    target.mkdir(parents=True)
    for path in folder.iterdir():
        if linked:
            blob = root / "blobs" / manifest.files[path.name].sha256
            blob.parent.mkdir(exist_ok=True)
            shutil.copy(path, blob)
            (target / path.name).symlink_to(blob)
        else:
            shutil.copy(path, target)
    found = weights.find(root, manifest)
    assert found == target
    weights.verify(found, manifest)
    assert len(tree.leaves(weights.load(found, config=SMALL))) == STORED - 1


def test_a_complete_place_is_preferred_to_an_incomplete_one(folder: Path) -> None:
    manifest, root = manifest_of(folder, SMALL, tensors=STORED), folder.parent / "root"
    shutil.copytree(folder, root / "hub" / SNAPSHOT)
    shutil.copytree(folder, root / NAME)
    (root / NAME / MODEL_FILE).unlink()
    assert weights.find(root, manifest) == root / "hub" / SNAPSHOT


def test_what_is_not_found_is_listed_with_where_and_how_to_fetch_it(folder: Path) -> None:
    manifest, root = manifest_of(folder, SMALL, tensors=STORED), folder.parent / "my weights"
    shutil.copytree(folder, root / NAME)
    (root / NAME / MODEL_FILE).unlink()
    (root / NAME / MODEL_FILE).symlink_to(root / "gone")
    with pytest.raises(ValueError, match=r"^find: ") as caught:
        weights.find(root, manifest)
    assert str(caught.value).splitlines() == [
        f"find: {REPOSITORY} needs {CONFIG_FILE}, {MODEL_FILE}.",
        f"- {root} lacks all",
        f"- {root / NAME} lacks {MODEL_FILE}",
        f"- {root / SNAPSHOT} lacks all",
        f"- {root / 'hub' / SNAPSHOT} lacks all",
        f"Fetch it by hand: uv run hf download {REPOSITORY} --revision {REVISION} --local-dir '{root / NAME}'",
    ]


def test_a_cache_is_fetched_as_a_cache(folder: Path) -> None:
    manifest = manifest_of(folder, SMALL, tensors=STORED)
    command = weights.fetch_command(manifest, Path("weights/hub") / SNAPSHOT, force=True)
    assert command == (
        f"uv run hf download {REPOSITORY} --revision {REVISION} --cache-dir weights/hub --force-download"
    )


def test_missing_and_damaged_files_are_all_listed_each_with_its_fault(folder: Path) -> None:
    for name in ("a.json", "b.json", "c.json", "d.json"):
        (folder / name).write_text(f"this is {name}")
    manifest = manifest_of(folder, SMALL, tensors=STORED)
    (folder / "a.json").unlink()
    (folder / "b.json").write_text("this is b.jso")
    (folder / "c.json").write_text("this is c.json!")
    (folder / "d.json").write_text("this is D.json")
    found, expected = (hashlib.sha256(f"this is {name}".encode()).hexdigest() for name in ("D.json", "d.json"))
    assert refusal(folder, manifest).splitlines() == [
        f"verify: {folder} is not {REPOSITORY} of revision {REVISION}.",
        "- a.json: missing",
        "- b.json: truncated: expected 14 bytes, found 13",
        "- c.json: too long: expected 14 bytes, found 15",
        f"- d.json: damaged, or of another revision: expected sha256 {expected}, found {found}",
        f"Fetch it by hand: uv run hf download {REPOSITORY} --revision {REVISION} --local-dir {folder} "
        "--force-download",
    ]


def test_only_damage_is_fetched_again_by_force(folder: Path) -> None:
    manifest = manifest_of(folder, SMALL, tensors=STORED)
    (folder / CONFIG_FILE).unlink()
    assert refusal(folder, manifest).endswith(f"--local-dir {folder}")


@given(data=st.data(), name=st.sampled_from([MODEL_FILE, CONFIG_FILE]))
def test_any_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str) -> None:
    folder = write_checkpoint(tmp_path_factory.mktemp("flip") / "checkpoint", SMALL, TENSORS)
    manifest = manifest_of(folder, SMALL, tensors=STORED)
    content = bytearray((folder / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1), label="byte")] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    (folder / name).write_bytes(content)
    assert f"- {name}: damaged" in refusal(folder, manifest)


def test_a_tied_checkpoint_without_a_head_is_accepted_where_the_count_says_so(tmp_path: Path) -> None:
    lean = {name: tensor for name, tensor in TENSORS.items() if name != HEAD}
    folder = write_checkpoint(tmp_path / "lean", SMALL, lean)
    weights.verify(folder, manifest_of(folder, SMALL, tensors=STORED - 1))
    assert f"{HEAD} [31, 16] is missing" in refusal(folder, manifest_of(folder, SMALL, tensors=STORED))
    full = write_checkpoint(tmp_path / "full", SMALL, TENSORS)
    assert f"{HEAD} [31, 16] is not expected" in refusal(full, manifest_of(full, SMALL, tensors=STORED - 1))


def test_an_untied_checkpoint_needs_its_head(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "untied", UNTIED, hub_tensors(UNTIED))
    weights.verify(folder, manifest_of(folder, UNTIED, tensors=STORED))


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def having(name: str, change: Callable[[Tensor], Tensor], source: str = UP) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: change(tensors[source]).clone()})


def renamed(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.upp_proj.weight"] = tensors.pop(UP)


WRONG_HEADERS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (without(UP), f"{UP} [40, 16] is missing."),
    "extra": (having("model.extra", lambda t: t), "model.extra [40, 16] is not expected."),
    "renamed": (renamed, f"{UP} [40, 16] is missing; did you mean 'model.layers.1.mlp.upp_proj.weight'?"),
    "shape": (having(UP, lambda t: t.mT.contiguous()), f"{UP}: expected shape [40, 16], found [16, 40]."),
    "bias": (having("model.layers.0.self_attn.q_proj.bias", lambda t: t), "q_proj.bias [40, 16] is not expected."),
}


@pytest.mark.parametrize(("change", "message"), WRONG_HEADERS.values(), ids=WRONG_HEADERS)
def test_a_header_of_another_architecture_is_refused_by_verify_and_load(
    folder: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    tensors = load_file(folder / MODEL_FILE)
    change(tensors)
    save_file(tensors, folder / MODEL_FILE, metadata={"format": "pt"})
    assert message in refusal(folder, manifest_of(folder, SMALL, tensors=STORED))
    with pytest.raises(ValueError, match=re.escape(message)):
        weights.load(folder, config=SMALL)


def test_another_dtype_is_refused(folder: Path) -> None:
    tensors = load_file(folder / MODEL_FILE)
    save_file({**tensors, UP: tensors[UP].half()}, folder / MODEL_FILE)
    message = refusal(folder, manifest_of(folder, SMALL, tensors=STORED))
    assert f"{UP}: expected dtype BF16, found F16" in message


def test_a_config_of_another_architecture_is_refused(folder: Path) -> None:
    manifest = manifest_of(folder, replace(SMALL, rope_theta=5.0), tensors=STORED)
    assert re.search(
        r"config\.json: expected .*rope_theta=5\.0.*, found .*rope_theta=10000\.0", refusal(folder, manifest)
    )


def test_nothing_is_read_that_the_manifest_does_not_list(folder: Path) -> None:
    manifest = manifest_of(folder, SMALL, tensors=STORED)
    for name in (MODEL_FILE, CONFIG_FILE):
        listed = {file: facts for file, facts in manifest.files.items() if file != name}
        assert f"the manifest of {NAME} does not list {name}" in refusal(folder, replace(manifest, files=listed))
    for name in ("added_tokens.json", "special_tokens_map.json"):
        (folder / name).write_text("{}")
        assert f"the manifest of {NAME} does not list {name}" in refusal(folder, manifest)
        (folder / name).unlink()


def test_several_files_are_verified_and_loaded_as_one(tmp_path: Path) -> None:
    sharded = write_shards(tmp_path / "sharded", SMALL, TENSORS)
    manifest = manifest_of(sharded, SMALL, tensors=STORED)
    weights.verify(weights.find(sharded, manifest), manifest)
    whole = weights.load(write_checkpoint(tmp_path / "whole", SMALL, TENSORS), config=SMALL)
    for got, expected in zip(tree.leaves(weights.load(sharded, config=SMALL)), tree.leaves(whole), strict=True):
        assert torch.equal(got, expected)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: no such file"):
        weights.load(sharded, config=SMALL)
    shutil.copy(sharded / "model-00001-of-00002.safetensors", sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: another file holds "):
        weights.load(sharded, config=SMALL)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {"a": "../b"}}])
def test_a_malformed_index_is_refused(tmp_path: Path, index: dict[str, object]) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json: expected (an object weight_map|plain file names), found"):
        weights.load(tmp_path, config=SMALL)
