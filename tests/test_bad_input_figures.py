"""Wrong shapes, dtypes, devices, numbers and kinds, to all that `onn.observe` and `onn.board` offer.

Shape letters as in `bad_arguments.SIZES`; C rows.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from torch import Tensor

from onn import board, observe
from onn.board import Board
from onn.observe import Json, Panel, Record
from tests.bad_arguments import FLOATS, INTEGERS, Spec
from tests.bad_calls import Refusal, assert_all_handled, assert_all_tried, functions_of, refused

COUNTS = torch.arange(1, 31).reshape(3, 10)
USAGE = COUNTS[None].float()
NAMES = ("a", "b", "c")
SPECS: dict[str, Spec] = {
    "mutual_information": Spec(
        lambda t, n: torch.tensor(observe.mutual_information(t["counts"])),
        {"counts": "real C E"},
        ("",),
        values={"counts": COUNTS},
    ),
    "routing_image": Spec(
        lambda t, n: board.routing_image(t["active"])[::8, ::8],
        {"active": "real C E"},
        ("C E 3",),
        values={"active": COUNTS},
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_one_wrong_argument_is_refused_by_name_or_makes_no_difference_to_the_shapes(name: str) -> None:
    assert_all_handled(SPECS[name])


def axes() -> Axes:
    return Figure().add_subplot()


def panel(*, of: object = observe.PANELS[0], placed: object = (), carve: object = None) -> object:
    records = {"dense": [(0.0, {"loss": 1.0})]} if placed == () else placed
    return observe.draw_panel(axes(), cast("Panel", of), cast("observe.Timeline", records), cast("float | None", carve))


def means(
    entries: object = ((0.0, {"loss": 1.0}),), *, key: str = "loss", colour: str = "black", style: str = "-"
) -> object:
    return observe.plot_means(axes(), cast("Sequence[tuple[float, Record]]", entries), key, "name", colour, style)


NO_PATH = cast("Path", "x.png")
NOWHERE = Path("never made")


def usage(counts: Tensor, names: object = NAMES) -> object:
    return observe.usage_figure(counts, cast("Sequence[str]", names))


def surprised(surprise: Tensor, *, path: Path = NOWHERE, per_layer: bool = True) -> object:
    observe.surprise_map(surprise, path, per_layer=per_layer)
    return None


NO_JSON: Mapping[str, tuple[object, str]] = {
    "a tensor": (torch.ones(2), "Tensor"),
    "a set": ({1}, "set {1}"),
    "bytes": (b"ab", "bytes b'ab'"),
    "a path": (NOWHERE, "Path"),
    "a complex number": (1j, "complex 1j"),
    "a key that is none": ({"a": [{1: 2}]}, "key"),
    "a value far in": ({"a": [{"b": (1, object())}]}, "object"),
}
NEGATIVE, TOO_MANY = USAGE - 5, torch.full((1, 3, 10), 1e308, dtype=torch.float64)
OTHER_KINDS = (torch.bool, torch.complex64, torch.float8_e4m3fn)
NO_RECORDS = {
    "a text": ("records", "records", "str 'records'"),
    "a record that is none": ([3], "record 0", "int 3"),
    "no step": ([{"phase": "moe"}], "record 0", "'step'"),
    "a step before the first": ([{"step": -1, "phase": "moe"}], "record 0", "-1"),
    "a step that no run reaches": ([{"step": 1e300, "phase": "moe"}], "record 0", "1e+300"),
    "a phase that is none": ([{"step": 0, "phase": 3}], "record 0", "'phase'"),
}
REFUSALS: dict[str, Refusal] = {
    **{
        f"encode, {name}": Refusal(
            partial(observe.encode, cast("Json", value), indent=None), ("encode", "value", words)
        )
        for name, (value, words) in NO_JSON.items()
    },
    **{
        f"encode, indent {indent!r}": Refusal(
            partial(observe.encode, 1, indent=cast("int", indent)), ("encode", "indent", repr(indent))
        )
        for indent in (-1, 1.5, "  ", True)
    },
    **{
        f"decode, {value!r}": Refusal(partial(observe.decode, cast("str", value)), ("decode", "text", repr(value)))
        for value in (None, b"{}", 3)
    },
    "read_jsonl": Refusal(partial(observe.read_jsonl, NO_PATH), ("read_jsonl", "path", "'x.png'")),
    "read_jsonl, no file": Refusal(partial(observe.read_jsonl, NOWHERE), ("never made: no such file",)),
    "write_json": Refusal(partial(observe.write_json, NO_PATH, 1), ("write_json", "path", "'x.png'")),
    "write_json, a set": Refusal(partial(observe.write_json, NOWHERE, cast("Json", {1})), ("set {1}",)),
    "number": Refusal(partial(observe.number, cast("Record", [1]), "loss"), ("number", "record", "list [1]")),
    "number, a key": Refusal(partial(observe.number, {}, cast("str", 3)), ("number", "key", "int 3")),
    "mutual_information, too many": Refusal(
        partial(observe.mutual_information, TOO_MANY[0]), ("mutual_information", "counts", "finite")
    ),
    **{
        f"mutual_information, {value}": Refusal(
            partial(observe.mutual_information, torch.full((2, 2), value)), ("mutual_information", "counts", ">= 0")
        )
        for value in (math.nan, math.inf, -1.0)
    },
    **{
        f"timeline, {name}": Refusal(partial(observe.timeline, cast("Sequence[Record]", records)), ("curves", *words))
        for name, (records, *words) in NO_RECORDS.items()
    },
    "curves": Refusal(partial(observe.curves, [], NO_PATH), ("curves", "path", "'x.png'")),
    "curves, records": Refusal(partial(observe.curves, cast("list[Record]", None), NOWHERE), ("records", "NoneType")),
    "draw_panel": Refusal(
        lambda: observe.draw_panel(cast("Axes", Figure()), observe.PANELS[0], {}, None),
        ("draw_panel", "axes", "Figure"),
    ),
    "draw_panel, no panel": Refusal(partial(panel, of="loss"), ("draw_panel", "panel", "str 'loss'")),
    "draw_panel, no timeline": Refusal(partial(panel, placed=[1]), ("draw_panel", "placed", "list [1]")),
    "draw_panel, no entries": Refusal(partial(panel, placed={"moe": 3}), ("entries", "int 3")),
    **{
        f"draw_panel, carve {carve!r}": Refusal(partial(panel, carve=carve), ("draw_panel", "carve", repr(carve)))
        for carve in (math.nan, math.inf, "x")
    },
    "plot_means": Refusal(
        lambda: observe.plot_means(cast("Axes", None), [], "loss", "name", "black", "-"), ("plot_means", "axes")
    ),
    "plot_means, entries": Refusal(partial(means, [3]), ("plot_means", "entries", "pairs")),
    "plot_means, a text": Refusal(partial(means, "ab"), ("plot_means", "entries", "'ab'")),
    "plot_means, a record": Refusal(partial(means, [(0.0, 3)]), ("number", "record", "int 3")),
    "plot_means, a key": Refusal(partial(means, key=cast("str", 3)), ("number", "key", "int 3")),
    "plot_means, a colour": Refusal(partial(means, colour="blackish"), ("plot_means", "colour='blackish'")),
    "plot_means, a style": Refusal(partial(means, style="dotted"), ("plot_means", "style='dotted'", "Known: -, --")),
    **{
        f"usage_figure, {name}": Refusal(partial(usage, counts), ("expert_by_domain", "usage", words))
        for name, counts, words in (
            ("no table", USAGE[0], "[3, 10]"),
            ("no expert", USAGE[..., :0], "[1, 3, 0]"),
            ("below nothing", NEGATIVE, ">= 0"),
            ("NaN", USAGE * math.nan, "finite"),
            ("too many", TOO_MANY, "finite"),
            ("on meta", USAGE.to("meta"), "meta"),
            *((f"of {kind}", USAGE.to(kind), str(kind)) for kind in OTHER_KINDS),
        )
    },
    **{
        f"usage_figure, names {names!r}": Refusal(
            partial(usage, USAGE, names), ("expert_by_domain", "domains", str(check))
        )
        for names, check in (("abc", "'abc'"), (None, "NoneType"), (("a", "b"), ["a", "b"]), ((1, 2, 3), [1, 2, 3]))
    },
    "usage_figure, too many layers": Refusal(
        partial(usage, torch.ones(2000, 30, 1), ["d"] * 30), ("expert_by_domain", "too many rows")
    ),
    "expert_by_domain": Refusal(
        lambda: observe.expert_by_domain(USAGE, NAMES, NO_PATH), ("expert_by_domain", "path", "'x.png'")
    ),
    **{
        f"surprise_map, {name}": Refusal(partial(surprised, wrong), ("surprise_map", "surprise", words))
        for name, wrong, words in (
            ("no table", USAGE, "[1, 3, 10]"),
            ("no layer", USAGE[0, :0], "[0, 10]"),
            ("below nothing", NEGATIVE[0], ">= 0"),
            ("too large", TOO_MANY[0], "finite"),
            ("on meta", USAGE[0].to("meta"), "meta"),
            *((f"of {kind}", COUNTS.to(kind), str(kind)) for kind in (*OTHER_KINDS, torch.int64)),
        )
    },
    "surprise_map, no path": Refusal(partial(surprised, USAGE[0], path=NO_PATH), ("surprise_map", "path")),
    "surprise_map, no truth": Refusal(
        partial(surprised, USAGE[0], per_layer=cast("bool", "no")), ("surprise_map", "per_layer", "'no'")
    ),
    "surprise_map, too many layers": Refusal(
        partial(surprised, torch.ones(3000, 2)), ("surprise_map", "too many rows")
    ),
    "hatched": Refusal(partial(observe.hatched, cast("Axes", Figure()), "PuOr_r"), ("hatched", "axes", "Figure")),
    "hatched, colours": Refusal(
        lambda: observe.hatched(axes(), "PuOr_q"), ("hatched", "colours='PuOr_q'", "did you mean 'PuOr_r'")
    ),
    "ratio_bar": Refusal(
        lambda: observe.ratio_bar(cast("Figure", axes()), ScalarMappable(), "x"), ("ratio_bar", "figure", "Axes")
    ),
    "ratio_bar, no axes": Refusal(lambda: observe.ratio_bar(Figure(), ScalarMappable(), "x"), ("figure with axes",)),
    "ratio_bar, no image": Refusal(
        lambda: observe.ratio_bar(Figure(), cast("ScalarMappable", COUNTS), "x"), ("ratio_bar", "image", "Tensor")
    ),
    "ratio_bar, no label": Refusal(
        lambda: observe.ratio_bar(axes().get_figure(root=True) or Figure(), ScalarMappable(), cast("str", 3)),
        ("ratio_bar", "label", "int 3"),
    ),
    "MetricsWriter": Refusal(partial(observe.MetricsWriter, NO_PATH), ("MetricsWriter", "path", "'x.png'")),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused_with_what_was_wrong(name: str) -> None:
    refused(REFUSALS[name].call, *REFUSALS[name].words)
    assert not NOWHERE.exists()
    assert not Path(NO_PATH).exists()


@pytest.mark.parametrize("value", [1e308, -1e308, 1e300])
def test_a_value_that_no_picture_holds_is_left_out(tmp_path: Path, value: float) -> None:
    records: list[Record] = [
        {"step": step, "phase": "moe", "loss": value if step else 1.0, "tau": value} for step in range(3)
    ]
    observe.curves(records, tmp_path / "curves.png")
    drawn = observe.plot_means(axes(), [(0.0, record) for record in records], "loss", "name", "black", "-")
    assert list(drawn) == [1.0]


@pytest.mark.parametrize("record", [[1], "text", None, {"a": {1}}, {"a": torch.ones(2)}, {3: 1}])
def test_a_record_that_is_none_leaves_the_file_as_it_was(tmp_path: Path, record: object) -> None:
    path = tmp_path / "metrics.jsonl"
    with observe.MetricsWriter(path) as writer:
        writer.write({"step": 0})
        refused(partial(writer.write, cast("Record", record)), "expected")
        writer.write({"step": 1})
    assert observe.read_jsonl(path) == [{"step": 0}, {"step": 1}]


class Anything(Protocol):
    """A function that is given what it does not take."""

    def __call__(self, **changes: object) -> None: ...


def written(folder: Path, changes: Mapping[str, object]) -> None:
    plain: dict[str, object] = {"step": 3, "seconds": 1e9, "scalars": {}, "histograms": {}, "images": {}}
    with Board(folder, step=3, seconds=1e9) as opened:
        size = sum(path.stat().st_size for path in folder.iterdir())
        try:
            cast("Anything", opened.write)(**{**plain, **changes})
        finally:
            assert sum(path.stat().st_size for path in folder.iterdir()) == size, "something was written"


PIXELS = torch.zeros(2, 2, 3, dtype=torch.uint8)
UNWRITTEN: dict[str, tuple[Mapping[str, object], tuple[str, ...]]] = {
    **{f"step {step!r}": ({"step": step}, ("step", repr(step))) for step in (-1, 2.5, "3", True, None, 2**63)},
    **{
        f"seconds {seconds!r}": ({"seconds": seconds}, ("seconds", repr(seconds)))
        for seconds in (math.nan, math.inf, -1.0, "now", None)
    },
    **{
        f"{name}, {tagged!r}": ({name: tagged}, (name, repr(tagged)[1:-1]))
        for name in ("scalars", "histograms", "images")
        for tagged in (None, "text", [1])
    },
    **{
        f"a tag of {name}": ({name: {3: PIXELS}}, (name, "tag", "int 3"))
        for name in ("scalars", "histograms", "images")
    },
    **{
        f"a scalar {value!r}"[:30]: ({"scalars": {"loss": 1.0, "pi": value}}, ("scalar pi",))
        for value in ("x", None, PIXELS, 10**400, 1j)
    },
    **{
        f"a histogram {name}": ({"histograms": {"fine": COUNTS, "odd": value}}, ("histogram odd",))
        for name, value in (
            ("of a list", [1.0]),
            ("on meta", COUNTS.to("meta")),
            *((f"of {kind}", COUNTS.to(kind)) for kind in OTHER_KINDS),
        )
    },
    **{
        f"an image {name}": ({"images": {"fine": PIXELS, "odd": value}}, ("image odd",))
        for name, value in (
            ("of a list", [[[1, 2, 3]]]),
            ("on meta", PIXELS.to("meta")),
            ("of two dimensions", PIXELS[0]),
            ("of four colours", torch.zeros(2, 2, 4, dtype=torch.uint8)),
            ("without rows", PIXELS[:0]),
            ("without columns", PIXELS[:, :0]),
            *((f"of {kind}", PIXELS.to(kind)) for kind in (*OTHER_KINDS, *FLOATS, *INTEGERS[1:])),
        )
    },
}


@pytest.mark.parametrize("name", UNWRITTEN)
def test_a_step_of_the_board_with_one_wrong_value_is_refused_whole(tmp_path: Path, name: str) -> None:
    changes, words = UNWRITTEN[name]
    refused(partial(written, tmp_path, changes), "Board.write", *words)


@pytest.mark.parametrize(
    ("folder", "step", "seconds"),
    [("text", 0, 0.0), (None, -1, 0.0), (None, 1.5, 0.0), (None, True, 0.0), (None, 2**63, 0.0), (None, 0, math.nan)],
)
def test_a_board_that_cannot_be_opened_takes_nothing_back(
    tmp_path: Path, folder: str | None, step: float, seconds: float
) -> None:
    with Board(tmp_path, step=0, seconds=0.0):
        pass
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    place = tmp_path if folder is None else cast("Path", str(tmp_path))
    word = "folder" if folder else "seconds" if math.isnan(seconds) else "step"
    refused(lambda: Board(place, step=cast("int", step), seconds=seconds), "Board", word)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


TRIED_ABOVE = {"Board"}
NOTHING_TO_REFUSE = {"Panel": "texts and numbers by name, which `draw_panel` takes only as a `Panel`"}


def offered_by(module: ModuleType) -> set[str]:
    found = inspect.getmembers(module, inspect.isclass)
    return functions_of(module) | {
        name for name, value in found if value.__module__ == module.__name__ and not name.startswith("_")
    }


MODULES = (observe, board)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.__name__))
def test_every_public_function_and_class_is_tried_with_wrong_arguments(module: ModuleType) -> None:
    assert_all_tried((*SPECS, *REFUSALS, *TRIED_ABOVE, *NOTHING_TO_REFUSE), module, MODULES, own=offered_by)
