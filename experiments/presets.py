"""Named runs of the main job. Every value stands here; any can be overridden on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch

from onn import calibration, check
from onn.config import Value, from_dict, to_dict
from onn.objective import (
    ConsolidationConfig,
    DensityConfig,
    DistillConfig,
    IntegrityConfig,
    MoeTraining,
    OptimConfig,
    RouterConfig,
    StepConfig,
)
from onn.observe import Json, decode
from onn.qwen3 import MoeConfig, Qwen3Config
from onn.tiling import tiling_name

VERSION = 5
"""Of saved configurations; `load` upgrades older ones."""

_ADDED: Mapping[int, Mapping[str, Mapping[str, Value]]] = MappingProxyType(
    {
        2: {
            "sparse": {"distill": {"weight": 0.0, "temperature": 1.0}},
            "sparse.moe": {"route": "threshold", "top_k": 1, "normalise": True},
        },
        3: {"train": {"checkpoint_every": 0, "checkpoints_kept": 2, "on_non_finite": "skip", "max_skipped": 0}},
        4: {"sparse": {"optimizer": "adamw", "consolidation": {"lr": 0.03, "damping": 1.0, "eps": 1e-8}}},
        5: {"sparse": {"regime": "everything"}},
    }
)
"""The values that each version added, by the part that holds them, and what was done before they could be chosen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Where a pretrained model comes from. Nothing is ever fetched from a network."""

    name: str
    """A model of `weights_manifest.toml`; empty trains a dense model first."""
    manifest: Path
    folder: Path
    """A plain folder, or one with the Hugging Face cache layout inside."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The text."""

    path: Path | None
    """Text (a file or a folder) or chat JSONL; without it the embedded corpus."""
    bytes_per_domain: int
    """Training text of each embedded domain."""
    held_out: float
    """Share of the text that is only evaluated on."""
    batch_size: int
    sequence_length: int
    eval_windows: int
    """Held-out windows of each domain in an evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How long, and what happens between the steps."""

    dense_steps: int
    """Of the stand-in for pretraining; 0 with a checkpoint."""
    steps: int
    """Of the carved model, and of the dense model trained on beside it."""
    dense_continued: bool
    """Train the dense model on for the same steps, as the honest comparison."""
    rebirth_every: int
    """Steps between two looks for experts that no token chose; 0 never looks."""
    rebirth_scale: float
    """How far a reborn prototype moves from its donor's, relative to its length."""
    dtype: Literal["bfloat16", "float32"]
    compile: bool
    """Compile the step, each kind of layer once; needs a C++ compiler on a CPU, and pays off for long runs."""
    checkpoint_every: int
    """Steps between two checkpoints of everything, which `--resume` goes on from; 0 keeps none."""
    checkpoints_kept: int
    """The last ones; each takes five times the room of a bfloat16 model, or three times that of a float32 one."""
    on_non_finite: Literal["skip", "stop"]
    """After a step whose loss or gradient is not finite, and which therefore changed nothing."""
    max_skipped: int
    """Stop all the same after so many of these in a row; 0 never."""

    def __post_init__(self) -> None:
        """Refuse what no run can keep to."""
        for name in ("dense_steps", "steps", "rebirth_every", "checkpoint_every", "max_skipped"):
            check.at_least("train", name, getattr(self, name), 0)
        check.at_least("train", "checkpoints_kept", self.checkpoints_kept, 1)
        check.weight("train", "rebirth_scale", self.rebirth_scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Generated text in the report."""

    prompt_tokens: int
    new_tokens: int
    temperature: float

    def __post_init__(self) -> None:
        """Refuse what no model can continue."""
        check.at_least("sample", "prompt_tokens", self.prompt_tokens, 1)
        check.at_least("sample", "new_tokens", self.new_tokens, 0)
        check.weight("sample", "temperature", self.temperature)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run of the main job: dense Qwen3, carve, train by surprise, evaluate, report."""

    preset: str
    """Where these values came from."""
    seed: int
    """Of everything that is drawn: the same seed on the same machine gives the same bits."""
    checkpoint: CheckpointConfig
    model: Qwen3Config
    sparse: MoeTraining
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    """Of the carved model and of the dense model trained on."""
    pretrain: OptimConfig
    """Of the dense model before the carve."""
    integrity: IntegrityConfig
    sample: SampleConfig


TINY = RunConfig(
    preset="tiny",
    seed=0,
    checkpoint=CheckpointConfig(name="", manifest=Path("weights_manifest.toml"), folder=Path("weights")),
    model=Qwen3Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        tie_word_embeddings=True,
    ),
    sparse=MoeTraining(
        moe=MoeConfig(
            num_experts=32,
            route="threshold",
            top_k=8,
            normalise=True,
            squash="sigmoid",
            combine="sum",
            fallback_k=1,
            cosine_eps=1e-6,
            min_k=4,
            backend="dense",
        ),
        granularity="token",
        optimizer="adamw",
        regime="everything",
        consolidation=ConsolidationConfig(lr=0.03, damping=1.0, eps=1e-8),
        router=RouterConfig(
            target="surprise",
            weight=0.01,
            w_ce=1.0,
            w_kl=1.0,
            w_diversity=0.1,
            w_simplicity=0.0,
            temperature=0.05,
            sensitivity=10.0,
            pi_threshold=0.4,
        ),
        density=DensityConfig(target=0.25, ramp_steps=100, gain=0.5),
        distill=DistillConfig(weight=0.0, temperature=1.0),
    ),
    data=DataConfig(
        path=None,
        bytes_per_domain=1_500_000,
        held_out=0.05,
        batch_size=16,
        sequence_length=128,
        eval_windows=64,
    ),
    train=TrainConfig(
        dense_steps=300,
        steps=300,
        dense_continued=True,
        rebirth_every=50,
        rebirth_scale=0.5,
        dtype="bfloat16",
        compile=False,
        checkpoint_every=50,
        checkpoints_kept=2,
        on_non_finite="skip",
        max_skipped=10,
    ),
    optim=OptimConfig(lr=2e-3, warmup=20, floor=0.1, beta1=0.9, beta2=0.98, eps=1e-8, weight_decay=0.1, clip_norm=1.0),
    pretrain=OptimConfig(
        lr=3e-3, warmup=20, floor=0.2, beta1=0.9, beta2=0.98, eps=1e-8, weight_decay=0.1, clip_norm=1.0
    ),
    integrity=IntegrityConfig(alpha=1.0, gamma=0.2, tau_floor=0.1, delta=1.0),
    sample=SampleConfig(prompt_tokens=48, new_tokens=96, temperature=0.7),
)
"""Does the whole pipeline work, and what does carving cost at a quarter of the experts?

`uv run experiments/run.py`: under 5 minutes and 4 GiB on two CPU cores. Expected: the carved loss equals the dense one
up to rounding, the share of active experts ends within a fifth of 0.25, and the final loss is below the dense model's
at the carve. `experiments/LOG.md` has the figures of the last measurement.
"""

QWEN3_06B = replace(
    TINY,
    preset="qwen3-0.6b",
    checkpoint=replace(TINY.checkpoint, name="qwen3-0.6b"),
    model=Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_theta=1000000.0,
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        tie_word_embeddings=True,
    ),
    data=replace(TINY.data, batch_size=1, sequence_length=512, eval_windows=8),
    train=replace(TINY.train, dense_steps=0, steps=200, dense_continued=False),
    optim=replace(TINY.optim, lr=2e-5, weight_decay=0.01),
    sample=SampleConfig(prompt_tokens=32, new_tokens=32, temperature=0.7),
)
"""How much does the real Qwen3-0.6B lose at a quarter of its experts, and how fast does it recover?

`uv run experiments/run.py qwen3-0.6b --data.path chats.jsonl`, with the checkpoint in `weights/`. Expected: the carved
loss equals the dense one up to bfloat16 rounding; the rest is open until somebody has run it.
"""

PRESETS: Mapping[str, RunConfig] = MappingProxyType({run.preset: run for run in (TINY, QWEN3_06B)})


def step_config(config: RunConfig, *, phase: Literal["dense", "moe", "dense_continued"]) -> StepConfig:
    """What the step of one phase needs to know."""
    dense = phase == "dense"
    return StepConfig(
        model=config.model,
        sparse=config.sparse if phase == "moe" else None,
        optim=config.pretrain if dense else config.optim,
        integrity=config.integrity,
        total_steps=config.train.dense_steps if dense else config.train.steps,
        engine="autograd",
    )


def dtype(config: RunConfig) -> torch.dtype:
    """Of the parameters."""
    return torch.bfloat16 if config.train.dtype == "bfloat16" else torch.float32


def bank_sizes(config: RunConfig) -> calibration.Sizes:
    """Of the banks of one step of the carved model."""
    experts = config.sparse.moe.num_experts
    return calibration.Sizes(
        num_experts=experts,
        width=config.model.intermediate_size // experts,
        hidden=config.model.hidden_size,
        tokens=config.data.batch_size * config.data.sequence_length,
        dtype=dtype(config),
    )


def tiled(config: RunConfig, path: Path) -> RunConfig:
    """The same run with its banks computed by the tiling that `experiments/calibrating.py` left in a file.

    The tiling itself stands in the configuration then, since bits depend on it: nothing reads the file again.

    Raises:
        ValueError: the file holds none for these sizes and this machine; the message says how to measure it.
    """
    try:
        name = tiling_name(calibration.kept(path, bank_sizes(config)))
    except ValueError as error:
        raise ValueError(
            f"{error} Measure it: uv run experiments/calibrating.py --file {path}, with the values of the run."
        ) from error
    return replace(config, sparse=replace(config.sparse, moe=replace(config.sparse.moe, backend=name)))


def save(config: RunConfig) -> dict[str, Value]:
    """The configuration as JSON values, with the version that `load` needs."""
    return {"version": VERSION, **to_dict(config)}


def load(values: Mapping[str, Value], *, where: str) -> RunConfig:
    """A saved configuration, of this version or an earlier one.

    Raises:
        ValueError: an unknown version, or a value unknown, missing or of another type.
    """
    version = values.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(f"{where}: expected version 1 to {VERSION}, got {version!r}.")
    current = {name: value for name, value in values.items() if name != "version"}
    for added in (parts for later, parts in _ADDED.items() if later > version):
        for part, new in added.items():
            current = _extended(current, part.split("."), new, where)
    return from_dict(RunConfig, current, where=where)


def read(path: Path) -> dict[str, Value]:
    """The values of a file that `save` filled.

    Raises:
        ValueError: not a JSON object of configuration values.
    """
    try:
        values = decode(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}.") from error
    return plain(values, where=str(path))


def plain(values: Json, *, where: str) -> dict[str, Value]:
    """JSON values as those of a configuration, which has no lists.

    Raises:
        ValueError: not an object, or a list in it.
    """

    def value(name: str, child: Json) -> Value:
        if isinstance(child, Mapping):
            return plain(child, where=f"{where}: {name}")
        if child is None or isinstance(child, str | int | float | bool):
            return child
        raise ValueError(f"{where}: {name}: expected no list.")

    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected an object.")
    return {name: value(name, child) for name, child in values.items()}


def _extended(values: Mapping[str, Value], part: list[str], new: Mapping[str, Value], where: str) -> dict[str, Value]:
    """`values` with `new` in one of its parts; a part that is not there is left for `from_dict` to name."""
    if part:
        name, *rest = part
        inner = values.get(name)
        return {**values, name: _extended(inner, rest, new, where)} if isinstance(inner, dict) else {**values}
    early = [name for name in new if name in values]
    check.require(not early, f"{where}: {', '.join(map(repr, early))} came with a later version.")
    return {**values, **new}
