"""Checkpoints as folders: what is written is read to the bit, whole or not at all, and no change goes unseen."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import Tensor

from onn import checkpoint, storage
from onn.observe import Json
from onn.tree import Tree
from tests.checkpoints import SMALL, any_bits, assert_same_bits
from tests.support import normal

FACTS: Mapping[str, Json] = {"step": 3, "rate": 0.1, "names": ["a", "ß"], "deep": {"none": None, "on": True}}


def parts(seed: int) -> dict[str, Tree]:
    return {
        "model": any_bits(SMALL, dtype=torch.bfloat16, seed=seed),
        "rest": (normal(seed, 3), torch.arange(4), torch.tensor([True, False]), torch.zeros(5, dtype=torch.uint8)),
    }


def written(folder: Path, seed: int = 0) -> Path:
    checkpoint.write(folder, parts(seed), texts={"log.jsonl": '{"a": 1}\r\n\n'}, facts=FACTS)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "one"
    checkpoint.write(folder, {"part": {"a": normal(0, 2), "b": torch.arange(3)}}, texts={"t": "x\n"}, facts=FACTS)
    return folder


@given(seed=st.integers(0, 2**20))
def test_what_is_written_is_read_to_the_bit(tmp_path: Path, seed: int) -> None:
    found = checkpoint.verify(written(tmp_path / f"c{seed}", seed))
    for name, part in parts(seed).items():
        assert_same_bits(checkpoint.restore(found, name, like=part), part)
    assert found.facts == FACTS
    assert checkpoint.text(found, "log.jsonl") == '{"a": 1}\r\n\n'
    tensors = checkpoint.tensors(found, "rest")
    assert sorted(tensors) == ["0", "1", "2", "3"]
    assert torch.equal(tensors["1"], torch.arange(4))


def test_a_folder_holds_safetensors_texts_and_their_checksums(whole: Path) -> None:
    manifest = json.loads((whole / checkpoint.MANIFEST).read_text())
    assert {path.name for path in whole.iterdir()} == {"part.safetensors", "t", checkpoint.MANIFEST}
    for name, entry in manifest["files"].items():
        content = (whole / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@given(data=st.data(), bits=st.integers(1, 255))
def test_every_single_flipped_byte_is_caught(whole: Path, tmp_path: Path, data: st.DataObject, bits: int) -> None:
    name = data.draw(st.sampled_from(sorted(path.name for path in whole.iterdir())))
    content = bytearray((whole / name).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= bits
    folder = shutil.copytree(whole, tmp_path / "copy", dirs_exist_ok=True)
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(name)):
        checkpoint.verify(folder)


def test_no_byte_of_a_manifest_can_be_another(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "copy")
    content = (whole / checkpoint.MANIFEST).read_bytes()
    for place in range(len(content)):
        for other in {ord(" "), ord("\n")} - {content[place]}:
            (folder / checkpoint.MANIFEST).write_bytes(content[:place] + bytes([other]) + content[place + 1 :])
            with pytest.raises(ValueError, match=checkpoint.MANIFEST):
                checkpoint.verify(folder)


@given(data=st.data())
def test_a_file_that_was_cut_off_or_is_missing_is_caught(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(path.name for path in whole.iterdir())))
    content = (whole / name).read_bytes()
    folder = shutil.copytree(whole, tmp_path / "copy", dirs_exist_ok=True)
    (folder / name).write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match=re.escape(name)):
        checkpoint.verify(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=re.escape(name)):
        checkpoint.verify(folder)


def sealed(folder: Path, content: Mapping[str, object]) -> Path:
    """A manifest whose own checksum fits, made without the module under test."""
    text = json.dumps(content, indent=2)
    seal = hashlib.sha256(text.encode()).hexdigest()
    (folder / checkpoint.MANIFEST).write_text(json.dumps({**content, "sha256": seal}, indent=2) + "\n")
    return folder


def entry(content: bytes) -> dict[str, object]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_nothing_is_read_outside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s")
    folder = tmp_path / "one"
    folder.mkdir()
    for name in ("../secret", str(tmp_path / "secret"), "..", "", "a/b", "\0", ".", checkpoint.MANIFEST):
        sealed(folder, {"format": 1, "facts": {}, "files": {name: entry(b"s")}})
        with pytest.raises(ValueError, match="is missing, or no plain file"):
            checkpoint.verify(folder)
    (folder / "link").symlink_to(tmp_path / "secret")
    sealed(folder, {"format": 1, "facts": {}, "files": {"link": entry(b"s")}})
    with pytest.raises(ValueError, match="'link' is missing, or no plain file"):
        checkpoint.verify(folder)
    (folder / "link").unlink()
    checkpoint.verify(sealed(folder, {"format": 1, "facts": {}, "files": {}}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "JSON|nested"),
        ('{"format": 1, "files": {}, "facts": {"a": ' + "[" * 600 + "]" * 600 + "}}", "nested too deeply|checksum"),
        ("[]", "expected the objects"),
        ('{"format": 1, "facts": {}, "files": []}', "expected the objects"),
        ('{"format": 2, "facts": {}, "files": {}}', "expected format 1, found 2"),
        ('{"format": 1, "facts": {}, "files": {}}', "its checksum does not fit"),
        ('{"format": NaN, "facts": {}, "files": {}}', "NaN is not JSON"),
        ('{"format": "\xff"', "not JSON"),
    ],
)
def test_another_manifest_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / checkpoint.MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        checkpoint.verify(tmp_path)


def test_what_cannot_be_read_is_named(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", closed)
    with pytest.raises(ValueError, match=f"^{re.escape(str(whole))}: Permission denied"):
        checkpoint.verify(whole)


def test_a_huge_manifest_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / checkpoint.MANIFEST).open("wb") as file:
        file.truncate(2**32)
    with pytest.raises(ValueError, match="too large"):
        checkpoint.verify(tmp_path)


def test_a_file_too_many_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "copy")
    (folder / "more.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"more\.safetensors: not in the manifest"):
        checkpoint.verify(folder)


def test_at_every_moment_a_checkpoint_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, seen = tmp_path / "one", list[bool]()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        seen.append(folder.exists())
        if folder.exists():
            checkpoint.verify(folder)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    written(folder)
    assert seen.count(True) == 1
    assert seen[-1]
    seen.clear()
    written(folder, seed=1)
    assert all(seen)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert_same_bits(checkpoint.restore(checkpoint.verify(folder), "model", like=parts(1)["model"]), parts(1)["model"])


def test_everything_is_flushed_before_the_folder_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    real, rename = storage.flush, Path.rename

    def flush(path: Path) -> None:
        flushed.append(path.name)
        real(path)

    def renamed(self: Path, target: Path) -> Path:
        flushed.append(f"to {target.name}")
        return rename(self, target)

    monkeypatch.setattr(storage, "flush", flush)
    monkeypatch.setattr(Path, "rename", renamed)
    written(tmp_path / "one")
    files = ("model.safetensors", "rest.safetensors", "log.jsonl", checkpoint.MANIFEST)
    before = flushed[: flushed.index("to one")]
    assert all(f"{name}.partial" in before for name in files)
    assert before[-1] == "one.partial"
    assert flushed[-1] == tmp_path.name


def test_a_failed_write_leaves_the_older_ones_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "one")

    def full(*arguments: object, **settings: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    for name in ("one", "two"):
        with pytest.raises(OSError, match=r"model\.safetensors: No space left"):
            written(tmp_path / name, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    checkpoint.verify(tmp_path / "one")


def test_the_newest_whole_one_is_found_and_the_others_are_named(tmp_path: Path) -> None:
    folders = [written(tmp_path / name) for name in ("c", "b", "a")]
    (folders[0] / "model.safetensors").unlink()
    (folders[1] / "log.jsonl").write_text("")
    found, problems = checkpoint.newest(folders)
    assert found is not None
    assert found.folder == folders[2]
    assert ["c" in problems[0], "log.jsonl" in problems[1], len(problems)] == [True, True, 2]
    assert checkpoint.newest([tmp_path / "gone"]) == (None, [f"{tmp_path / 'gone'}: no such folder."])


def test_what_dead_writers_left_is_cleaned_and_removal_is_whole(tmp_path: Path) -> None:
    written(tmp_path / "one")
    (tmp_path / "two.partial").mkdir()
    (tmp_path / "two.partial" / "model.safetensors").write_bytes(b"half")
    checkpoint.clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    checkpoint.remove(tmp_path / "one")
    checkpoint.remove(tmp_path / "one")
    assert not list(tmp_path.iterdir())


def test_restore_checks_names_shapes_and_dtypes(whole: Path) -> None:
    found = checkpoint.verify(whole)
    like = {"a": normal(0, 2), "b": torch.arange(3)}
    wrong: tuple[tuple[Mapping[str, Tensor], str], ...] = (
        ({"a": like["a"].float(), "b": like["b"]}, r"a: expected torch\.float32, found torch\.float64"),
        ({"a": like["a"], "b": torch.arange(4)}, r"b: expected shape \[4\], found \[3\]"),
        ({"a": like["a"]}, "b .* is not expected"),
        ({**like, "c": like["a"]}, "c .* is missing"),
    )
    for other, message in wrong:
        with pytest.raises(ValueError, match=message):
            checkpoint.restore(found, "part", like=other)
