"""Checkpoints: folders of safetensors and text files and a manifest of their sizes and checksums, whole or not there.

A folder is written under a temporary name, flushed to the disk and renamed. What is read has been verified, to the
byte, and lies in the folder itself. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from onn import check, storage, tree
from onn.observe import Json, decode, encode
from onn.tree import T, Tree

MANIFEST = "manifest.json"
PARTIAL = ".partial"
"""Ends the name of a folder that is being written, or was when the writer died."""
FORMAT = 1
_LARGEST_MANIFEST = 2**24
_SUFFIX = ".safetensors"


class Checkpoint(NamedTuple):
    """A folder that was found whole."""

    folder: Path
    facts: Mapping[str, Json]
    """As `write` was told."""


def write(folder: Path, trees: Mapping[str, Tree], *, texts: Mapping[str, str], facts: Mapping[str, Json]) -> None:
    """Write a checkpoint. At every moment, also of a crash, `folder` is whole or is not there.

    Args:
        folder: new, or replaced; the folder around it exists.
        trees: each becomes a safetensors file of this name, under `tree.paths`.
        texts: each becomes a file of exactly this name.
        facts: whatever else must be known; NaN and the infinities become null.

    Raises:
        OSError: the disk is full, or the folder cannot be written; nothing is left of the attempt.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        for name, part in trees.items():
            storage.save(part, partial / f"{name}{_SUFFIX}", metadata={})
        for name, text in texts.items():
            storage.write_text(partial / name, text)
        files: dict[str, Json] = {path.name: _entry(path) for path in sorted(partial.iterdir())}
        storage.write_text(partial / MANIFEST, sealed({"format": FORMAT, "facts": facts, "files": files}))
        remove(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    storage.flush(folder.parent)


def remove(folder: Path) -> None:
    """Remove a checkpoint if it is there: it is whole or gone, never half."""
    if folder.exists():
        gone = folder.with_name(f"{folder.name}.gone{PARTIAL}")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone)


def clean(home: Path) -> None:
    """Remove what writers that died have left among the checkpoints in a folder; no other may be at work there."""
    for left in home.glob(f"*{PARTIAL}"):
        shutil.rmtree(left)


def verify(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, of which every byte was compared with the manifest.

    Raises:
        ValueError: a file is missing, too many, cut off or changed, the manifest included, or cannot be read.
    """
    try:
        return _verified(folder)
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror or error}.") from error
    except RecursionError as error:
        raise ValueError(f"{folder / MANIFEST}: nested too deeply.") from error


def newest(folders: Iterable[Path]) -> tuple[Checkpoint | None, list[str]]:
    """The first of some folders that is whole, and what is wrong with each before it."""
    problems: list[str] = []
    for folder in folders:
        try:
            return verify(folder), problems
        except ValueError as error:
            problems.append(str(error))
    return None, problems


def restore(checkpoint: Checkpoint, name: str, *, like: T) -> T:
    """One of the trees that `write` wrote, bit for bit, on the CPU.

    Args:
        checkpoint: of `verify` or `newest`.
        name: of the tree.
        like: names, shapes and dtypes; its values do not matter, and `meta` will do.

    Raises:
        ValueError: a tensor is missing, not expected, or of another shape or dtype.
    """
    path = checkpoint.folder / f"{name}{_SUFFIX}"
    found = storage.restore(path, like=like)
    for place, got, expected in zip(tree.paths(like), tree.leaves(found), tree.leaves(like), strict=True):
        check.require(got.dtype == expected.dtype, f"{path}: {place}: expected {expected.dtype}, found {got.dtype}.")
    return found


def tensors(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """All tensors of one of the trees by dotted path, whatever they are."""
    stored = storage.headers([checkpoint.folder / f"{name}{_SUFFIX}"])
    return {place: storage.read(entry) for place, entry in stored.items()}


def text(checkpoint: Checkpoint, name: str) -> str:
    """One of the texts."""
    return (checkpoint.folder / name).read_bytes().decode()


def _entry(path: Path) -> Mapping[str, Json]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def sealed(content: Mapping[str, Json]) -> str:
    """The text of a manifest: canonical, and signed with its own checksum."""
    seal = hashlib.sha256(encode(content, indent=2).encode()).hexdigest()
    return encode({**content, "sha256": seal}, indent=2) + "\n"


def _verified(folder: Path) -> Checkpoint:
    path = folder / MANIFEST
    check.require(folder.is_dir(), f"{folder}: no such folder.")
    check.require(path.is_file() and not path.is_symlink(), f"{path}: no such file.")
    check.require(path.stat().st_size <= _LARGEST_MANIFEST, f"{path}: too large for a manifest.")
    raw = path.read_bytes()
    try:
        manifest = decode(raw.decode())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}.") from error
    facts, files = (manifest.get(key) if isinstance(manifest, Mapping) else None for key in ("facts", "files"))
    if not isinstance(manifest, Mapping) or not isinstance(facts, Mapping) or not isinstance(files, Mapping):
        raise ValueError(f"{path}: expected the objects 'facts' and 'files'.")
    check.require(
        manifest.get("format") == FORMAT,
        f"{path}: expected format {FORMAT}, found {check.shown(manifest.get('format'))}.",
    )
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    check.require(sealed(content).encode() == raw, f"{path}: its checksum does not fit; it was changed.")
    found = {entry.name for entry in folder.iterdir()} - {MANIFEST}
    for name in sorted(found - set(files)):
        raise ValueError(f"{folder / name}: not in the manifest.")
    for name, expected in files.items():
        file = folder / name
        plain = Path(name).name == name and name in found and file.is_file() and not file.is_symlink()
        check.require(plain, f"{folder}: {check.shown(name)} is missing, or no plain file.")
        got = _entry(file)
        check.require(got == expected, f"{file}: expected {_shown(expected)}, found {_shown(got)}.")
    return Checkpoint(folder=folder, facts=facts)


def _shown(entry: Json) -> str:
    return check.shown(encode(entry, indent=None), quoted=False, longest=200)
