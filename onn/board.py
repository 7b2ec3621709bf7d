"""TensorBoard events, written by the step: nothing waits in a queue, so that a killed process loses nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import matplotlib
import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary

from onn import check

_PREFIX = "events.out.tfevents."
BUCKETS = 16
"""Of a histogram."""
CELL = 8
"""Pixels of a heat map's cell."""


class Board:
    """Context manager that appends events to `folder`, which TensorBoard shows as one run.

    Opened at a step, it takes back whatever the folder holds of that step and later ones, so that a run which continues
    from a checkpoint shows the same as one that never stopped. The names of the files tell the step they begin with.
    """

    def __init__(self, folder: Path, *, step: int, seconds: float) -> None:
        """Open a new file for the events from `step` on; `seconds` is the time of day since 1970."""
        check.instance("Board", "folder", folder, Path)
        _check_place("Board", step, seconds)
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"{_PREFIX}*"):
            begin = path.name.removeprefix(_PREFIX)
            if begin.isdecimal() and int(begin) >= step:
                path.unlink()
        self._file = (folder / f"{_PREFIX}{step:010d}").open("wb")
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=seconds, file_version="brain.Event:2"))
        self._write(Event(wall_time=seconds, step=step, session_log=SessionLog(status=SessionLog.START)))

    def write(
        self,
        step: int,
        *,
        seconds: float,
        scalars: Mapping[str, float],
        histograms: Mapping[str, Tensor],
        images: Mapping[str, Tensor],
    ) -> None:
        """Append one step; it has reached the file when the call returns.

        Args:
            step: of all values.
            seconds: the time of day since 1970.
            scalars: by tag.
            histograms: values of any shape by tag; what is not finite is left out, and a tag without values.
            images: [rows, columns, 3] uint8 by tag.

        Raises:
            ValueError: a value is not of its kind; nothing is written.
        """
        _check_place("Board.write", step, seconds)
        for kind, tagged in (("scalars", scalars), ("histograms", histograms), ("images", images)):
            check.instance("Board.write", kind, tagged, Mapping)
            for tag in tagged:
                check.instance("Board.write", f"every tag of {kind}", tag, str)
        values = [Summary.Value(tag=tag, simple_value=_scalar(tag, value)) for tag, value in scalars.items()]
        for tag, numbers in histograms.items():
            _check_values(f"histogram {tag}", numbers, "real")
            finite = numbers.detach().to("cpu", torch.float64)
            finite = finite[finite.isfinite()]
            if finite.numel():
                values.extend(summary.histogram(tag, finite.numpy(), BUCKETS).value)
        for tag, pixels in images.items():
            _check_values(f"image {tag}", pixels, "integer")
            check.shapes("Board.write", (f"image {tag}", pixels, "R C 3"))
            fits = pixels.dtype == torch.uint8 and pixels.numel() > 0
            check.require(
                fits, f"Board.write: image {tag} {list(pixels.shape)} of {pixels.dtype} is no uint8, or empty."
            )
            values.extend(summary.image(tag, pixels.cpu().numpy(), dataformats="HWC").value)
        self._write(Event(wall_time=seconds, step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
        self._file.flush()

    def __enter__(self) -> Self:
        """Return the board."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self._file.close()


def _check_place(where: str, step: int, seconds: float) -> None:
    check.whole(where, "step", step, 0, 2**62)
    check.between(where, "seconds", seconds, 0, check.LARGEST)


def _scalar(tag: str, value: float) -> float:
    """NaN and the infinities are shown; an integer that no float holds is not."""
    check.instance("Board.write", f"scalar {tag}", value, int, float)
    check.require(not isinstance(value, int) or abs(value) <= check.LARGEST, f"Board.write: scalar {tag} is too large.")
    return value


def _check_values(name: str, tensor: Tensor, kind: str) -> None:
    check.holds("Board.write", name, tensor, kind)
    check.require(not tensor.is_meta, f"Board.write: expected {name} with values, got it on meta.")


def routing_image(active: Tensor) -> Tensor:
    """A heat map of `active` [L, E], the tokens of each expert, for `Board.write`: [8 L, 8 E, 3] uint8.

    A cell is the expert's part of its layer's pairs against the uniform part, on a logarithmic scale from an eighth
    (purple) to eight times (orange); grey: no token.
    """
    counts = check.counts("routing_image", "active", active, "L E")
    share = counts / counts.sum(dim=1, keepdim=True).clamp(min=1) * counts.shape[1]
    place = (share.log2() / (2 * math.log2(8)) + 0.5).clamp(0, 1).where(counts > 0, torch.nan)
    colours = matplotlib.colormaps["PuOr_r"].with_extremes(bad="0.6")(place.numpy(), bytes=True)
    cells = torch.from_numpy(colours)[..., :3]
    return cells.repeat_interleave(CELL, dim=0).repeat_interleave(CELL, dim=1)
