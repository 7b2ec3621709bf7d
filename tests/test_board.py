from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from onn.board import CELL, Board, routing_image

Shown = dict[str, list[tuple[int, object]]]


def shown(folder: Path) -> Shown:
    """What TensorBoard's own reader finds: step and value by tag."""
    events = EventAccumulator(str(folder), size_guidance=dict.fromkeys(("scalars", "histograms", "images"), 0)).Reload()
    found: Shown = {}
    for tag in events.Tags()["scalars"]:
        found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    for tag in events.Tags()["histograms"]:
        found[tag] = [(event.step, event.histogram_value) for event in events.Histograms(tag)]
    for tag in events.Tags()["images"]:
        found[tag] = [(event.step, event.encoded_image_string) for event in events.Images(tag)]
    return found


def write(folder: Path, first: int, last: int) -> None:
    with Board(folder, step=first, seconds=1e9) as board:
        for step in range(first, last):
            values = torch.rand(6, generator=torch.Generator().manual_seed(step))
            board.write(
                step,
                seconds=1e9 + step,
                scalars={"loss": float(values[0]), "pi": float(values[1])},
                histograms={"surprise": values} if step % 2 == 0 else {},
                images={"routing": routing_image((values * 9).long()[None])} if step % 3 == 0 else {},
            )


def test_every_value_is_read_back_by_tensorboard(tmp_path: Path) -> None:
    write(tmp_path, 3, 9)
    found = shown(tmp_path)
    assert [step for step, _ in found["loss"]] == [3, 4, 5, 6, 7, 8]
    assert [step for step, _ in found["surprise"]] == [4, 6, 8]
    assert [step for step, _ in found["routing"]] == [3, 6]
    expected = torch.rand(6, generator=torch.Generator().manual_seed(3))[0]
    assert found["loss"][0][1] == pytest.approx(float(expected), rel=torch.finfo(torch.float32).eps)


@given(stop=st.integers(1, 8), back=st.integers(0, 8), cut=st.integers(0, 40))
def test_stopped_at_any_byte_and_continued_shows_what_was_never_stopped(
    tmp_path_factory: pytest.TempPathFactory, stop: int, back: int, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("board")
    write(folder / "whole", 0, 10)
    write(folder / "resumed", 0, stop)
    checkpoint = min(back, stop - 1)
    first = next((folder / "resumed").iterdir())
    if checkpoint < stop - 1:  # the last record, after the checkpoint, may be torn
        first.write_bytes(first.read_bytes()[: -cut or None])
    write(folder / "resumed", checkpoint + 1, min(checkpoint + 3, 10))  # then again, from further back
    write(folder / "resumed", checkpoint, 10)
    assert shown(folder / "resumed") == shown(folder / "whole")


def test_a_step_has_reached_the_file_when_the_call_returns(tmp_path: Path) -> None:
    with Board(tmp_path, step=0, seconds=0.0) as board:
        board.write(0, seconds=0.0, scalars={"loss": 2.0}, histograms={}, images={})
        assert shown(tmp_path) == {"loss": [(0, 2.0)]}


def test_histograms_leave_out_what_is_not_finite(tmp_path: Path) -> None:
    mixed = torch.tensor([1.0, float("nan"), 2.0, float("-inf")])
    with Board(tmp_path, step=0, seconds=0.0) as board:
        board.write(0, seconds=0.0, scalars={}, histograms={"some": mixed, "none": mixed[1:2]}, images={})
    found = EventAccumulator(str(tmp_path)).Reload().Histograms("some")[0].histogram_value
    assert (found.num, found.min, found.max, found.sum) == (2, 1, 2, 3)
    assert "none" not in shown(tmp_path)


def test_a_file_of_another_writer_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "events.out.tfevents.1700000000.machine.7.0"
    other.write_bytes(b"theirs")
    Board(tmp_path, step=0, seconds=0.0).__exit__(None, None, None)
    assert other.read_bytes() == b"theirs"


def colour(image: Tensor, row: int, column: int) -> list[int]:
    cell = image[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL].flatten(0, 1)
    assert bool((cell == cell[0]).all())
    found: list[int] = cell[0].tolist()
    return found


def test_a_cell_of_the_routing_image_tells_its_share() -> None:
    counts = torch.tensor([[5, 5, 5, 5], [0, 1, 3, 28]])
    image = routing_image(counts)
    assert image.shape == (2 * CELL, 4 * CELL, 3)
    assert image.dtype == torch.uint8
    assert len({tuple(colour(image, 0, expert)) for expert in range(4)}) == 1
    assert colour(image, 1, 0) == [153, 153, 153]
    red, _, blue = colour(image, 1, 3)
    assert red > blue, "busier than the mean is orange"
    red, _, blue = colour(image, 1, 1)
    assert red < blue, "less busy is purple"
    assert torch.equal(routing_image(counts * 7), image)


def test_routing_of_no_token_is_grey() -> None:
    assert bool((routing_image(torch.zeros(2, 3)) == 153).all())
    with pytest.raises(ValueError, match="routing_image: shape of active"):
        routing_image(torch.zeros(3))
