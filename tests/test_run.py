"""The main job as a user runs it: small, but whole."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments import pipeline, presets, replay, run
from experiments.evaluate import evaluate
from experiments.facts import differences
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
    *("--sample.prompt-tokens", "8", "--sample.new-tokens", "4", "--train.checkpoint-every", "5"),
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
        *("surprise_map.png", "surprise_map_per_layer.png", "report.html", "experts.json", "trace.jsonl"),
        *("tensorboard", "checkpoints", ".lock"),
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


def test_the_summary_says_what_the_run_was_made_with(folder: Path) -> None:
    summary = read(folder / "summary.json")
    assert all(summary[name] for name in ("versions", "threads", "machine", "code", "corpus_fingerprint"))
    assert summary["finished"] is True
    assert summary["resumed_from"] == []
    seconds = summary["seconds"]
    assert isinstance(seconds, dict)
    assert {*PHASES, *(f"{phase}_checkpoints" for phase in PHASES), "evaluate", "save", "all"} <= set(seconds)


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


def test_a_replay_repeats_a_run_and_says_what_differs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(folder, tmp_path / "original")
    assert run.main(["--replay", str(other), "--out", str(tmp_path / "same")]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("identical") == 7
    assert "torch" in printed.out
    assert printed.err.count("bits may differ") == 0
    summary = read(other / "summary.json")
    versions = summary["versions"]
    assert isinstance(versions, dict)
    observe.write_json(
        other / "summary.json", summary | {"versions": versions | {"torch": "2.11.0"}, "final_loss": 1.0}
    )
    records = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join(records[:-1]))
    model = load_file(other / "moe.safetensors")
    model["norm"][3] += 1
    save_file(model, other / "moe.safetensors")
    rows = {row.what: row for row in replay.compare(other, tmp_path / "same")}
    assert {name for name, row in rows.items() if row.first} == {
        *("steps of dense_continued", "moe.safetensors", "figures of the summary")
    }
    assert rows["moe.safetensors"].first == "norm: 1 of 32 numbers"
    assert rows["figures of the summary"].first.startswith("final_loss: 1.0, now ")
    assert rows["steps of dense_continued"].first.startswith("step 11: ")
    assert differences(read(other / "summary.json"), read(tmp_path / "same" / "summary.json")) == [
        f"torch 2.11.0, now {versions['torch']}"
    ]


def test_only_a_finished_run_is_replayed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "run")
    for content in (None, "{", '{"finished": false}'):
        if content is not None:
            (tmp_path / "run" / "summary.json").write_text(content)
        assert run.main(["--replay", str(tmp_path / "run"), "--out", str(tmp_path / "new")]) == 2
        assert "holds no finished run" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    monkeypatch.setattr(pipeline, "_carry_out", full)
    assert run.main(["--out", str(tmp_path / "run"), *SIZES]) == 2
    said = f"error: {tmp_path / 'run'}: No space left on device (metrics.jsonl); checkpoints are as they were.\n"
    assert capsys.readouterr().err == said


def test_an_interruption_between_steps_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object, **settings: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(pipeline, "_carry_out", interrupted)
    assert run.main(["--out", str(tmp_path / "run"), *SIZES]) == 130
    assert f"--resume {tmp_path / 'run'}" in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "summary.json").read_bytes()
    assert run.main(["--out", str(folder), *SIZES]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (folder / "summary.json").read_bytes() == before


def test_a_command_line_is_the_preset_with_what_was_changed() -> None:
    order = run.parse([])
    assert order.config == TINY
    assert order.out.parent == Path("runs")
    assert order.out.name.startswith("tiny-")
    order = run.parse(["qwen3-0.6b", "--train.steps", "20", "--seed", "3", "--out", "elsewhere"])
    assert order.config == replace(presets.QWEN3_06B, seed=3, train=replace(presets.QWEN3_06B.train, steps=20))
    assert (order.out, order.resume, order.replay) == (Path("elsewhere"), None, None)
    assert run.parse(["--resume", "runs/a"]).resume == Path("runs/a")
    order = run.parse(["--replay", "runs/a"])
    assert order.replay == Path("runs/a")
    assert order.out.name.startswith("a-replay-")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tinny"], "did you mean 'tiny'"),
        (["--train.stepz", "3"], "--train.steps"),
        (["--train.steps", "many"], "many"),
        (["--sparse.moe.squash", "relu"], "sigmoid"),
        (["--sparse.moe.num-experts", "9"], "num_experts=9"),
        (["--train.checkpoint-every", "-1"], "checkpoint_every=-1"),
        (["--train.steps", "-5"], "steps=-5"),
        (["--train.rebirth-scale", "-1"], "rebirth_scale=-1"),
        (["--sample.prompt-tokens", "0"], "prompt_tokens=0"),
        (["--sample.new-tokens", "-1"], "new_tokens=-1"),
        (["--sparse.moe.num-experts", "48"], "num_experts=48"),
        (["--preset", "qwen3-0.6b"], "run.py qwen3-0.6b"),
        (["--train.on-non-finite", "hope"], "stop"),
        (["--resume", "a", "--seed", "3"], "a brings its own configuration"),
        (["--resume", "a", "--out", "b"], "a brings its own configuration"),
        (["--resume", "a", "--replay", "b"], "a brings its own configuration"),
        (["tiny", "--replay", "a"], "a brings its own configuration"),
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


@pytest.mark.parametrize("out", [["--out", "a b"], ["--out=a b"], []])
def test_the_command_of_a_run_repeats_it_in_a_folder_of_its_own(out: list[str]) -> None:
    again = shlex.split(run.command(["tiny", *out, "--data.path", "my text"]))
    assert again == ["uv", "run", "experiments/run.py", "tiny", "--data.path", "my text"]


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
