"""Calibration: a valid tiling, measured once for each size and machine, kept in a strict file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import onn.functional as F
from experiments import calibrating, pipeline, presets, run
from experiments.presets import TINY, RunConfig, bank_sizes, tiled
from onn import calibration
from onn.calibration import DENSITIES, ENTRIES, NEVER, Sizes, calibrate, calibrated, kept
from onn.functional.kernels import native
from onn.functional.kernels.backends import Groupable
from onn.functional.kernels.cutting import parts
from onn.functional.kernels.native_bank import pairs_of
from onn.functional.kernels.parts import Whole, active_pairs
from onn.functional.kernels.tilings import NATIVE
from onn.observe import Json, encode
from onn.qwen3 import Moe, moe_forward
from onn.tiling import backend_of, tiling_name
from tests.support import BOUND, assert_close, needs_native, normal
from tests.test_qwen3 import MOE


def small(path: Path, *, width: int = 2) -> F.Tiling:
    return calibrated(path, num_experts=4, width=width, hidden=8, tokens=6, dtype=torch.float32, repeats=1)


def test_a_tiling_is_measured_once_and_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "calibration.json"
    first = small(path)
    assert first.entries in (NATIVE, *ENTRIES)
    assert first.whole_from in (*DENSITIES, 1.0)
    other = small(path, width=3)
    assert len(json.loads(path.read_text())) == 2
    monkeypatch.setattr(calibration, "calibrate", lambda **sizes: pytest.fail("measured again"))
    assert small(path) == first
    assert small(path, width=3) == other


@pytest.mark.parametrize(("why", "fastest"), [("none here", ENTRIES[1]), ("", ENTRIES[1]), ("", NATIVE)])
def test_the_fastest_of_each_comparison_wins(why: str, fastest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[F.Tiling, float]] = []

    def step(tiling: F.Tiling, density: float, *args: object, **sizes: object) -> object:
        asked.append((tiling, density))
        return tiling, density

    def seconds(step: tuple[F.Tiling, float]) -> float:
        tiling, density = step
        if tiling.whole_from == 0:
            return 0.5 if density >= 0.5 else 2.0
        return 1.0 + abs(tiling.entries - fastest)

    monkeypatch.setattr(native, "why_not", lambda dtype, device: why)
    monkeypatch.setattr(calibration, "_step", step)
    monkeypatch.setattr(calibration, "_seconds", seconds)
    sizes = {"num_experts": 4, "width": 2, "hidden": 8, "tokens": 6, "repeats": 3}
    assert calibrate(**sizes, dtype=torch.float32) == F.Tiling(fastest, 0.55)
    assert {tiling.entries for tiling, _ in asked} == {*ENTRIES, *(() if why else (NATIVE,))}


@needs_native
def test_the_shares_that_are_compared_compute_all_pairs_or_none_but_the_active() -> None:
    weights = normal(0, 6, 4) * (normal(1, 6, 4) > 0)
    for chosen in (weights, torch.ones_like(weights)):
        assert pairs_of(chosen, F.Tiling(NATIVE, NEVER)) is not None
        assert pairs_of(chosen, F.Tiling(NATIVE, 0.0)) is None
        cut = parts(active_pairs(chosen), tokens=6, width=2, hidden=8, tiling=F.Tiling(NATIVE, 0.0))
        assert {type(part) for part in cut} == {Whole}


def test_what_was_measured_without_native_code_is_measured_again_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "calibration.json"
    for count, why in ((1, "none here"), (2, "")):
        monkeypatch.setattr(native, "why_not", lambda dtype, device, why=why: why)
        monkeypatch.setattr(calibration, "calibrate", lambda count=count, **sizes: F.Tiling(count, 0.5))
        assert small(path) == F.Tiling(count, 0.5)
        assert len(json.loads(path.read_text())) == count


@pytest.mark.parametrize("text", ["", "[]", "{", "NaN", '{"a": NaN}'])
def test_a_file_that_is_no_calibration_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"calibration\.json: not a calibration"):
        small(path)


@pytest.mark.parametrize("entry", ['{"entries": 1.5, "whole_from": 0.5}', '{"entries": 3}', '{"entries": true}'])
def test_an_entry_that_is_no_tiling_is_named(tmp_path: Path, entry: str) -> None:
    path = tmp_path / "calibration.json"
    small(path)
    (key,) = json.loads(path.read_text())
    path.write_text(f'{{"{key}": {entry}}}')
    with pytest.raises(ValueError, match="expected entries, a whole number"):
        small(path)


def test_sizes_are_positive() -> None:
    with pytest.raises(ValueError, match="calibrate: expected positive sizes, got E=0"):
        calibrate(num_experts=0, width=1, hidden=1, tokens=1, dtype=torch.float32, repeats=1)


def test_a_kept_tiling_is_the_one_that_was_measured_and_another_size_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    sizes = Sizes(num_experts=4, width=2, hidden=8, tokens=6, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"calibration\.json: no tiling for E 4, I 2, H 8, T 6, torch\.float32, "):
        kept(path, sizes)
    assert not path.exists()
    assert small(path) == kept(path, sizes)
    for other in (Sizes(**sizes | {"tokens": 7}), Sizes(**sizes | {"dtype": torch.bfloat16})):
        with pytest.raises(ValueError, match="no tiling for E 4"):
            kept(path, other)


@given(entries=st.integers(NATIVE), whole_from=st.floats(0, allow_infinity=False))
def test_a_tiling_comes_back_from_its_name(entries: int, whole_from: float) -> None:
    tiling = F.Tiling(entries, abs(whole_from))
    assert backend_of(tiling_name(tiling)) == tiling


@pytest.mark.parametrize("name", get_args(F.Backend))
def test_a_backends_name_is_that_backend(name: str) -> None:
    assert backend_of(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *("loop:", "loop:3", "loop:3:", "loop:3:0.5:1", "loop:-1:0.5", "loop:3:-0.5", "loop:3:nan", "loop:3:inf"),
        *("loop:1_0:0.5", "loop: 3:0.5", "loop:3:.5", "loop:3.0:0.5", "loop:three:0.5", f"loop:{'9' * 5000}:0.5"),
        *("native:", "native:3:0.5", "native:-1:0.5", "native:-0.5", "native:nan", "native:inf", "native:.5"),
    ],
)
def test_what_no_tiling_is_called_is_refused(name: str) -> None:
    kind, _, _ = name.partition(":")
    with pytest.raises(ValueError, match=rf"^MoeConfig: expected backend='{kind}:.* as loop:ENTRIES:SHARE or native:"):
        replace(MOE, backend=name)


@pytest.mark.parametrize("known", ["auto", "grouped"])
def test_a_bound_is_written_after_its_backend_and_fits_the_route(known: Groupable) -> None:
    threshold, top_k = (replace(MOE, route=route, top_k=3) for route in ("threshold", "top_k"))
    for config, fitting in ((threshold, (1, MOE.num_experts)), (top_k, (3, MOE.num_experts))):
        for bound in fitting:
            assert backend_of(replace(config, backend=f"{known}:{bound}").backend) == F.Bounded(known, bound)
    for config, wrong in ((threshold, MOE.num_experts + 1), (top_k, 2)):
        with pytest.raises(
            ValueError, match=rf"^MoeConfig: expected . <= backend='{known}:{wrong}': experts={wrong} <= "
        ):
            replace(config, backend=f"{known}:{wrong}")
    for text in ("", "0", "-1", "3:0.5", "3.0", " 3", "1_0", "٣", "9" * 5000):
        with pytest.raises(ValueError, match=rf"^MoeConfig: expected backend='{known}:.* as {known}:EXPERTS, such as"):
            replace(MOE, backend=f"{known}:{text}")


@pytest.mark.parametrize("name", ["", "dens", "Loop:3:0.5", "groupe:3", "natives:0.5", "dense:3"])
def test_an_unknown_backend_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^MoeConfig: unknown backend={name!r}"):
        replace(MOE, backend=name)


@pytest.mark.parametrize(
    "backend", ["loop:40:0.5", "loop:1000000:2.0", pytest.param("native:0.85", marks=needs_native)]
)
def test_a_carved_layer_computes_by_the_tiling_that_its_configuration_names(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    E, I, H = MOE.num_experts, 3, 8
    experts = F.Experts(*(normal(seed, E, I, H) for seed in range(3)))
    moe = Moe(experts=experts, router=F.Router(prototypes=normal(3, E, H), thresholds=normal(4, E)))
    taken: list[object] = []

    def watched(*args: object, backend: object, min_k: int) -> torch.Tensor:
        taken.append(backend)
        return normal(6, 7, H)

    def layer(x: torch.Tensor, backend: str) -> torch.Tensor:
        return moe_forward(moe, x, {}, config=replace(MOE, backend=backend))[0]

    expected = layer(normal(5, 7, H), "dense")
    assert_close(layer(normal(5, 7, H), backend), expected, bound=BOUND)
    torch._dynamo.reset()
    config = replace(MOE, backend=backend)
    compiled = torch.compile(moe_forward, fullgraph=True, backend="aot_eager")
    assert_close(compiled(moe, normal(5, 7, H), {}, config=config)[0], expected, bound=BOUND)
    monkeypatch.setattr("onn.qwen3.bank", watched)
    layer(normal(5, 7, H), backend)
    assert taken == [backend_of(backend)]


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a tiling for `tiny`, made by its command line with nothing measured."""
    monkeypatch.setattr(calibration, "calibrate", lambda **settings: F.Tiling(4096, 0.55))
    path = tmp_path / "tilings.json"
    assert calibrating.main(["tiny", "--file", str(path)]) == 0
    return path


def test_the_command_line_measures_for_the_sizes_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Mapping[str, object]] = []

    def calibrate(**settings: object) -> F.Tiling:
        asked.append(settings)
        return F.Tiling(4096, 0.55)

    monkeypatch.setattr(calibration, "calibrate", calibrate)
    path = tmp_path / "tilings.json"
    for _ in range(2):
        assert calibrating.main(["--file", str(path), "--repeats", "3", "--data.batch-size", "2"]) == 0
        assert "loop:4096:0.55\nuv run experiments/run.py tiny --calibration" in capsys.readouterr().out
    (settings,) = asked
    assert settings == {
        "num_experts": 32,
        "width": 16,
        "hidden": 128,
        "tokens": 256,
        "dtype": torch.bfloat16,
        "repeats": 3,
    }
    assert calibrating.main(["tinny"]) == 2
    assert "did you mean 'tiny'" in capsys.readouterr().err


def test_a_run_takes_a_measured_tiling_into_its_configuration(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured: list[RunConfig] = []

    def pretended(config: RunConfig, folder: Path, *, command: str) -> Mapping[str, Json]:
        configured.append(config)
        folder.mkdir()
        (folder / "config.json").write_text(encode(presets.save(config), indent=2))
        return {}

    monkeypatch.setattr(run, "run", pretended)
    monkeypatch.setattr(run, "summary_table", lambda summary: "")
    assert run.main(["--calibration", str(measured), "--out", str(tmp_path / "run"), "--seed", "3"]) == 0
    moe = replace(TINY.sparse.moe, backend="loop:4096:0.55")
    expected = replace(TINY, seed=3, sparse=replace(TINY.sparse, moe=moe))
    assert configured == [expected]
    measured.unlink()
    assert pipeline.saved_config(tmp_path / "run") == expected


def test_a_file_without_this_size_is_refused_and_the_message_says_how_to_measure_it(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiled(TINY, measured).sparse.moe.backend == "loop:4096:0.55"
    for path, values in ((measured, ["--data.batch-size", "2"]), (tmp_path / "none.json", [])):
        assert run.main(["--calibration", str(path), "--out", str(tmp_path / "run"), *values]) == 2
        assert re.search(
            r"^error: .*: no tiling for E 32, I 16, H 128, .*calibrating\.py --file", capsys.readouterr().err
        )
    assert not (tmp_path / "run").exists()
    assert run.main(["--resume", str(tmp_path), "--calibration", str(measured)]) == 2
    assert "brings its own configuration" in capsys.readouterr().err


def test_the_sizes_of_a_run_follow_its_values() -> None:
    wide = replace(TINY, train=replace(TINY.train, dtype="float32"), data=replace(TINY.data, sequence_length=8))
    assert bank_sizes(wide) == Sizes(num_experts=32, width=16, hidden=128, tokens=16 * 8, dtype=torch.float32)
