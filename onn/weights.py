"""Qwen3 checkpoints on disk: found, verified against a manifest, read, and written as transformers writes them.

Nothing comes from a network: an error says which command fetches the files by hand. Only safetensors is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, cast

from onn import check, qwen3, storage, tree
from onn.config import Value, from_dict, parse_json, read_text
from onn.qwen3 import Model, Qwen3Config
from onn.storage import Shapes
from onn.storage import restore as restore
from onn.storage import save as save

CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
"""Lists the files of a checkpoint that has several."""

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_HUB_NAMES = MappingProxyType({"embedding": _EMBEDDING, "norm": "model.norm.weight", "head.0": _HEAD})
_HUB_LAYER_NAMES = MappingProxyType(
    {
        "input_norm": "input_layernorm",
        "attention.q": "self_attn.q_proj",
        "attention.k": "self_attn.k_proj",
        "attention.v": "self_attn.v_proj",
        "attention.o": "self_attn.o_proj",
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "post_attention_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }
)
_ARCHITECTURE = "Qwen3ForCausalLM"
_SUPPORTED: Mapping[str, object] = MappingProxyType(
    {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "quantization_config": None,
        "rope_scaling": None,
        "use_sliding_window": False,
    }
)
"""Keys of `config.json` that may be absent, each with the one value that this library computes."""
_MISSING = "missing"
_TOKENIZER_FILES = ("added_tokens.json", "special_tokens_map.json")
"""What transformers reads beside `tokenizer.json` and `tokenizer_config.json` where it is there."""
_STORED_DTYPES = MappingProxyType({"bfloat16": "BF16", "float16": "F16", "float32": "F32"})


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """One file of a checkpoint."""

    bytes: int | None
    """`None`, or absent from the manifest, where it is not known."""
    sha256: str

    def __post_init__(self) -> None:
        """Refuse what is no size or no hash."""
        if self.bytes is not None:
            check.at_least("File", "bytes", self.bytes, 1)
        check.require(
            re.fullmatch("[0-9a-f]{64}", self.sha256) is not None,
            f"File: expected 64 lower-case hexadecimal digits, got sha256={check.shown(self.sha256)}.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What a checkpoint is, whatever files it is in."""

    repository: str
    """`owner/name` on the Hugging Face hub."""
    revision: str
    """A commit: 40 hexadecimal digits."""
    license: str
    dtype: Literal["bfloat16", "float16", "float32"]
    tensors: int
    """How many are stored: with tied embeddings, one more than needed where `lm_head.weight` is a copy."""
    architecture: Qwen3Config

    def __post_init__(self) -> None:
        """Refuse facts that cannot be those of one checkpoint."""
        for name, form in (("repository", r"[\w.-]+/[\w.-]+"), ("revision", "[0-9a-f]{40}")):
            value = getattr(self, name)
            check.require(re.fullmatch(form, value) is not None, f"Checkpoint: malformed {name}={check.shown(value)}.")
        needed = len(_hub_shapes(self.architecture))
        copied = self.architecture.tie_word_embeddings and self.tensors == needed + 1
        check.require(
            self.tensors == needed or copied,
            f"Checkpoint: expected tensors={needed} of this architecture, got {check.shown(self.tensors)}.",
        )

    @property
    def shapes(self) -> Shapes:
        """Of every tensor stored, under transformers' names."""
        shapes = _hub_shapes(self.architecture)
        return shapes if len(shapes) == self.tensors else {**shapes, _HEAD: shapes[_EMBEDDING]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """One model of `weights_manifest.toml`."""

    name: str
    checkpoint: Checkpoint
    files: Mapping[str, File]


def read_manifest(path: Path, name: str) -> Manifest:
    """What a manifest states about the model `name`.

    Raises:
        ValueError: no such file or model, or a value unknown, missing, malformed or of another type; the message names
            the file, the model and the key.
    """
    text = read_text(path)
    try:
        models = cast("dict[str, Value]", tomllib.loads(text))
    except ValueError as error:
        raise ValueError(f"{path}: not TOML: {error}.") from error
    except RecursionError as error:
        raise ValueError(f"{path}: not TOML: nested too deeply.") from error
    check.one_of(str(path), "model", name, models)
    where = f"{path}: {name}"
    values = dict(_table(models[name], where))
    check.require("files" in values, f"{where}: missing 'files'.")
    files = _table(values.pop("files"), f"{where}: files")
    for file in files:
        check.require(_plain(file), f"{where}: files: expected plain names, got {check.shown(file)}.")
    return Manifest(
        name=name,
        checkpoint=from_dict(Checkpoint, values, where=where),
        files={
            file: from_dict(File, {"bytes": None, **_table(facts, f"{where}: {file}")}, where=f"{where}: {file}")
            for file, facts in files.items()
        },
    )


def _plain(name: object) -> bool:
    """Whether this is the name of a file in a folder, and nothing but that."""
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,254}", name) is not None


def _table(value: Value, where: str) -> Mapping[str, Value]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a table, got {check.shown(value)}.")
    return value


def fetch_command(manifest: Manifest, folder: Path, *, force: bool) -> str:
    """The command that fetches a checkpoint by hand.

    Args:
        manifest: which checkpoint.
        folder: where it shall be: any folder, or a snapshot in the layout of the Hugging Face cache.
        force: fetch files that are there as well.
    """
    cached = folder.parent.name == "snapshots"
    place = ("--cache-dir", str(folder.parents[2])) if cached else ("--local-dir", str(folder))
    source = (manifest.checkpoint.repository, "--revision", manifest.checkpoint.revision)
    return shlex.join(("uv", "run", "hf", "download", *source, *place, *(("--force-download",) if force else ())))


def find(folder: Path, manifest: Manifest) -> Path:
    """The folder with all files of a manifest: `folder` itself, one of the model's name inside, or a snapshot in the
    layout of the Hugging Face cache inside (`models--owner--name/snapshots/revision`, also below `hub`).

    Raises:
        ValueError: no place has all of them; the message says what each place lacks and how to fetch it.
    """
    checkpoint = manifest.checkpoint
    cached = Path(f"models--{checkpoint.repository.replace('/', '--')}", "snapshots", checkpoint.revision)
    places = (folder, folder / manifest.name, folder / cached, folder / "hub" / cached)
    lacking = {place: [name for name in manifest.files if not (place / name).is_file()] for place in places}
    complete = [place for place, names in lacking.items() if not names]
    if complete:
        return complete[0]
    looked = "".join(
        f"\n- {place} lacks {'all' if len(names) == len(manifest.files) else ', '.join(names)}"
        for place, names in lacking.items()
    )
    raise ValueError(
        f"find: {checkpoint.repository} needs {', '.join(manifest.files)}.{looked}\n"
        f"Fetch it by hand: {fetch_command(manifest, folder / manifest.name, force=False)}"
    )


def verify(folder: Path, manifest: Manifest) -> None:
    """Check a checkpoint: every file exists, with the size and the hash of the manifest; `config.json` and the names,
    shapes and dtypes of the tensors are those of the manifest's architecture; and no file that it does not list would
    change the tokenizer.

    Raises:
        ValueError: which file, what was expected, what was found, and the command that fetches it.
    """
    problems = {name: problem for name, file in manifest.files.items() if (problem := _problem(folder / name, file))}
    if not problems:
        try:
            _verify_content(folder, manifest)
        except ValueError as error:
            problems = {"content": str(error)}
    checkpoint, damaged = manifest.checkpoint, any(problem != _MISSING for problem in problems.values())
    check.require(
        not problems,
        f"verify: {folder} is not {checkpoint.repository} of revision {checkpoint.revision}."
        + "".join(f"\n- {name}: {problem}" for name, problem in problems.items())
        + f"\nFetch it by hand: {fetch_command(manifest, folder, force=damaged)}",
    )


def _problem(path: Path, file: File) -> str:
    if not path.is_file():
        return _MISSING
    size = path.stat().st_size
    if file.bytes is not None and size != file.bytes:
        return f"{'truncated' if size < file.bytes else 'too long'}: expected {file.bytes} bytes, found {size}"
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != file.sha256:
        return f"damaged, or of another revision: expected sha256 {file.sha256}, found {found}"
    return ""


def _verify_content(folder: Path, manifest: Manifest) -> None:
    checkpoint, model_files = manifest.checkpoint, _model_files(folder)
    unseen = [folder / name for name in _TOKENIZER_FILES if (folder / name).exists()]
    for file in (folder / CONFIG_FILE, *model_files, *unseen):
        check.require(file.name in manifest.files, f"the manifest of {manifest.name} does not list {file.name}.")
    config, expected = read_config(folder / CONFIG_FILE), checkpoint.architecture
    check.require(config == expected, f"{CONFIG_FILE}: expected {expected}, found {config}.")
    stored = storage.headers(model_files)
    storage.check_shapes(str(folder), storage.shapes(stored), checkpoint.shapes)
    dtype = _STORED_DTYPES[checkpoint.dtype]
    for tensor in stored.values():
        check.require(
            tensor.dtype == dtype, f"{tensor.file}: {tensor.name}: expected dtype {dtype}, found {tensor.dtype}."
        )


def read_config(path: Path) -> Qwen3Config:
    """The architecture in a `config.json` of transformers, version 4 or 5.

    Raises:
        ValueError: not Qwen3's, a key is missing or of another type, or a value is one that this library does not
            compute; the message names the key.
    """
    values = _json(path)
    for key, identity in (("model_type", "qwen3"), ("architectures", [_ARCHITECTURE])):
        check.require(
            values.get(key) == identity, f"{path}: expected {key}={identity!r}, found {check.shown(values.get(key))}."
        )
    known = {field.name for field in dataclasses.fields(Qwen3Config)}
    chosen = {key: value for key, value in values.items() if key in known} | _rope_theta(values, path)
    config = from_dict(Qwen3Config, cast("Mapping[str, Value]", chosen), where=str(path))
    for key, supported in {**_SUPPORTED, "layer_types": ["full_attention"] * config.num_hidden_layers}.items():
        found = values.get(key, supported)
        check.require(found == supported, f"{path}: only {key}={supported!r} is supported, found {check.shown(found)}.")
    return config


def _rope_theta(values: Mapping[str, object], path: Path) -> dict[str, object]:
    parameters = values.get("rope_parameters")
    if parameters is None:
        return {}
    check.require(
        isinstance(parameters, dict),
        f"{path}: expected rope_parameters to be an object, got {check.shown(parameters)}.",
    )
    assert isinstance(parameters, dict)
    theta = parameters.get("rope_theta")
    supported = {"rope_type": "default", "rope_theta": theta}
    check.require(
        parameters == supported, f"{path}: only rope_parameters={supported!r} is supported, found {parameters!r}."
    )
    top = values.get("rope_theta", theta)
    check.require(top == theta, f"{path}: rope_theta={top!r} here, {theta!r} in rope_parameters.")
    return {"rope_theta": theta}


def _json(path: Path) -> dict[str, object]:
    values = parse_json(read_text(path), where=str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found {check.shown(values)}.")
    return values


def hub_names(model: Model) -> list[str]:
    """transformers' name of every parameter of a dense model, in the order of `tree.leaves`.

    Raises:
        ValueError: a layer is carved; transformers' Qwen3 has no experts.
    """

    def name(path: str) -> str:
        if path in _HUB_NAMES:
            return _HUB_NAMES[path]
        _, index, part = path.split(".", 2)
        check.require(part in _HUB_LAYER_NAMES, f"hub_names: expected a dense model, found {path}.")
        return f"model.layers.{index}.{_HUB_LAYER_NAMES[part]}.weight"

    return [name(path) for path in tree.paths(model)]


def _hub_shapes(config: Qwen3Config) -> Shapes:
    template = qwen3.abstract(config)
    return {name: leaf.shape for name, leaf in zip(hub_names(template), tree.leaves(template), strict=True)}


def load(folder: Path, *, config: Qwen3Config) -> Model:
    """A dense model from a checkpoint of transformers, in its dtype. It does not `verify`.

    Every tensor has memory of its own, writable and independent of the file, and no second copy of the model is made. A
    tied head that is stored all the same is compared with the embedding, bit for bit, and dropped.

    Args:
        folder: with `model.safetensors`, or with the files that `model.safetensors.index.json` lists.
        config: `read_config` of the same folder.

    Raises:
        ValueError: a file is missing or broken, a tensor missing, not expected, of another shape or dtype than the
            others or not floating, the head another than the embedding.
    """
    stored, needed = storage.headers(_model_files(folder)), _hub_shapes(config)
    copied = config.tie_word_embeddings and _HEAD in stored
    storage.check_shapes(
        str(folder), storage.shapes(stored), {**needed, _HEAD: needed[_EMBEDDING]} if copied else needed
    )
    dtypes = {tensor.dtype: f"{tensor.dtype} ({name})" for name, tensor in stored.items()}
    check.require(
        len(dtypes) == 1 and dtypes.keys() <= storage.FLOATS,
        f"{folder}: expected tensors of one floating dtype, found {', '.join(dtypes.values())}.",
    )
    check.require(
        not copied or storage.same_bits(stored[_HEAD], stored[_EMBEDDING]),
        f"{folder}: {_HEAD} differs from {_EMBEDDING}, to which {CONFIG_FILE} ties it.",
    )
    return tree.unflatten(qwen3.abstract(config), [storage.read(stored[name]) for name in needed])


def _model_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if (folder / MODEL_FILE).is_file() or not index.is_file():
        return [folder / MODEL_FILE]
    weight_map = _json(index).get("weight_map")
    check.require(
        isinstance(weight_map, dict), f"{index}: expected an object weight_map, found {check.shown(weight_map)}."
    )
    assert isinstance(weight_map, dict)
    for name in weight_map.values():
        check.require(_plain(name), f"{index}: expected plain file names, found {check.shown(name)}.")
    return [folder / name for name in sorted(set(weight_map.values()))]


def save_hub(model: Model, folder: Path, *, config: Qwen3Config) -> None:
    """Write a dense model as transformers does: `config.json` and `model.safetensors`, a tied head not repeated.

    `Qwen3ForCausalLM.from_pretrained(folder)` reads it, and so does `load`.

    Raises:
        ValueError: a layer is carved, or the model is not of this architecture.
    """
    tensors = dict(zip(hub_names(model), tree.leaves(model), strict=True))
    storage.check_shapes("save_hub", {name: tensor.shape for name, tensor in tensors.items()}, _hub_shapes(config))
    reference = qwen3.transformers_config(config)
    reference.architectures = [_ARCHITECTURE]
    reference.dtype = model.embedding.dtype
    folder.mkdir(parents=True, exist_ok=True)
    storage.write(tensors, folder / MODEL_FILE, {"format": "pt"})
    (folder / CONFIG_FILE).write_text(reference.to_json_string(), encoding="utf-8")
