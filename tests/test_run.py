"""The main job as a user runs it: small, but whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from experiments import pipeline, presets, run
from experiments.evaluate import evaluate
from experiments.presets import TINY, RunConfig
from onn import carve, corpus, data, observe, qwen3, weights
from onn.observe import Json
from tests.checkpoints import NAME, SMALL, hub_tensors, manifest_text, write_checkpoint
from tests.support import assert_same
from tests.test_tokenizers import write_tokenizer

SIZES = [
    *("--model.hidden-size", "32", "--model.intermediate-size", "40", "--model.num-hidden-layers", "2"),
    *("--sparse.moe.num-experts", "10", "--sparse.density.ramp-steps", "4", "--data.bytes-per-domain", "4000"),
    *("--data.sequence-length", "16", "--data.batch-size", "4", "--data.eval-windows", "4"),
    *("--train.dense-steps", "6", "--train.steps", "12", "--train.rebirth-every", "5"),
    *("--sample.prompt-tokens", "8", "--sample.new-tokens", "4"),
]
PHASES = ("dense", "moe", "dense_continued")
STEP_FIGURES = (
    *("loss", "tau", "error_over_tau", "surprise", "pi", "active_per_token", "gate_accuracy", "gate_chance"),
    *("dead_experts", "tokens_per_second"),
)
SUMMARY_FIGURES = ("dense_loss", "carved_loss", "final_loss", "dense_continued_loss", "pi", "active_fraction")


def read(path: Path) -> dict[str, Json]:
    value = observe.decode(path.read_text())
    assert isinstance(value, dict)
    return value


def number(record: dict[str, Json], name: str) -> float:
    value = observe.number(record, name)
    assert value is not None, f"{name} is not a number in {record}"
    return value


def saved(folder: Path, phase: str) -> tuple[Tensor, ...]:
    return tuple(tensor for _, tensor in sorted(load_file(folder / f"{phase}.safetensors").items()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "first"
    assert run.main(["--out", str(path), *SIZES]) == 0
    return path


def test_a_run_leaves_what_is_promised(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "metrics.jsonl", "summary.json", "report.md", "curves.png", "expert_by_domain.png"),
        *("surprise_map.png", "surprise_map_per_layer.png"),
        *(f"{phase}.safetensors" for phase in PHASES),
    }


def test_every_step_has_every_figure_and_the_density_comes_down(folder: Path) -> None:
    records = observe.read_jsonl(folder / "metrics.jsonl")
    steps = [(record["phase"], record["step"]) for record in records]
    assert steps == [
        *(("dense", step) for step in range(6)),
        *((phase, step) for phase in PHASES[1:] for step in range(6, 18)),
    ]
    assert all(name in record for record in records for name in STEP_FIGURES)
    active = [number(record, "active_per_token") for record in records if record["phase"] == "moe"]
    assert active[0] == 10
    assert sum(active[-4:]) / 4 < 5


def test_the_summary_tells_the_losses_before_and_after(folder: Path) -> None:
    summary = read(folder / "summary.json")
    figures = {name: number(summary, name) for name in SUMMARY_FIGURES}
    assert figures["carved_loss"] == pytest.approx(figures["dense_loss"], rel=0.01)
    assert figures["final_loss"] < figures["dense_loss"]
    domains = summary["per_domain"]
    assert isinstance(domains, dict)
    assert tuple(domains) == corpus.DOMAINS
    assert f"{figures['final_loss']:.4f}" in (folder / "report.md").read_text()


def test_a_saved_model_is_restored_and_computes_the_same(folder: Path) -> None:
    config = presets.load(json.loads((folder / "config.json").read_text()), where="config.json")
    template = carve.carve(qwen3.abstract(config.model), num_experts=config.sparse.moe.num_experts)
    model = weights.restore(folder / "moe.safetensors", like=template)
    text = pipeline.prepare(config).corpus
    held_out = pipeline.held_out_batches(text, config)
    again = evaluate(model, held_out, config=presets.step_config(config, phase="moe"))
    assert again.mean("loss") == number(read(folder / "summary.json"), "final_loss")


def test_the_same_configuration_gives_the_same_bits(folder: Path, tmp_path: Path) -> None:
    assert run.main(["tiny", "--out", str(tmp_path / "again"), *SIZES]) == 0
    for phase in PHASES:
        assert_same(saved(tmp_path / "again", phase), saved(folder, phase))


def test_a_folder_that_holds_a_run_is_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "summary.json").read_bytes()
    assert run.main(["--out", str(folder), *SIZES]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (folder / "summary.json").read_bytes() == before


def test_a_command_line_is_the_preset_with_what_was_changed() -> None:
    config, out = run.parse([])
    assert config == TINY
    assert out.parent == Path("runs")
    assert out.name.startswith("tiny-")
    config, out = run.parse(["qwen3-0.6b", "--train.steps", "20", "--seed", "3", "--out", "elsewhere"])
    assert config == replace(presets.QWEN3_06B, seed=3, train=replace(presets.QWEN3_06B.train, steps=20))
    assert out == Path("elsewhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tinny"], "did you mean 'tiny'"),
        (["--train.stepz", "3"], "--train.steps"),
        (["--train.steps", "many"], "many"),
        (["--sparse.moe.squash", "relu"], "sigmoid"),
        (["--sparse.moe.num-experts", "9"], "num_experts=9"),
    ],
)
def test_a_wrong_command_line_is_an_error_that_helps(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: object = run.main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    printed = capsys.readouterr()
    assert message in printed.err + printed.out


def test_help_names_the_presets_and_every_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.parse(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for name in ("qwen3-0.6b", "--out", "--seed", "--train.steps", "--sparse.router.w-kl", "--data.path"):
        assert name in text


@pytest.fixture
def from_checkpoint(tmp_path: Path) -> RunConfig:
    """The preset of the real checkpoint, at the size of a small one in the same format."""
    architecture = replace(SMALL, vocab_size=600, max_position_embeddings=64)
    tensors = hub_tensors(architecture)
    checkpoint = write_tokenizer(write_checkpoint(tmp_path / "weights" / NAME, architecture, tensors))
    manifest = tmp_path / "weights_manifest.toml"
    manifest.write_text(manifest_text(checkpoint, architecture, tensors=len(tensors)))
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the user says hello 12 " * 4}]
    lines = [json.dumps({"messages": [*turns, {"role": "user", "content": str(n)}, turns[1]]}) for n in range(12)]
    chats.write_text("\n".join(lines))
    preset = presets.QWEN3_06B
    return replace(
        preset,
        checkpoint=replace(preset.checkpoint, name=NAME, manifest=manifest, folder=tmp_path / "weights"),
        model=architecture,
        sparse=replace(preset.sparse, moe=replace(preset.sparse.moe, num_experts=10)),
        data=replace(preset.data, path=chats, held_out=0.3, sequence_length=16, bytes_per_domain=4000),
        train=replace(preset.train, steps=3),
        sample=replace(preset.sample, prompt_tokens=8, new_tokens=3),
    )


def test_a_run_from_a_checkpoint_starts_at_the_carve(from_checkpoint: RunConfig, tmp_path: Path) -> None:
    summary = dict(pipeline.run(from_checkpoint, tmp_path / "run"))
    assert [record["phase"] for record in observe.read_jsonl(tmp_path / "run" / "metrics.jsonl")] == ["moe"] * 3
    assert number(summary, "carved_loss") == pytest.approx(number(summary, "dense_loss"), rel=0.01)
    assert summary["dense_continued_loss"] is None
    domains = summary["per_domain"]
    assert isinstance(domains, dict)
    assert tuple(domains) == ("chats",)


def test_a_checkpoint_brings_its_own_tokenizer_and_takes_the_type_asked_for(from_checkpoint: RunConfig) -> None:
    embedded = replace(
        from_checkpoint,
        data=replace(from_checkpoint.data, path=None),
        train=replace(from_checkpoint.train, dtype="float32"),
    )
    source = pipeline.prepare(embedded)
    assert isinstance(source.tokenizer, data.HubTokenizer)
    assert str(source.model.embedding.dtype) == "torch.float32"
    expected = corpus.embedded_corpus(bytes_per_domain=4000, held_out=0.3, seed=embedded.seed)
    for got, text in zip(source.corpus.train, expected.train, strict=True):
        assert source.tokenizer.decode(got) == data.ByteTokenizer().decode(text)


def test_missing_and_damaged_weights_stop_a_run_before_it_begins(from_checkpoint: RunConfig, tmp_path: Path) -> None:
    model = from_checkpoint.checkpoint.folder / NAME / weights.MODEL_FILE
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"(?s)model\.safetensors.*sha256.*hf download"):
        pipeline.run(from_checkpoint, tmp_path / "run")
    model.unlink()
    with pytest.raises(ValueError, match=r"(?s)model\.safetensors.*hf download"):
        pipeline.run(from_checkpoint, tmp_path / "run")
    assert not (tmp_path / "run").exists()
