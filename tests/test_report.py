from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

from experiments.report import FIGURES, summary_table, verdict, write_report
from onn.observe import Json, MetricsWriter, Record, curves, expert_by_domain, surprise_map, write_json
from tests.test_observe import NAN, run_records, usage_counts


def full_summary() -> dict[str, Json]:
    numbers: dict[str, Json] = {"loss": 1.9, "accuracy": 0.55, "active_per_token": 7.9, "gate_accuracy": None}
    return {
        "dense_loss": 2.41,
        "carved_loss": 3.9,
        "final_loss": 2.3101,
        "dense_continued_loss": 2.2561,
        "pi": 0.371,
        "active_fraction": 0.2517,
        "per_domain": {"code": numbers, "a|b": {"loss": 2.77, "extra": 3}},
        "gate_accuracy": 0.31,
        "gate_chance": 0.127,
        "dead_before_fallback": 3,
        "dead_after_fallback": 1,
        "expert_domain_information_nats": 0.0431,
        "corpus": {"sha256": "ab12"},
        "seconds": {"dense": 100.25},
        "samples": {"moe": "one\n```\ntwo"},
        "versions": {"torch": "2.15.0"},
        "sizes": [1, NAN],
    }


def run_folder(folder: Path) -> tuple[Path, dict[str, Json], list[Record]]:
    folder.mkdir()
    summary, records = full_summary(), run_records(20)
    write_json(folder / "config.json", {"seed": 7, "model": {"hidden_size": 128, "note": "x|y"}})
    write_json(folder / "summary.json", summary)
    with MetricsWriter(folder / "metrics.jsonl") as writer:
        for record in records:
            writer.write(record)
    (folder / "moe step 1.safetensors").write_bytes(b"0")
    curves(records, folder / "curves.png")
    expert_by_domain(usage_counts(2, 3, 12), ["a", "b", "c"], folder / "expert_by_domain.png")
    surprise_map(torch.rand(2, 12), folder / "surprise_map.png", per_layer=False)
    surprise_map(torch.rand(2, 12), folder / "surprise_map_per_layer.png", per_layer=True)
    return folder, summary, records


def test_links_files_numbers_and_texts(tmp_path: Path) -> None:
    folder, summary, records = run_folder(tmp_path / "a run")
    report = write_report(folder, summary, records)
    text = report.read_text(encoding="utf-8")
    links = [unquote(link) for link in re.findall(r"\]\(([^)]+)\)", text)]
    assert all((folder / link).is_file() for link in links)
    assert {path.name for path in folder.iterdir()} - {"report.md"} == set(links)
    for file, title, explanation in FIGURES:
        assert f"![{title}]({file})\n\n{explanation}" in text
    for figure in re.findall(r"\d[\d.]*", summary_table(summary)):
        assert figure in text
    for part in (
        "seed 7",
        "128",
        "x\\|y",
        "a\\|b",
        "ab12",
        "100.25",
        "one\n```\ntwo",
        "2.15.0",
        "[1, null]",
        "extra",
    ):
        assert part in text, part
    assert write_report(folder, summary, records).read_text(encoding="utf-8") == text


def test_tables_have_as_many_cells_in_every_row(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"seed": 7, "note": "x|y"})
    text = write_report(tmp_path, full_summary(), run_records(3)).read_text(encoding="utf-8")
    blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(blocks) >= 7
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block


def test_an_empty_folder_and_nulls_everywhere(tmp_path: Path) -> None:
    keys = (
        "dense_loss",
        "carved_loss",
        "final_loss",
        "dense_continued_loss",
        "pi",
        "active_fraction",
        "per_domain",
    )
    summary: dict[str, Json] = dict.fromkeys(keys)
    text = write_report(tmp_path, summary, []).read_text(encoding="utf-8")
    assert "No verdict" in text
    assert "None was drawn" in text
    assert not re.findall(r"\]\(", text)
    assert "nan" not in summary_table({**summary, "pi": NAN}).split()


@pytest.mark.parametrize(
    ("final", "words"), [(2.0, "0.2561 nats better"), (2.5, "lost: it ends 0.2439 nats worse"), (2.2561, "A draw")]
)
def test_the_verdict_is_honest(final: float, words: str) -> None:
    summary = {**full_summary(), "final_loss": final}
    assert words in verdict(summary)
    assert "25.2% of its experts" in verdict(summary)
    assert "No verdict" in verdict({**summary, "final_loss": NAN})


@pytest.mark.parametrize("key", ["dense_loss", "final_loss", "dense_continued_loss", "pi", "active_fraction"])
def test_a_missing_or_wrong_number_is_named(key: str) -> None:
    summary = full_summary()
    value = summary.pop(key)
    with pytest.raises(ValueError, match=f"summary: missing key '{key}'; did you mean"):
        summary_table({**summary, key + "s": value})
    for wrong in ("2.3", True, [1]):
        with pytest.raises(ValueError, match=f"summary: expected a number or null at '{key}', got "):
            summary_table({**summary, key: wrong})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"per_domain": 3}, "summary: expected a mapping or null at 'per_domain'"),
        ({"per_domain": {"code": 3}}, r"summary\.per_domain: expected a mapping or null at 'code'"),
        (
            {"per_domain": {"code": {"loss": "x"}}},
            r"summary\.per_domain\.code: expected a number or null at 'loss'",
        ),
        ({"gate_accuracy": [1]}, "summary: expected a number or null at 'gate_accuracy'"),
    ],
)
def test_a_malformed_part_is_named(tmp_path: Path, change: Mapping[str, Json], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        write_report(tmp_path, {**full_summary(), **change}, [])
    assert not list(tmp_path.iterdir())
