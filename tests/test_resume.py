"""Runs that are stopped and go on: the same bits as one that never was, and nothing wrong without a word."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import guard, pipeline, presets, run
from experiments.keeping import FOLDER, METRICS
from onn import checkpoint, observe, train
from onn.data import Batch
from onn.objective import StepConfig
from onn.qwen3 import Model
from onn.train import Metrics, State
from tests.resuming import SMALL, assert_same_run, interrupted_after, made_quick, with_train


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    made_quick(monkeypatch)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    with pytest.MonkeyPatch.context() as patch:
        made_quick(patch)
        pipeline.run(SMALL, folder)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped after the third step of `moe`: checkpoints `moe-000002` and `moe-000003`, and two metrics more."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        made_quick(patch)
        interrupted_after(patch, 6)
        with pytest.raises(guard.Stopped, match=r"Stopped after step 3 of moe\. .*--resume") as caught:
            pipeline.run(SMALL, folder)
    assert caught.value.status == 130
    return folder


@pytest.fixture
def folder(stopped: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stopped, tmp_path / "run")


def test_a_run_stopped_after_every_step_gives_the_same_bits(reference: Path, tmp_path: Path) -> None:
    """Every boundary between two steps, between phases, and each of them after a resumption."""
    folder, stops = tmp_path / "run", 0
    with pytest.MonkeyPatch.context() as patch:
        interrupted_after(patch, 1)
        with pytest.raises(guard.Stopped):
            pipeline.run(SMALL, folder)
        for _ in range(SMALL.train.dense_steps + 2 * SMALL.train.steps - 1):
            with pytest.raises(guard.Stopped):
                pipeline.resume(folder)
            stops += 1
        pipeline.resume(folder)
    assert stops == 10
    assert_same_run(folder, reference)


@pytest.mark.parametrize("every", [0, 1, 3])
def test_how_often_checkpoints_are_written_changes_no_bit(reference: Path, tmp_path: Path, every: int) -> None:
    pipeline.run(with_train(SMALL, checkpoint_every=every), tmp_path / "run")
    assert_same_run(tmp_path / "run", reference)
    assert (tmp_path / "run" / FOLDER).exists() == (every > 0)


def test_the_last_ones_are_kept_and_hold_everything(stopped: Path) -> None:
    names = sorted(path.name for path in (stopped / FOLDER).iterdir())
    assert names == ["carved-figures", "dense-figures", "dense-model", "dense-model-copy", "moe-000002", "moe-000003"]
    found = checkpoint.verify(stopped / FOLDER / "moe-000003")
    assert {path.name for path in found.folder.iterdir()} == {
        *("model.safetensors", "training.safetensors", "generators.safetensors", "metrics.jsonl", "manifest.json")
    }
    assert (found.facts["step"], found.facts["records"], found.facts["skipped"]) == (3, 6, 0)
    assert found.facts["config"] == presets.save(SMALL)
    about = found.facts["run"]
    assert isinstance(about, dict)
    assert {"versions", "threads", "machine", "code", "corpus_fingerprint"} == set(about)
    for values in (checkpoint.tensors(found, name) for name in ("model", "training")):
        assert all(bool(torch.isfinite(leaf.double()).all()) for leaf in values.values())


def test_a_finished_run_says_so_and_is_left_as_it_is(reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in reference.rglob("*") if path.is_file()}
    assert run.main(["--resume", str(reference)]) == 0
    assert "this run is finished" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in reference.rglob("*") if path.is_file()} == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage", "resumed"),
    [
        ("moe-000003/training.safetensors", cut, "moe-000002"),
        ("moe-000003/metrics.jsonl", flip, "moe-000002"),
        ("moe-000003/manifest.json", Path.unlink, "moe-000002"),
        ("dense-model/model.safetensors", flip, "moe-000003"),
        ("dense-figures/figures.safetensors", flip, "moe-000003"),
    ],
)
def test_the_newest_whole_checkpoint_is_taken_and_said(
    folder: Path,
    reference: Path,
    file: str,
    damage: Callable[[Path], None],
    resumed: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(folder / FOLDER / file)
    summary = pipeline.resume(folder)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("damaged: ")]
    assert len(said) == 1
    assert file.split("/")[1] in said[0]
    assert resumed in str(summary["resumed_from"])
    assert_same_run(folder, reference)


def test_a_run_without_one_whole_checkpoint_begins_anew(
    folder: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for manifest in (folder / FOLDER).rglob("manifest.json"):
        flip(manifest)
    pipeline.resume(folder)
    assert "Going back to the last checkpoint within dense, or to its beginning." in capsys.readouterr().err
    assert_same_run(folder, reference)


def test_a_model_that_is_made_anew_is_measured_anew(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(reference, tmp_path / "run")
    (folder / "summary.json").unlink()
    for copy in ("model", "model-copy"):
        flip(folder / FOLDER / f"moe-{copy}" / "model.safetensors")
    summary = pipeline.resume(folder)
    assert "moe-figures" not in str(summary["resumed_from"])
    assert capsys.readouterr().err.count("Going back to the last checkpoint within moe, or to its beginning.") == 2
    assert_same_run(folder, reference)


def test_damaged_records_are_put_back(folder: Path, reference: Path) -> None:
    flip(folder / METRICS)
    (folder / METRICS).write_text((folder / METRICS).read_text()[:100] + '{"step": 99}\n')
    pipeline.resume(folder)
    assert_same_run(folder, reference)


def test_what_a_dead_run_wrote_after_its_checkpoint_is_dropped(folder: Path, reference: Path) -> None:
    later = (reference / METRICS).read_text().splitlines(keepends=True)[6:9]
    with (folder / METRICS).open("a") as file:
        file.write("".join(later) + later[0][:20])
    half = folder / FOLDER / "moe-000004.partial"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    pipeline.resume(folder)
    assert not half.exists()
    assert_same_run(folder, reference)


def test_the_configuration_of_a_checkpoint_stands_in_for_a_lost_file_and_against_a_changed_one(
    folder: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"seed": 1}))
    assert run.main(["--resume", str(folder)]) == 2
    assert "was made with another configuration" in capsys.readouterr().err
    path.write_text("{")
    assert run.main(["--resume", str(folder)]) == 2
    assert f"error: {path}: not JSON" in capsys.readouterr().err
    path.unlink()
    pipeline.resume(folder)
    assert "is missing; taking the configuration of a checkpoint" in capsys.readouterr().err
    assert_same_run(folder, reference)


def test_values_that_change_no_bit_may_change(folder: Path, reference: Path) -> None:
    other = with_train(SMALL, checkpoint_every=1, checkpoints_kept=1, on_non_finite="stop", max_skipped=0)
    observe.write_json(folder / "config.json", presets.save(other))
    pipeline.resume(folder)
    assert_same_run(folder, reference)


def test_a_text_that_has_changed_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox.\n" * 200)
    config = replace(SMALL, data=replace(SMALL.data, path=text, held_out=0.2))
    with pytest.MonkeyPatch.context() as patch:
        interrupted_after(patch, 5)
        with pytest.raises(guard.Stopped):
            pipeline.run(config, tmp_path / "run")
    text.write_text("The quick brown dog.\n" * 200)
    with pytest.raises(ValueError, match="the text is another one"):
        pipeline.resume(tmp_path / "run")


def test_another_code_version_is_said_and_not_refused(
    folder: Path, reference: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("experiments.facts.code_version", lambda: "0.0.7")
    pipeline.resume(folder)
    said = [line for line in capsys.readouterr().err.splitlines() if "0.0.7" in line]
    assert len(said) == 1
    assert said[0].startswith("not as when it was started")
    assert_same_run(folder, reference)


def test_one_run_to_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with guard.alone(folder):
        assert run.main(["--resume", str(folder)]) == 2
        assert "another run is at work in this folder" in capsys.readouterr().err
    with guard.alone(folder):
        pass


def test_there_must_be_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--resume", str(tmp_path / "none")]) == 2
    assert run.main(["--resume", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {tmp_path / 'none'}: no such folder.",
        f"error: {tmp_path}: holds no run: no config.json and no whole checkpoint.",
    ]


def poisoned(monkeypatch: pytest.MonkeyPatch, *steps: int, lasting: bool) -> None:
    """A NaN in the model at some steps, for these alone or for good."""
    real, taken = train.step, list[int]()

    def step(
        state: State, batch: Batch, noise: Model | tuple[()], config: StepConfig, teacher: Model | tuple[()] = ()
    ) -> tuple[State, Metrics]:
        taken.append(1)
        bad = state.model._replace(norm=torch.full_like(state.model.norm, torch.nan))
        if len(taken) not in steps:
            return real(state, batch, noise, config, teacher)
        after, metrics = real(state._replace(model=bad), batch, noise, config, teacher)
        return (after if lasting else after._replace(model=state.model)), metrics

    monkeypatch.setattr(train, "step", step)


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, 2, 4, 5, lasting=False)
    pipeline.run(SMALL, tmp_path / "run")
    skipped = [record["skipped"] for record in observe.read_jsonl(tmp_path / "run" / METRICS)]
    assert [position for position, value in enumerate(skipped, start=1) if value] == [2, 4, 5]


def test_a_run_told_to_stop_at_the_first_does_so(
    tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        poisoned(patch, 6, lasting=False)
        with pytest.raises(guard.Stopped, match=r"moe, step 5: loss nan, .*moe-000002.*--resume") as caught:
            pipeline.run(with_train(SMALL, on_non_finite="stop"), folder)
    assert caught.value.status == 3
    pipeline.resume(folder)
    assert_same_run(folder, reference)


@pytest.mark.parametrize(("limit", "message"), [(1, "1 in a row"), (0, "model.norm.*: not finite, and not kept")])
def test_a_poisoned_model_ends_a_run_and_is_never_kept(
    tmp_path: Path, reference: Path, limit: int, message: str
) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        poisoned(patch, 5, lasting=True)
        with pytest.raises(guard.Stopped, match=message) as caught:
            pipeline.run(with_train(SMALL, max_skipped=limit), folder)
    assert caught.value.status == 3
    for path in (folder / FOLDER).glob("*/model.safetensors"):
        found = checkpoint.verify(path.parent)
        assert all(bool(torch.isfinite(leaf).all()) for leaf in checkpoint.tensors(found, "model").values())
    pipeline.resume(folder)
    assert_same_run(folder, reference)


def test_without_checkpoints_a_poisoned_model_is_refused_at_the_end_of_its_phase(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        poisoned(patch, 3, lasting=True)
        with pytest.raises(guard.Stopped, match=r"There are no checkpoints .*starts anew"):
            pipeline.run(with_train(SMALL, checkpoint_every=0, max_skipped=0), tmp_path / "run")
