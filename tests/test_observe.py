from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread, imsave
from torch import Tensor

from onn.observe import (
    Json,
    MetricsWriter,
    Record,
    curves,
    decode,
    encode,
    expert_by_domain,
    mutual_information,
    read_jsonl,
    surprise_map,
    write_json,
)

NAN = math.nan


def json_values() -> st.SearchStrategy[Json]:
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    return st.recursive(
        leaves, lambda of: st.lists(of, max_size=3) | st.dictionaries(st.text(max_size=3), of, max_size=3), max_leaves=8
    )


def tables() -> st.SearchStrategy[Tensor]:
    sizes = st.tuples(st.integers(1, 5), st.integers(1, 5))
    return sizes.flatmap(
        lambda size: st.lists(
            st.lists(st.integers(0, 50), min_size=size[1], max_size=size[1]), min_size=size[0], max_size=size[0]
        )
    ).map(torch.tensor)


def without_nan(value: Json) -> Json:
    """What a JSON file should give back for `value`."""
    if isinstance(value, Mapping):
        return {key: without_nan(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def information_by_loop(counts: Tensor) -> float:
    rows: list[list[float]] = counts.double().tolist()
    total = sum(map(sum, rows))
    columns = [sum(row[c] for row in rows) for c in range(len(rows[0]))]
    return sum(
        n / total * math.log(n * total / (sum(row) * column))
        for row in rows
        for n, column in zip(row, columns, strict=True)
        if n > 0
    )


def check_picture(path: Path) -> bytes:
    """Demand a PNG of a sensible size that is not blank; return its bytes."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(content) < 300_000, f"{path.name}: {len(content)} bytes"
    pixels = imread(path)
    height, width = pixels.shape[:2]
    assert 200 <= height <= 4000, f"{path.name}: {height} pixels high"
    assert 800 <= width <= 2000, f"{path.name}: {width} pixels wide"
    assert pixels[..., :3].std() > 0.02, f"{path.name} is blank"
    return content


def run_records(steps: int, *, global_steps: bool = True) -> list[Record]:
    """A dense phase and the two that follow it, with the nulls, the NaN and the noise of a real run."""
    generator = torch.Generator().manual_seed(0)
    noise: list[float] = (0.05 * torch.randn(3 * steps, generator=generator)).tolist()
    names = ("surprise", "pi", "active_per_token", "target_active_per_token", "gate_accuracy", "gate_chance")
    nulls: dict[str, Json] = dict.fromkeys((*names, "dead_experts"))
    records: list[Record] = []
    for phase, start in (("dense", 0), ("moe", steps), ("dense_continued", steps)):
        for step in range(steps):
            loss = 2 + 4 * math.exp(-(start + step) / 20) + noise[len(records)]
            expert: dict[str, Json] = {
                "surprise": 0.1 / (1 + step),
                "pi": 0.3,
                "active_per_token": 8 + 24 / (1 + step),
                "target_active_per_token": 8.0,
                "gate_accuracy": 0.2,
                "gate_chance": 0.125,
                "dead_experts": step % 3,
            }
            records.append(
                {
                    "step": step + (start if global_steps else 0),
                    "phase": phase,
                    "loss": NAN if step == 7 else loss,
                    "tau": loss + 0.1,
                    "error_over_tau": loss / (loss + 0.1),
                    "tokens_per_second": 20000.0,
                    **(expert if phase == "moe" else nulls),
                }
            )
    return records


def usage_counts(layers: int, domains: int, experts: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    usage = (torch.randn(layers, domains, experts, generator=generator).exp() * 1000).round()
    usage[0, :, 3] = 0
    usage[0, 0, 4] = 0
    return usage


class TestFiles:
    @given(json_values())
    def test_json_round_trip_with_null_for_nan(self, value: Json) -> None:
        assert decode(encode(value, indent=None)) == without_nan(value)
        assert decode(encode(value, indent=2)) == without_nan(value)

    @pytest.mark.parametrize("text", ["\u2028", "\ud800", "é", '"\n'])
    def test_a_record_is_one_line(self, tmp_path: Path, text: str) -> None:
        with MetricsWriter(tmp_path / "m.jsonl") as writer:
            writer.write({"text": text})
        assert read_jsonl(tmp_path / "m.jsonl") == [{"text": text}]
        assert (tmp_path / "m.jsonl").read_bytes().count(b"\n") == 1

    def test_records_keep_order_and_reach_the_file_at_once(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        with MetricsWriter(path) as writer:
            writer.write({"z": 1, "a": NAN, "m": {"y": math.inf, "b": (1.5,)}})
            assert path.read_text() == '{"z": 1, "a": null, "m": {"y": null, "b": [1.5]}}\n'
        with MetricsWriter(path) as writer:
            writer.write({"step": 2})
        assert [list(record) for record in read_jsonl(path)] == [["z", "a", "m"], ["step"]]

    def test_a_line_that_was_cut_off_is_left_out(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1}\n{"st')
        assert read_jsonl(path) == [{"step": 1}]

    @pytest.mark.parametrize("line", ['{"a": NaN}', "[1]", "{", "", "-Infinity"])
    def test_a_bad_line_is_named(self, tmp_path: Path, line: str) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1}\n' + line + "\n")
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: "):
            read_jsonl(path)

    def test_write_json_replaces_whole_files_or_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "summary.json"
        write_json(path, {"b": 1, "a": [NAN]})
        assert json.loads(path.read_text()) == {"b": 1, "a": [None]}
        circle: list[Json] = []
        circle.append(circle)
        with pytest.raises(RecursionError):
            write_json(path, circle)
        assert json.loads(path.read_text()) == {"b": 1, "a": [None]}
        assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


class TestMutualInformation:
    @given(tables())
    def test_equals_the_loop_is_symmetric_and_bounded(self, counts: Tensor) -> None:
        got = mutual_information(counts)
        expected = information_by_loop(counts) if counts.sum() > 0 else 0.0
        assert got == pytest.approx(expected, abs=1e-12)
        assert 0 <= got <= math.log(min(counts.shape)) + 1e-12
        assert mutual_information(counts.T) == pytest.approx(got, abs=1e-12)

    @given(tables(), st.integers(0, 2**31), st.integers(1, 1000))
    def test_permutations_and_scale_change_nothing(self, counts: Tensor, seed: int, scale: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows, columns = (torch.randperm(size, generator=generator) for size in counts.shape)
        shuffled = scale * counts[rows][:, columns]
        assert mutual_information(shuffled) == pytest.approx(mutual_information(counts), abs=1e-12)

    @given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.lists(st.integers(0, 20), min_size=1, max_size=5))
    def test_zero_when_independent(self, rows: list[int], columns: list[int]) -> None:
        assert mutual_information(torch.outer(torch.tensor(rows), torch.tensor(columns))) == pytest.approx(0, abs=1e-12)

    @pytest.mark.parametrize("size", [1, 2, 7])
    def test_log_of_the_size_when_diagonal(self, size: int) -> None:
        counts = torch.cat([3 * torch.eye(size), torch.zeros(size, 2)], dim=1)
        assert mutual_information(counts) == pytest.approx(math.log(size), abs=1e-12)

    @pytest.mark.parametrize("bad", [torch.tensor([[1.0, -1.0]]), torch.tensor([[NAN]]), torch.ones(2)])
    def test_refuses_what_is_no_table_of_counts(self, bad: Tensor) -> None:
        with pytest.raises(ValueError, match=r"mutual_information: .*counts"):
            mutual_information(bad)


class TestFigures:
    def test_the_check_refuses_a_blank_picture(self, tmp_path: Path) -> None:
        imsave(tmp_path / "blank.png", torch.ones(900, 900, 3).numpy())
        with pytest.raises(AssertionError, match="blank"):
            check_picture(tmp_path / "blank.png")

    @pytest.mark.parametrize("steps", [1, 2, 300])
    def test_curves(self, tmp_path: Path, steps: int) -> None:
        records = run_records(steps)
        before = encode(records, indent=None)
        curves(records, tmp_path / "curves.png")
        check_picture(tmp_path / "curves.png")
        assert encode(records, indent=None) == before

    def test_curves_begin_after_the_carve_whatever_the_steps_count_from(self, tmp_path: Path) -> None:
        curves(run_records(9), tmp_path / "global.png")
        curves(run_records(9, global_steps=False), tmp_path / "phase.png")
        assert check_picture(tmp_path / "global.png") == check_picture(tmp_path / "phase.png")

    @pytest.mark.parametrize(
        "records",
        [
            [],
            run_records(12)[:12],
            run_records(12)[12:24],
            [{"step": step, "phase": "moe", "loss": NAN, "surprise": None, "dead_experts": 0} for step in range(3)],
            [{"step": 0, "phase": "something else", "loss": 1e30}],
        ],
        ids=["nothing", "dense only", "experts only", "nothing finite", "unknown phase"],
    )
    def test_curves_of_a_partial_run(self, tmp_path: Path, records: Sequence[Record]) -> None:
        curves(records, tmp_path / "curves.png")
        check_picture(tmp_path / "curves.png")

    @pytest.mark.parametrize("record", [{"phase": "moe"}, {"step": 1}, {"step": NAN, "phase": "moe"}])
    def test_curves_name_a_record_without_its_place(self, tmp_path: Path, record: Record) -> None:
        with pytest.raises(ValueError, match="record 1 lacks"):
            curves([{"step": 0, "phase": "dense"}, record], tmp_path / "curves.png")

    @pytest.mark.parametrize(("layers", "domains"), [(1, 1), (4, 4), (28, 6)])
    def test_expert_by_domain(self, tmp_path: Path, layers: int, domains: int) -> None:
        names = ["code $x_1$", "tales", "a name that is far too long for a label", "law", "news", "talk"][:domains]
        usage = usage_counts(layers, domains, 32)
        expert_by_domain(usage, names, tmp_path / "usage.png")
        check_picture(tmp_path / "usage.png")
        assert torch.equal(usage, usage_counts(layers, domains, 32))

    def test_expert_by_domain_does_not_depend_on_the_numbers_of_the_experts(self, tmp_path: Path) -> None:
        usage = usage_counts(2, 3, 12)
        expert_by_domain(usage, ["a", "b", "c"], tmp_path / "usage.png")
        expert_by_domain(usage.flip(2), ["a", "b", "c"], tmp_path / "flipped.png")
        assert check_picture(tmp_path / "usage.png") == check_picture(tmp_path / "flipped.png")

    def test_expert_by_domain_without_a_token(self, tmp_path: Path) -> None:
        expert_by_domain(torch.zeros(2, 3, 10), ["a", "b", "c"], tmp_path / "usage.png")
        check_picture(tmp_path / "usage.png")

    def test_expert_by_domain_refuses_a_wrong_number_of_names(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"expected 3 names of domains, got \['a'\]"):
            expert_by_domain(usage_counts(2, 3, 12), ["a"], tmp_path / "usage.png")

    @pytest.mark.parametrize("per_layer", [True, False])
    @pytest.mark.parametrize(
        "surprise",
        [
            usage_counts(4, 1, 32)[:, 0] / 1e5,
            torch.full((3, 10), NAN),
            torch.zeros(3, 10),
            torch.full((1, 10), 0.25, dtype=torch.bfloat16),
            torch.tensor([[NAN, 1.0, math.inf], [NAN, NAN, NAN]]),
            (torch.arange(28 * 32.0).reshape(28, 32) / 90).neg().exp(),
        ],
        ids=["usual", "nan", "zero", "constant", "dead layer", "large"],
    )
    def test_surprise_map(self, tmp_path: Path, surprise: Tensor, per_layer: bool) -> None:
        surprise_map(surprise, tmp_path / "surprise.png", per_layer=per_layer)
        check_picture(tmp_path / "surprise.png")

    def test_nan_looks_different_from_zero(self, tmp_path: Path) -> None:
        values = torch.rand(4, 32, generator=torch.Generator().manual_seed(0))
        pictures = []
        for name, odd in (("nan", NAN), ("zero", 0.0)):
            values[1, 2] = odd
            surprise_map(values, tmp_path / f"{name}.png", per_layer=False)
            pictures.append(check_picture(tmp_path / f"{name}.png"))
        assert pictures[0] != pictures[1]

    def test_matplotlib_keeps_its_settings(self, tmp_path: Path) -> None:
        before = dict(matplotlib.rcParams)
        surprise_map(torch.rand(2, 10), tmp_path / "surprise.png", per_layer=True)
        assert dict(matplotlib.rcParams) == before
