"""What lets Qwen3-0.6B fit, at a size that a suite can afford; `experiments/full_size.py` does the real one."""

from __future__ import annotations

import hashlib
import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from experiments import full_size, make_checkpoint, pipeline
from experiments.memory import Meter
from experiments.presets import QWEN3_06B, RunConfig
from experiments.workers import workers
from onn import carve, data, descent, observe, qwen3, train, tree, weights
from onn.objective import DistillConfig
from onn.qwen3 import Model
from onn.train import State
from tests.checkpoints import SMALL, assert_same_bits
from tests.support import assert_same
from tests.test_qwen3 import parameters
from tests.test_train import ARCHITECTURE, SETTINGS, batch, carved_state, rounding

MANIFEST = Path(__file__).parents[1] / "weights_manifest.toml"
NAME = "qwen3-0.6b"
ARCHITECTURE_ON_DISK = replace(SMALL, vocab_size=700, max_position_embeddings=64)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random")
    make_checkpoint.make(folder, name=NAME, architecture=ARCHITECTURE_ON_DISK, seed=0)
    return folder


def test_the_files_known_to_the_byte_are_those_of_the_real_checkpoint() -> None:
    real = weights.read_manifest(MANIFEST, NAME)
    texts = {
        "config.json": make_checkpoint.config_text(QWEN3_06B.model),
        "generation_config.json": make_checkpoint.GENERATION_CONFIG,
    }
    for name, text in texts.items():
        assert hashlib.sha256(text.encode()).hexdigest() == real.files[name].sha256
    assert real.checkpoint.architecture == QWEN3_06B.model


def test_a_random_checkpoint_is_verified_and_read_like_the_real_one(place: Path) -> None:
    manifest = weights.read_manifest(place / "weights_manifest.toml", NAME)
    folder = weights.find(place, manifest)
    weights.verify(folder, manifest)
    assert set(manifest.files) == set(weights.read_manifest(MANIFEST, NAME).files)
    assert manifest.checkpoint.architecture == ARCHITECTURE_ON_DISK == weights.read_config(folder / "config.json")
    assert manifest.checkpoint.tensors == 3 + 11 * ARCHITECTURE_ON_DISK.num_hidden_layers
    model = weights.load(folder, config=ARCHITECTURE_ON_DISK)
    assert {leaf.dtype for leaf in tree.leaves(model)} == {torch.bfloat16}
    scale = float(model.embedding.float().std() / ARCHITECTURE_ON_DISK.initializer_range)
    assert scale == pytest.approx(1, rel=0.05)
    hub = Qwen3ForCausalLM.from_pretrained(folder)
    assert torch.equal(hub.model.embed_tokens.weight, model.embedding)
    assert hub.lm_head.weight.data_ptr() == hub.model.embed_tokens.weight.data_ptr()


def test_the_same_seed_makes_the_same_weights_and_another_seed_others() -> None:
    first, again, other = (make_checkpoint.random_tensors(SMALL, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert len(make_checkpoint.random_tensors(replace(SMALL, tie_word_embeddings=False), seed=0)) == len(first)


def test_an_untied_head_is_its_own() -> None:
    tensors = make_checkpoint.random_tensors(replace(SMALL, tie_word_embeddings=False), seed=0)
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_a_random_tokenizer_reads_any_text_and_has_the_added_tokens_last(place: Path) -> None:
    tokenizer = data.HubTokenizer(place / NAME)
    text = "def f(x): return x + 1\n\nWie schön — 你好, 12345 <|im_end|> <think>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert int(tokenizer.encode(text).max()) < ARCHITECTURE_ON_DISK.vocab_size
    base = ARCHITECTURE_ON_DISK.vocab_size - (151936 - 151643)
    specials = [int(tokenizer.special(name)) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    assert specials == [base, base + 1, base + 2]
    assert tokenizer.vocabulary == base + 26
    chat = AutoTokenizer.from_pretrained(place / NAME).apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="write_tokenizer: expected vocabulary="):
        make_checkpoint.make(tmp_path, name=NAME, architecture=SMALL, seed=0)


@pytest.fixture
def small(place: Path) -> RunConfig:
    return replace(
        QWEN3_06B,
        checkpoint=replace(QWEN3_06B.checkpoint, folder=place, manifest=place / "weights_manifest.toml"),
        model=ARCHITECTURE_ON_DISK,
        sparse=replace(QWEN3_06B.sparse, moe=replace(QWEN3_06B.sparse.moe, num_experts=10, top_k=3, min_k=4)),
    )


def test_the_whole_way_with_a_teacher_leaves_a_report_and_says_what_each_part_cost(
    small: RunConfig, tmp_path: Path
) -> None:
    taught = replace(small.sparse, distill=DistillConfig(weight=0.5, temperature=2.0))
    config = full_size.small_share(replace(small, sparse=taught), steps=2, length=16)
    meters = full_size.measure(config, tmp_path / "run")
    records = observe.read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [type(record["divergence"]) for record in records] == [float, float]
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"summary.json", "report.md", "moe.safetensors"}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    parts = ["prepare", "evaluate", "carve", "moe_checkpoints", "moe", "sample", "save"]
    assert sorted(summary["peak_memory_gib"]) == sorted(parts)
    assert sorted(summary["seconds"]) == sorted([*parts, "all"])
    lines = full_size.table(meters).splitlines()
    names = ["load: start", "load: verify", "load: load", *(f"run: {part}" for part in [*parts, "all"])]
    assert [line[:20].strip() for line in lines[1:]] == [*names, "again: restore", "again: generate"]
    peaks = [*meters["load"].peak_gib.values(), *meters["again"].peak_gib.values()]
    assert peaks == sorted(peaks)
    assert peaks[0] > 0


def test_a_meter_adds_parts_of_one_name_and_keeps_the_last_peak() -> None:
    meter = Meter()
    for _ in range(2):
        with meter.part("a"), meter.part("b"):
            pass
    assert list(meter.seconds) == ["b", "a"]
    assert meter.seconds["a"] >= meter.seconds["b"] >= 0
    assert meter.peak_gib["a"] >= meter.peak_gib["b"] > 0


@pytest.mark.parametrize("piece", [1, 40, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_step_in_pieces_is_the_step_in_one(piece: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    state = carved_state(dtype=dtype)
    noise = rounding(state.model, 0) if dtype == torch.bfloat16 else ()
    expected = train.step(state, batch(0), noise, SETTINGS)
    monkeypatch.setattr(descent, "_PIECE", piece)
    assert_same(train.step(state, batch(0), noise, SETTINGS), expected)


def alive(references: list[weakref.ref[torch.Tensor]]) -> int:
    return sum(reference() is not None for reference in references)


def watched(model: Model) -> list[weakref.ref[torch.Tensor]]:
    return [weakref.ref(leaf) for leaf in tree.leaves(model)]


def left_alive(state: State) -> list[int]:
    """How many of a state's and a noise's tensors live when each leaf's turn comes, and after the step."""
    bits = [rounding(state.model, 0)]
    held = [State(*tree.map1(torch.clone, state))]
    references = [*watched(held[0].model), *watched(held[0].optimizer.mean), *watched(bits[0])]
    counts = []
    pieces = descent._pieces

    def counted(leaf: torch.Tensor) -> int:
        counts.append(alive(references))
        return pieces(leaf)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(descent, "_PIECE", 1)
        patch.setattr(descent, "_pieces", counted)
        train.step(held.pop(), batch(0), bits.pop(), SETTINGS)
    return [*counts, alive(references)]


def test_a_state_and_a_noise_that_are_handed_over_are_let_go_leaf_by_leaf() -> None:
    """Without this a step needs memory for two states: 6 GB more for Qwen3-0.6B.

    In a process of its own: where a `torch.compile` has failed, torch 2.15 leaves its frame evaluation in place, under
    which Python keeps a call's arguments until the call ends.
    """
    state = carved_state(dtype=torch.bfloat16)
    with workers(2) as each:
        (counts,) = each(left_alive, [state])
    assert counts == list(range(3 * len(tree.leaves(state.model)), -1, -3))


def test_the_pipeline_keeps_no_state_but_the_last() -> None:
    carved = carve.carve(parameters(ARCHITECTURE, dtype=torch.float32), num_experts=10)
    held = [train.init_state(carved)]
    first = watched(held[0].optimizer.mean)
    source = torch.Generator().manual_seed(0)
    pipeline._advance(held, batch(0), source, SETTINGS, (), train.step)
    assert len(held) == 1
    assert int(held[0].step) == 1
    assert alive(first) == 0


def test_what_is_saved_is_restored_bit_for_bit(small: RunConfig, tmp_path: Path) -> None:
    model = carve.carve(weights.load(small.checkpoint.folder / NAME, config=small.model), num_experts=10)
    weights.save(model, tmp_path / "model.safetensors", metadata={})
    template = carve.carve(qwen3.abstract(small.model), num_experts=10)
    assert_same_bits(weights.restore(tmp_path / "model.safetensors", like=template), model)
