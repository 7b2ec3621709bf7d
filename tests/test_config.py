from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import presets
from experiments.presets import PRESETS, TINY, RunConfig
from onn.config import Value, from_dict, to_dict

SAVED = Path(__file__).parent / "configs"
"""Configurations as every version so far has written them: `v{version}-{preset}.json`. Never edit one; add the next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    rate: float
    note: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole:
    name: str
    size: int
    share: float
    on: bool
    kind: Literal["token", "batch"]
    folder: Path
    source: Path | None
    part: Part
    other: Part | None


GOOD = Whole(
    name="n",
    size=3,
    share=0.5,
    on=True,
    kind="batch",
    folder=Path("a/b"),
    source=None,
    part=Part(rate=1.0, note=None),
    other=Part(rate=2.0, note="x"),
)


def wholes() -> st.SearchStrategy[Whole]:
    numbers = st.floats(allow_nan=False, allow_infinity=False)
    parts = st.builds(Part, rate=numbers, note=st.none() | st.text())
    paths = st.text("ab/. ", max_size=6).map(Path)
    return st.builds(
        Whole,
        name=st.text(),
        size=st.integers(),
        share=numbers,
        on=st.booleans(),
        kind=st.sampled_from(["token", "batch"]),
        folder=paths,
        source=st.none() | paths,
        part=parts,
        other=st.none() | parts,
    )


def through_json(values: Mapping[str, Value]) -> dict[str, Value]:
    read: dict[str, Value] = json.loads(json.dumps(values))
    return read


def changed(**values: Value) -> dict[str, Value]:
    return to_dict(GOOD) | values


@given(config=wholes())
def test_from_dict_undoes_to_dict_through_json_types_included(config: Whole) -> None:
    back = from_dict(Whole, through_json(to_dict(config)), where="file")
    assert back == config
    for field in fields(Whole):
        assert type(getattr(back, field.name)) is type(getattr(config, field.name))


def test_plain_values_are_nested_mappings_and_strings() -> None:
    assert to_dict(GOOD) == {
        "name": "n",
        "size": 3,
        "share": 0.5,
        "on": True,
        "kind": "batch",
        "folder": "a/b",
        "source": None,
        "part": {"rate": 1.0, "note": None},
        "other": {"rate": 2.0, "note": "x"},
    }


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (changed(sise=3), "file: unknown value 'sise'; did you mean 'size'?"),
        (changed(qqqqqqq=3), "file: unknown value 'qqqqqqq'."),
        (changed(part={"rates": 1.0, "note": None}), "file: part: unknown value 'rates'; did you mean 'rate'?"),
        (changed(part={"note": None}), "file: part: missing 'rate' of Part."),
        (changed(part=None), "file: part: expected the values of Part, got None."),
        (changed(part="x"), "file: part: expected the values of Part, got 'x'."),
        (changed(other={"rate": "x", "note": None}), "file: other: rate: expected float, got 'x'."),
        (changed(size="3"), "file: size: expected int, got '3'."),
        (changed(size=3.0), "file: size: expected int, got 3.0."),
        (changed(size=True), "file: size: expected int, got True."),
        (changed(size=None), "file: size: expected int, got None."),
        (changed(share=False), "file: share: expected float, got False."),
        (changed(on=1), "file: on: expected bool, got 1."),
        (changed(on="true"), "file: on: expected bool, got 'true'."),
        (changed(name=3), "file: name: expected str, got 3."),
        (changed(kind="tokens"), "file: kind: expected one of 'token', 'batch', got 'tokens'."),
        (changed(folder=None), "file: folder: expected Path, got None."),
        (changed(source=3), "file: source: expected Path, got 3."),
        ({}, "file: missing 'name', 'size', 'share', 'on', 'kind', 'folder', 'source', 'part', 'other' of Whole."),
    ],
)
def test_a_wrong_value_is_named_with_its_place(values: dict[str, Value], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        from_dict(Whole, through_json(values), where="file")


def test_a_whole_number_is_a_float_and_becomes_one() -> None:
    share = from_dict(Whole, changed(share=2), where="file").share
    assert share == 2.0
    assert type(share) is float


def test_only_configurations_of_plain_values_are_written() -> None:
    for wrong in (3, Whole, {"name": "n"}):
        with pytest.raises(ValueError, match=r"to_dict: expected a configuration, got "):
            to_dict(wrong)

    @dataclass(frozen=True)
    class Odd:
        value: object

    with pytest.raises(ValueError, match=r"to_dict: \(1, 2\) is not a configuration value"):
        to_dict(Odd(value=(1, 2)))


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_comes_back_through_json(name: str) -> None:
    config = PRESETS[name]
    assert config.preset == name
    assert presets.load(through_json(presets.save(config)), where="file") == config
    other = replace(config, data=replace(config.data, path=Path("chats.jsonl")), seed=7)
    assert presets.load(through_json(presets.save(other)), where="file") == other != config


@pytest.mark.parametrize("version", [None, 0, presets.VERSION + 1, "1"])
def test_an_unknown_version_is_refused(version: Value) -> None:
    values = presets.save(TINY) | {"version": version}
    if version is None:
        del values["version"]
    with pytest.raises(ValueError, match=rf"^run\.json: expected version 1 to {presets.VERSION}, got {version!r}\.$"):
        presets.load(values, where="run.json")


def read(path: Path) -> dict[str, Value]:
    values: dict[str, Value] = json.loads(path.read_text(encoding="utf-8"))
    return values


@pytest.mark.parametrize("path", sorted(SAVED.glob("*.json")), ids=lambda path: str(path.stem))
def test_a_configuration_saved_by_any_version_still_loads(path: Path) -> None:
    values = read(path)
    config = presets.load(values, where=path.name)
    assert path.stem == f"v{values['version']}-{config.preset}"
    assert presets.load(through_json(presets.save(config)), where="again") == config


def test_every_version_has_kept_a_configuration() -> None:
    kept = {read(path)["version"] for path in SAVED.glob("*.json")}
    assert kept == set(range(1, presets.VERSION + 1))


def test_the_kept_configuration_of_this_version_has_every_value_that_is_saved() -> None:
    """Fails for a field that is added, renamed or dropped while `VERSION` stays: raise it and upgrade the older."""

    def names(values: Mapping[str, Value], at: str = "") -> set[str]:
        found = {f"{at}{name}" for name in values}
        return found.union(*(names(part, f"{at}{name}.") for name, part in values.items() if isinstance(part, dict)))

    (path,) = SAVED.glob(f"v{presets.VERSION}-tiny.json")
    assert names(read(path)) == names(presets.save(TINY))


def test_the_first_version_means_what_it_meant() -> None:
    config = presets.load(read(SAVED / "v1-tiny.json"), where="v1-tiny.json")
    assert isinstance(config, RunConfig)
    assert (config.seed, config.data.path, config.checkpoint.folder) == (0, None, Path("weights"))
    assert (config.model.hidden_size, config.model.num_hidden_layers, config.model.intermediate_size) == (128, 4, 512)
    assert (config.sparse.moe.num_experts, config.sparse.moe.min_k, config.sparse.granularity) == (32, 4, "token")
    assert (config.sparse.router.temperature, config.sparse.density.target) == (0.05, 0.25)
    assert (config.optim.lr, config.pretrain.lr, config.train.dtype) == (0.002, 0.003, "bfloat16")
    moe, distill = config.sparse.moe, config.sparse.distill
    assert (moe.route, moe.squash, moe.combine, moe.fallback_k, distill.weight) == (
        "threshold",
        "sigmoid",
        "sum",
        1,
        0.0,
    )


def test_before_there_were_checkpoints_none_was_written_and_every_step_could_be_skipped() -> None:
    train = presets.load(read(SAVED / "v2-tiny.json"), where="v2-tiny.json").train
    assert (train.checkpoint_every, train.on_non_finite, train.max_skipped) == (0, "skip", 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"seed": NaN}', "not JSON"),
        (b"[]", "expected an object"),
        (b'{"train": {"steps": [1]}}', "train: steps: expected no list"),
    ],
)
def test_a_file_that_holds_no_configuration_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {message}"):
        presets.read(path)


def test_an_upgrade_adds_values_and_changes_none() -> None:
    old = read(SAVED / "v1-tiny.json")
    new = presets.save(presets.load(old, where="v1-tiny.json"))

    def contained(part: Mapping[str, Value], whole: Mapping[str, Value]) -> bool:
        return all(
            contained(value, inner) if isinstance(value, dict) and isinstance(inner, dict) else value == inner
            for value, inner in ((value, whole[name]) for name, value in part.items())
        )

    assert contained(old | {"version": presets.VERSION}, new)


def test_an_old_configuration_is_read_as_strictly_as_a_new_one() -> None:
    old = read(SAVED / "v1-tiny.json")
    sparse = old["sparse"]
    assert isinstance(sparse, dict)
    moe = sparse["moe"]
    assert isinstance(moe, dict)
    early = old | {"sparse": sparse | {"moe": moe | {"route": "top_k"}}}
    for values, message in (
        (early, "'route' came with a later version"),
        (old | {"sparse": sparse | {"moe": 3}}, "sparse: moe: expected the values of MoeConfig, got 3"),
        ({name: value for name, value in old.items() if name != "sparse"}, "missing 'sparse' of RunConfig"),
        (old | {"sede": 1}, "unknown value 'sede'; did you mean 'seed'"),
    ):
        with pytest.raises(ValueError, match=f"^v1: {message}"):
            presets.load(values, where="v1")
