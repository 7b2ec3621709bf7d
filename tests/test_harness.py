"""lm-evaluation-harness on a model of `onn.hub`; skipped where the optional group `eval` is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments import harness
from experiments.make_checkpoint import UNUSED_ROWS, write_tokenizer
from onn import carve, data, hub, objective, qwen3
from onn.observe import Json
from tests.test_qwen3 import MOE, config, parameters

ROOT = Path(__file__).parents[1]
TASKS = ROOT / "experiments" / "lm_eval_task"
ARCHITECTURE = config(vocab_size=900, max_position_embeddings=256)
MODEL = carve.carve(parameters(ARCHITECTURE, dtype=torch.float32), num_experts=10)
installed = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the optional group eval is not installed")


def lines(path: Path) -> list[dict[str, Json]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("harness")
    hub.to_module(MODEL, config=ARCHITECTURE, moe=MOE).save_pretrained(path / "model")
    write_tokenizer(path / "model", vocabulary=ARCHITECTURE.vocab_size - UNUSED_ROWS)
    return path


@pytest.fixture(scope="module")
def results(folder: Path) -> Path:
    """What the harness leaves, run as its documentation says, without a network."""
    command = [sys.executable, "experiments/harness.py", "run", "--model", "hf", "--device", "cpu", "--log_samples"]
    command += ["--model_args", f"pretrained={folder / 'model'},dtype=float32", "--tasks", "onn_choice,onn_repeat"]
    command += ["--include_path", "experiments/lm_eval_task", "--output_path", str(folder / "results")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **offline, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / "results"


def log_likelihood(tokens: Tensor, first: int) -> float:
    taps = objective.zero_taps(MODEL, 0, names=())
    logits = qwen3.forward(MODEL, tokens[None].long(), taps, config=ARCHITECTURE, moe=MOE).logits[0]
    rows = torch.log_softmax(logits[first - 1 : -1], dim=-1)
    return float(rows.gather(-1, tokens[first:, None].long()).sum())


@installed
def test_its_log_likelihoods_are_those_of_the_pure_functions(folder: Path, results: Path) -> None:
    tokenizer = data.HubTokenizer(folder / "model")
    (path,) = results.rglob("samples_onn_choice_*.jsonl")
    samples = lines(path)
    assert len(samples) == 16
    hits = []
    ordered = sorted(samples, key=lambda sample: int(str(sample["doc_id"])))
    for sample, question in zip(ordered, lines(TASKS / "choice.jsonl"), strict=True):
        prompt, choices = str(question["question"]), question["choices"]
        assert isinstance(choices, list)
        start = len(tokenizer.encode(prompt))
        expected = [log_likelihood(tokenizer.encode(f"{prompt} {choice}"), start) for choice in choices]
        answers = sample["filtered_resps"]
        assert isinstance(answers, list)
        got = [float(str(answer[0])) for answer in answers if isinstance(answer, list)]
        assert got == pytest.approx(expected, rel=1e-4)
        hits.append(max(range(4), key=expected.__getitem__) == question["answer"])
    (path,) = results.rglob("results_*.json")
    scores = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert scores["onn_choice"]["acc,none"] == pytest.approx(sum(hits) / len(hits))


@installed
def test_it_generates_with_the_adapter(results: Path) -> None:
    (path,) = results.rglob("samples_onn_repeat_*.jsonl")
    samples = lines(path)
    assert len(samples) == len(lines(TASKS / "repeat.jsonl")) == 8
    assert all(isinstance(sample["filtered_resps"], list) for sample in samples)


@pytest.mark.parametrize("name", ["choice", "repeat"])
def test_the_task_files_hold_what_they_say(name: str) -> None:
    for row in lines(TASKS / f"{name}.jsonl"):
        if name == "choice":
            choices, answer = row["choices"], row["answer"]
            assert isinstance(choices, list)
            assert isinstance(answer, int)
            left, right = str(row["question"]).removesuffix(" =").split(" + ")
            assert choices[answer] == str(int(left) + int(right))
            assert len(set(map(str, choices))) == 4
        else:
            assert row["said"] == f"{row['word']} " * 3


def test_without_the_harness_one_line_says_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert harness.main() == 2
    assert "uv sync --group eval" in capsys.readouterr().err
