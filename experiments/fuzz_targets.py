"""What is fuzzed: every parser of the library, valid files to start from, and what its errors must name."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from experiments import fuzz_mutations as mutations
from experiments import keeping, presets
from experiments.evaluate import DomainFigures, Evaluation
from experiments.fuzz_mutations import Mutation
from experiments.keeping import Generators, Keeper, Position
from experiments.memory import Meter
from onn import checkpoint, config, documents, observe, qwen3, storage, train, tree, weights
from onn.qwen3 import Qwen3Config

SMALL = replace(
    presets.TINY.model,
    vocab_size=11,
    hidden_size=8,
    intermediate_size=40,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
KEPT = replace(presets.TINY, train=replace(presets.TINY.train, checkpoint_every=1))
STATE, FIGURES = (f"{keeping.FOLDER}/dense-{name}" for name in ("000003", "figures"))
OUTSIDE = "outside.safetensors"
"""Beside the folder, valid, and not to be read."""


class Target(NamedTuple):
    """One parser."""

    file: str
    """Where an input is written, in the folder that is given."""
    read: Callable[[Path], object]
    """Reads the folder."""
    seeds: Sequence[bytes]
    mutate: Mutation
    inputs: int
    """By default."""
    beside: Sequence[tuple[str, bytes]] = ()
    """Other files of the folder, never changed; `../` leads beside it."""
    named: Sequence[str] = ()
    """What an error must name, one of them, beside the file."""


def tensors(architecture: Qwen3Config, dtype: torch.dtype) -> dict[str, Tensor]:
    """Ones under transformers' names."""
    model = qwen3.abstract(architecture)
    named = zip(weights.hub_names(model), tree.leaves(model), strict=True)
    return {name: torch.ones(leaf.shape, dtype=dtype) for name, leaf in named}


def config_json(architecture: Qwen3Config) -> bytes:
    """What transformers writes."""
    reference = qwen3.transformers_config(architecture)
    reference.architectures = ["Qwen3ForCausalLM"]
    return reference.to_json_string().encode()


def manifest() -> bytes:
    """Of a model that is stored in two files."""
    digest = '"' + "0123456789abcdef" * 4 + '"'
    rows = ["[small]", 'repository = "Somebody/Small-1"', f'revision = "{"0123456789" * 4}"', 'license = "Apache-2.0"']
    rows += ['dtype = "bfloat16"', f"tensors = {len(tensors(SMALL, torch.bfloat16))}", "[small.architecture]"]
    rows += [f"{name} = {json.dumps(value)}" for name, value in asdict(SMALL).items()]
    for file in ("config.json", *SHARDS):
        rows += [f'[small.files."{file}"]', "bytes = 77", f"sha256 = {digest}"]
    return "\n".join(rows).encode()


def chats() -> list[bytes]:
    """Conversations of every role, one file and one line of them."""
    rows = [
        {
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"a{i}\n\U0001f642"}],
            "id": i,
        }
        for i in range(3)
    ]
    roles = [{"role": role, "content": f"as {role} \u00e9"} for role in documents.ROLES]
    tools = {"messages": [*roles, {"role": "tool", "content": "<|im_end|>"}, {"role": "assistant", "content": ""}]}
    whole = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate([*rows, tools])]
    return [
        "\n".join(whole).encode(),
        "\r\n".join([*whole[:2], ""]).encode(),
        b"\xef\xbb\xbf" + whole[3].encode() + b"\n" + whole[0].encode(),
    ]


def metrics() -> bytes:
    """Records of a run."""
    rows = [
        {"phase": phase, "step": step, "loss": 5.5 - step, "pi": None, "reborn": [0, 1], "nested": {"a": -1e-9}}
        for phase in ("dense", "moe")
        for step in range(3)
    ]
    return "".join(observe.encode(row, indent=None) + "\n" for row in rows).encode()


def tokenizer() -> bytes:
    """The smallest `tokenizer.json`."""
    vocabulary = {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}
    special = {"id": 3, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [special | {"normalized": False, "special": True}],
            "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
            "model": {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]]},
        }
    ).encode()


def read_manifest(folder: Path) -> object:
    """Read, look for its files, and check them."""
    found = weights.read_manifest(folder / "manifest.toml", "small")
    return weights.fetch_command(found, folder, force=True), found.checkpoint.shapes


def read_safetensors(folder: Path) -> object:
    """The header, a checkpoint of transformers, and a tree of ours."""
    storage.headers([folder / weights.MODEL_FILE])
    model = weights.load(folder, config=SMALL)
    assert {leaf.shape for leaf in tree.leaves(model)} == {leaf.shape for leaf in tree.leaves(qwen3.abstract(SMALL))}
    return model


def read_tree(folder: Path) -> object:
    """A tree of ours."""
    like = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.int64), "c": torch.zeros((), dtype=torch.bool)}
    restored = storage.restore(folder / "tree.safetensors", like=like)
    assert all(restored[name].shape == leaf.shape for name, leaf in like.items())
    return restored


def read_preset(folder: Path) -> object:
    """The configuration of a run."""
    path = folder / "config.json"
    values = config.parse_json(config.read_text(path), where=str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected an object.")
    return presets.load(values, where=str(path))


def read_corpus(file: str) -> Callable[[Path], object]:
    """Chats or text, as bytes, with some held out."""

    def read(folder: Path) -> object:
        found = documents.load_corpus(folder / file, documents.ByteTokenizer(), held_out=0.2)
        assert all(len(part) == len(mask) for part, mask in zip(found.train, found.train_mask, strict=True))
        return found

    return read


def read_metrics(folder: Path) -> object:
    """The records of a run."""
    return [observe.number(record, "step") for record in observe.read_jsonl(folder / "metrics.jsonl")]


def read_tokenizer(folder: Path) -> object:
    """Text and back."""
    found = documents.HubTokenizer(folder)
    return found.vocabulary


def keeper(folder: Path) -> Keeper:
    """Of a run that lies in the folder."""
    return Keeper(folder, KEPT, {"version": "1", "device": "cpu"}, Meter())


def kept_parts() -> tuple[qwen3.Model, Generators]:
    """What a checkpoint holds beside an optimizer."""
    model = tree.map1(lambda leaf: torch.ones(leaf.shape), qwen3.abstract(SMALL))
    return model, Generators(torch.zeros(4, dtype=torch.uint8), torch.ones(4, dtype=torch.uint8))


def kept() -> dict[str, bytes]:
    """The files of a run that has kept a state of a phase and an evaluation, by their paths."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / keeping.METRICS).write_bytes(metrics())
        writer, (model, generators) = keeper(folder), kept_parts()
        writer.keep_state("dense", train.init_state(model), Position(3, 6, 0), generators)
        row = DomainFigures(targets=5, loss=2.5, accuracy=0.25, tau=2.0, sparse=None)
        writer.keep_figures("dense", Evaluation(domains=("one", "two"), figures=(row, row)))
        found = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def read_kept(folder: Path) -> object:
    """The newest checkpoint, as a run that goes on takes it."""
    checkpoint.verify(folder / STATE)
    found = keeper(folder).state("dense", *kept_parts())
    assert found is not None
    assert found.position.step >= 0 <= found.position.records
    return found


def read_figures(folder: Path) -> object:
    """An evaluation."""
    checkpoint.verify(folder / FIGURES)
    found = keeper(folder).figures("dense")
    assert found is not None
    assert len(found.domains) == len(found.figures)
    return found


def sealed(data: bytes, rng: random.Random) -> bytes:
    """Mutate a checkpoint's manifest; mostly it is signed anew, so that what its seal protects is read."""
    mutated = mutations.json_text(data, rng)
    try:
        value = observe.decode(mutated.decode())
    except (ValueError, RecursionError):
        return mutated
    if not isinstance(value, dict) or rng.random() < 0.15:
        return mutated
    try:
        return checkpoint.sealed({key: child for key, child in value.items() if key != "sha256"}).encode()
    except (ValueError, RecursionError):
        return mutated


def targets() -> dict[str, Target]:
    """By name."""
    parts = tensors(SMALL, torch.bfloat16)
    names = sorted(parts)
    halves = [save({name: parts[name] for name in names[i::2]}, {"format": "pt"}) for i in range(2)]
    shards = list(zip(SHARDS, halves, strict=True))
    untied = {**parts, "lm_head.weight": parts["model.embed_tokens.weight"].clone()}
    index = {"metadata": {"total_size": 1}, "weight_map": {name: SHARDS[i % 2] for i, name in enumerate(names)}}
    runs = [json.dumps(presets.save(run)).encode() for run in presets.PRESETS.values()]
    stored = {"a": torch.ones(2, 3), "b": torch.arange(4), "c": torch.tensor(True)}
    architecture = json.loads(config_json(SMALL))
    old = {key: value for key, value in architecture.items() if key != "rope_parameters"} | {"rope_theta": 1e4}
    run = kept()
    manifests = {place: f"{place}/{checkpoint.MANIFEST}" for place in (STATE, FIGURES)}
    besides = {place: tuple(item for item in run.items() if item[0] != file) for place, file in manifests.items()}
    story = b"One line.\nAnother, \xc3\xa9\xf0\x9f\x99\x82.\r\n\r\nAnd a third.\n"
    return {
        "manifest": Target("manifest.toml", read_manifest, [manifest()], mutations.toml, 12_000),
        "safetensors": Target(
            weights.MODEL_FILE,
            read_safetensors,
            [save(parts), save(untied, {"format": "pt"}), save(tensors(SMALL, torch.float32))],
            mutations.safetensors,
            16_000,
            named=("folder",),
        ),
        "tree": Target("tree.safetensors", read_tree, [save(stored)], mutations.safetensors, 16_000),
        "index": Target(
            weights.INDEX_FILE,
            lambda folder: weights.load(folder, config=SMALL),
            [json.dumps(index).encode()],
            mutations.json_text,
            10_000,
            beside=(*shards, (f"../{OUTSIDE}", halves[0])),
            named=("folder",),
        ),
        "config": Target(
            "config.json",
            lambda folder: weights.read_config(folder / "config.json"),
            [config_json(SMALL), json.dumps(old).encode(), config_json(replace(SMALL, tie_word_embeddings=False))],
            mutations.json_text,
            10_000,
        ),
        "run": Target("config.json", read_preset, runs, mutations.json_text, 10_000),
        "chat": Target("chat.jsonl", read_corpus("chat.jsonl"), chats(), mutations.lines, 20_000),
        "text": Target("story.txt", read_corpus("story.txt"), [story, b"a\nb"], mutations.line_text, 10_000),
        "metrics": Target("metrics.jsonl", read_metrics, [metrics()], mutations.lines, 16_000),
        "checkpoint": Target(
            manifests[STATE], read_kept, [run[manifests[STATE]]], sealed, 8_000, besides[STATE], ("dense-000003",)
        ),
        "figures": Target(
            manifests[FIGURES],
            read_figures,
            [run[manifests[FIGURES]]],
            sealed,
            8_000,
            besides[FIGURES],
            ("dense-figures",),
        ),
        "tokenizer": Target(
            "tokenizer.json", read_tokenizer, [tokenizer()], mutations.json_text, 400, named=("HubTokenizer",)
        ),
    }
