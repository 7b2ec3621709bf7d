"""Trees of tensors in safetensors files: headers checked before anything is read, files replaced whole.

Nothing is unpickled. A file that is read is not needed afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from onn import check, tree
from onn.config import parse_json
from onn.tree import T, Tree

Shapes: TypeAlias = Mapping[str, Sequence[int]]
"""Of tensors, by name."""


DTYPES = frozenset({"BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64"})
"""What is read, as safetensors spells it: formats that have arithmetic."""
FLOATS = frozenset({"F16", "BF16", "F32", "F64"})


class Stored(NamedTuple):
    """One tensor in a file."""

    file: Path
    name: str
    shape: Sequence[int]
    dtype: str
    """As safetensors spells it: `BF16`."""


class _Slice(Protocol):
    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...


class _Reader(Protocol):
    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> _Slice: ...
    def get_tensor(self, name: str) -> Tensor: ...


@contextmanager
def _open(path: Path) -> Iterator[_Reader]:
    check.require(os.path.isfile(path), f"{path}: no such file.")
    try:
        with safe_open(path, framework="pt") as reader:
            yield cast("_Reader", reader)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}.") from error


def headers(files: Sequence[Path]) -> dict[str, Stored]:
    """Every tensor of some files, by name.

    Raises:
        ValueError: a file does not exist or is not a whole safetensors file, or a name comes twice, in one file or two.
    """
    stored: dict[str, Stored] = {}
    for file in files:
        with _open(file) as reader:
            _refuse_repeated_names(file)
            for name in reader.keys():  # noqa: SIM118
                check.require(name not in stored, f"{file}: another file holds {check.shown(name)} as well.")
                view = reader.get_slice(name)
                dtype = view.get_dtype()
                check.require(dtype in DTYPES, f"{file}: {check.shown(name)}: dtype {dtype} is not supported.")
                stored[name] = Stored(file=file, name=name, shape=view.get_shape(), dtype=dtype)
    return stored


def _refuse_repeated_names(file: Path) -> None:
    """The reader takes the last of two entries of one name; such a file was not written by anybody in good faith."""
    with file.open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
    parse_json(header.decode(errors="replace"), where=str(file))


def check_shapes(where: str, found: Shapes, expected: Shapes) -> None:
    """Raise `ValueError` at the first tensor that is missing, of another shape, or not expected."""
    unknown = [name for name in found if name not in expected]
    for name, shape in expected.items():
        check.require(name in found, f"{where}: {name} {list(shape)} is missing{check.nearest(name, unknown) or '.'}")
        check.require(
            list(found[name]) == list(shape),
            f"{where}: {name}: expected shape {list(shape)}, found {list(found[name])}.",
        )
    for name in unknown:
        shown = name if name.isprintable() and len(name) <= 200 else check.shown(name)
        raise ValueError(f"{where}: {shown} {list(found[name])} is not expected.")


def shapes(stored: Mapping[str, Stored]) -> Shapes:
    """What the headers say of them."""
    return {name: tensor.shape for name, tensor in stored.items()}


def read(stored: Stored) -> Tensor:
    """A tensor with memory of its own, on the CPU.

    The file is mapped for this tensor alone: pages that stay mapped would count as a second copy of the model.
    """
    with _open(stored.file) as reader:
        return reader.get_tensor(stored.name).clone()


def same_bits(first: Stored, second: Stored) -> bool:
    """Two tensors of the same shape hold the same bytes; neither is copied."""
    with _open(first.file) as a, _open(second.file) as b:
        return torch.equal(a.get_tensor(first.name).view(torch.uint8), b.get_tensor(second.name).view(torch.uint8))


def write(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write one file, whole or not at all: under a temporary name, flushed to the disk, renamed.

    Tensors of any strides and any device are written, with every bit kept; those that share memory once each.

    Raises:
        ValueError: a key or value of `metadata` is not a string, or the folder does not exist.
        OSError: the disk is full, or the folder cannot be written.
    """
    for item in metadata.items():
        check.require(
            all(isinstance(text, str) for text in item), f"{path}: expected strings in metadata, got {item!r}."
        )
    check.require(path.parent.is_dir(), f"{path.parent}: no such folder.")
    partial = path.with_name(f"{path.name}.partial")
    partial.touch()
    mode = partial.stat().st_mode  # safetensors makes files that their owner alone may read
    try:
        save_file(_apart(tensors), partial, metadata=dict(metadata))
        partial.chmod(mode)
        flush(partial)
        partial.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8, line ends as they are), whole or not at all, as `write` does."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(text.encode())
        flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    flush(path.parent)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, and no two in the same memory: safetensors takes nothing else."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        packed = tensor.detach().contiguous()
        place = packed.untyped_storage().data_ptr()
        apart[name] = packed.clone() if place in seen else packed
        seen.add(place)
    return apart


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(model: Tree, path: Path, metadata: Mapping[str, str]) -> None:
    """`write` every tensor of a tree under its dotted path (`tree.paths`).

    Leaves that share memory are apart when restored. A tied head is no leaf of a model, and so not written.

    Args:
        model: dense or carved, or another tree.
        path: a file in a folder that exists; an older one is replaced.
        metadata: anything, for whoever looks at the file.

    Raises:
        ValueError: as `write`.
    """
    write(dict(zip(tree.paths(model), tree.leaves(model), strict=True)), path, metadata)


def restore(path: Path, *, like: T) -> T:
    """The tree that `save` wrote, bit for bit, on the CPU.

    Args:
        path: the file.
        like: names and shapes, such as `carve.carve(qwen3.abstract(config), num_experts=E)`; of its dtypes it matters
            which are floating, and `meta` will do.

    Raises:
        ValueError: not a whole safetensors file, or a tensor is missing, not expected, of another shape, or an integer
            where a number with a fraction belongs, or the other way round.
    """
    stored, names = headers([path]), tree.paths(like)
    check_shapes(
        str(path), shapes(stored), {name: leaf.shape for name, leaf in zip(names, tree.leaves(like), strict=True)}
    )
    for name, leaf in zip(names, tree.leaves(like), strict=True):
        dtype = stored[name].dtype
        check.require(
            (dtype in FLOATS) == leaf.is_floating_point(),
            f"{path}: {name}: expected {leaf.dtype}, found dtype {dtype}.",
        )
    return tree.unflatten(like, [read(stored[name]) for name in names])
