"""A checkpoint in exactly the format of the real Qwen3-0.6B with random weights, for trying the full size offline.

`uv run experiments/make_checkpoint.py DIR` writes 1.5 GB: `DIR/qwen3-0.6b` with 311 tensors in bfloat16 (the tied head
stored twice), the real `config.json` and `generation_config.json` to the byte and a tokenizer of Qwen3's kind with its
special tokens in their places, and `DIR/weights_manifest.toml`, which describes them. Then
`uv run experiments/run.py qwen3-0.6b --checkpoint.folder DIR --checkpoint.manifest DIR/weights_manifest.toml` runs.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import tyro
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from experiments import noise
from experiments.command import exit_status
from experiments.presets import QWEN3_06B
from onn import check, data, qwen3, storage, tree, weights
from onn.qwen3 import Qwen3Config

REAL_CONFIG = """{
  "architectures": [
    "Qwen3ForCausalLM"
  ],
  "attention_bias": false,
  "attention_dropout": 0.0,
  "bos_token_id": 151643,
  "eos_token_id": 151645,
  "head_dim": 128,
  "hidden_act": "silu",
  "hidden_size": 1024,
  "initializer_range": 0.02,
  "intermediate_size": 3072,
  "max_position_embeddings": 40960,
  "max_window_layers": 28,
  "model_type": "qwen3",
  "num_attention_heads": 16,
  "num_hidden_layers": 28,
  "num_key_value_heads": 8,
  "rms_norm_eps": 1e-06,
  "rope_scaling": null,
  "rope_theta": 1000000,
  "sliding_window": null,
  "tie_word_embeddings": true,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.51.0",
  "use_cache": true,
  "use_sliding_window": false,
  "vocab_size": 151936
}"""
GENERATION_CONFIG = """{
    "bos_token_id": 151643,
    "do_sample": true,
    "eos_token_id": [
        151645,
        151643
    ],
    "pad_token_id": 151643,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "transformers_version": "4.51.0"
}"""
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
ADDED = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)
"""Tokens beside the special ones that text may spell."""
UNUSED_ROWS = 151936 - 151643 - len(SPECIAL) - len(ADDED)
"""Rows of the embedding that belong to no token."""
MERGES = 2000
"""Tokens learnt from text; the rest of the vocabulary are names that no text gives."""
CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def make(folder: Path, *, name: str, architecture: Qwen3Config, seed: int) -> Path:
    """Write `folder / name` and the manifest that describes it, `folder / "weights_manifest.toml"`.

    Returns:
        The manifest.

    Raises:
        ValueError: the vocabulary is too small for the bytes and Qwen3's added tokens.
    """
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    (place / weights.CONFIG_FILE).write_text(config_text(architecture), encoding="utf-8")
    (place / "generation_config.json").write_text(GENERATION_CONFIG, encoding="utf-8")
    write_tokenizer(place, vocabulary=architecture.vocab_size - UNUSED_ROWS)
    tensors = random_tensors(architecture, seed=seed)
    storage.write(tensors, place / weights.MODEL_FILE, {"format": "pt"})
    manifest = folder / "weights_manifest.toml"
    manifest.write_text(manifest_text(place, architecture, tensors=len(tensors)), encoding="utf-8")
    return manifest


def config_text(architecture: Qwen3Config) -> str:
    """`config.json` as the real one has it: of the real architecture, to the byte."""
    values = asdict(architecture) | {"rope_theta": int(architecture.rope_theta)}
    return json.dumps({name: values.get(name, value) for name, value in json.loads(REAL_CONFIG).items()}, indent=2)


def random_tensors(architecture: Qwen3Config, *, seed: int) -> dict[str, Tensor]:
    """An initial model in bfloat16 under transformers' names; a tied head is there as well, and the same tensor."""
    source, scale = noise.generator(seed), architecture.initializer_range

    def drawn(leaf: Tensor) -> Tensor:
        if leaf.ndim == 1:
            return torch.ones(leaf.shape, dtype=torch.bfloat16)
        return torch.empty(leaf.shape, dtype=torch.bfloat16).normal_(std=scale, generator=source)

    model = tree.map1(drawn, qwen3.abstract(architecture))
    tensors = dict(zip(weights.hub_names(model), tree.leaves(model), strict=True))
    return {**tensors, "lm_head.weight": model.head[0] if model.head else model.embedding}


def write_tokenizer(folder: Path, *, vocabulary: int) -> None:
    """`tokenizer.json` and `tokenizer_config.json`: byte-level BPE after Qwen3's splits, its added tokens at the end.

    Args:
        folder: where to.
        vocabulary: tokens, added ones included.
    """
    base = vocabulary - len(SPECIAL) - len(ADDED)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    check.at_least("write_tokenizer", "vocabulary", base, len(alphabet))
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    trainer = trainers.BpeTrainer(vocab_size=min(base, MERGES), initial_alphabet=alphabet, show_progress=False)
    corpus = data.embedded_corpus(bytes_per_domain=50_000, held_out=0.0, seed=0)
    learnt.train_from_iterator([data.ByteTokenizer().decode(text) for text in corpus.train], trainer)
    content = json.loads(learnt.to_str())
    known = content["model"]["vocab"]
    vocab = {**known, **{f"<|unused_{place}|>": place for place in range(len(known), base)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(pair) for pair in content["model"]["merges"]]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = learnt.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in ADDED])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def manifest_text(folder: Path, architecture: Qwen3Config, *, tensors: int) -> str:
    """What `weights_manifest.toml` says of a checkpoint: its files as they are now, and that nobody published them."""
    facts = {"repository": f"nobody/random-{folder.name}", "revision": "0" * 40, "license": "CC0-1.0"}
    lines = [f'["{folder.name}"]', *(f'{name} = "{value}"' for name, value in facts.items())]
    lines += ['dtype = "bfloat16"', f"tensors = {tensors}", "", f'["{folder.name}".architecture]']
    lines += [f"{name} = {json.dumps(value)}" for name, value in asdict(architecture).items()]
    for path in sorted(folder.iterdir()):
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        lines += ["", f'["{folder.name}".files."{path.name}"]', f"bytes = {path.stat().st_size}"]
        lines.append(f'sha256 = "{digest}"')
    return "\n".join(lines) + "\n"


def main(folder: tyro.conf.Positional[Path], seed: int = 0) -> None:
    """Write a random checkpoint in the format of Qwen3-0.6B, and its manifest, into a folder."""
    print(make(folder, name=QWEN3_06B.preset, architecture=QWEN3_06B.model, seed=seed))


if __name__ == "__main__":
    sys.exit(exit_status(lambda: tyro.cli(main)))
