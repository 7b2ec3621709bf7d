"""What a run leaves behind: strict JSON files, and figures drawn through matplotlib's object API (no pyplot, no state).

Shape letters: L layers, D domains, E experts, R and C rows and columns of a table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeAlias

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize, is_color_like
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from onn import check, storage
from onn.config import read_text

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""What a JSON file can hold; NaN and the infinities are floats here and become null in a file."""

Record: TypeAlias = "Mapping[str, Json]"
"""The numbers of one training step by name: a line of `metrics.jsonl`."""

DPI = 120
_LATEST_STEP = 2**62
_STYLES = ("-", "--", "-.", ":")
BINS = 50
"""Longer curves are drawn as this many means, with a band from the lowest to the highest step."""


def encode(value: Json, *, indent: int | None) -> str:
    """Strict JSON text: keys in their order, NaN and the infinities as null; what JSON does not hold is refused."""
    if indent is not None:
        check.whole("encode", "indent", indent, 0, 80)
    return json.dumps(_finite(value), allow_nan=False, indent=indent)


def _finite(value: Json) -> Json:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        for key in value:
            check.instance("encode", "every key in value", key, str)
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    check.instance("encode", "what value holds", value, str, int, type(None))
    return value


def decode(text: str) -> Json:
    """Parse strict JSON; refuse the constants NaN and Infinity, which JSON does not have."""

    def refuse(constant: str) -> Json:
        raise ValueError(f"{constant} is not JSON")

    check.instance("decode", "text", text, str)
    try:
        value: Json = json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


class MetricsWriter:
    """Context manager that appends records to a JSON-lines file; each line reaches the file as it is written."""

    def __init__(self, path: Path) -> None:
        """Open `path` to append to it."""
        check.instance("MetricsWriter", "path", path, Path)
        self._file = path.open("a", buffering=1, encoding="utf-8", newline="\n")

    def write(self, record: Record) -> None:
        """Append one line; a record that is not JSON raises and leaves the file as it was."""
        check.instance("MetricsWriter.write", "record", record, Mapping)
        self._file.write(encode(record, indent=None) + "\n")

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Json]]:
    """The records of a JSON-lines file, without a last line that was cut off (one that has no newline).

    Raises:
        ValueError: a line is not a JSON object; the message names the file and the line.
    """
    check.instance("read_jsonl", "path", path, Path)
    records = []
    for position, line in enumerate(read_text(path).split("\n")[:-1], start=1):
        try:
            value = decode(line)
        except ValueError as error:
            raise ValueError(f"read_jsonl: {path}, line {position}: {error}.") from error
        if not isinstance(value, dict):
            raise ValueError(f"read_jsonl: {path}, line {position}: expected an object, got {line[:40]!r}.")
        records.append(value)
    return records


def write_json(path: Path, value: Json) -> None:
    """Write indented strict JSON; `path` holds the old content or the whole new one, never a part."""
    check.instance("write_json", "path", path, Path)
    storage.write_text(path, encode(value, indent=2) + "\n")


def number(record: Record, key: str) -> float | None:
    """A finite number of a record, or None where it is missing, null, not a number, or one that no float holds."""
    check.instances("number", ("record", record, Mapping), ("key", key, str))
    value = record.get(key)
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:
        return None


def mutual_information(counts: Tensor) -> float:
    """How much two labels tell of one another, in nats, from their table of counts [R, C].

    With `p_rc = counts_rc / sum(counts)`: `I = sum_rc p_rc log(p_rc / (p_r p_c)) = H(R) + H(C) - H(R, C)`.

    Symmetric, unchanged by a permutation of rows or columns; 0 for independent labels and for a table of zeros; at most
    `log(min(R, C))`. This plug-in estimate is too large by about `(R - 1) (C - 1) / (2 N)` for N independent draws.
    """
    table = check.counts("mutual_information", "counts", counts, "R C")
    total = table.sum()
    if total == 0:
        return 0.0
    rows, columns, joint = (torch.special.entr(p / total).sum() for p in (table.sum(1), table.sum(0), table))
    return max(0.0, float(rows + columns - joint))


class Panel(NamedTuple):
    """One quantity of the records, drawn over the steps."""

    title: str
    ylabel: str
    key: str
    against: tuple[str, str] = ("", "")
    """Key and name of a second line, dotted."""
    reference: float | None = None
    """Height of a grey line."""
    from_zero: bool = False
    after_carve: bool = False
    """Leave out the phase `dense`, and the highest fiftieth of the values, so that the end can be told apart."""


PANELS = (
    Panel("Training loss of every phase", "loss [nats per token]", "loss"),
    Panel("Training loss after the carve, close up", "loss [nats per token]", "loss", after_carve=True),
    Panel("Dead experts (no token chose them)", "experts", "dead_experts", from_zero=True),
    Panel("Entropy of the predictions, tau", "tau [nats per token]", "tau"),
    Panel("Loss over tau (above 1: too sure of itself)", "error / tau", "error_over_tau", reference=1.0),
    Panel("Predictive integrity, PI", "PI", "pi"),
    Panel("Mean surprise of the active experts", "gradient norm [nats]", "surprise"),
    Panel("Active experts per token", "experts", "active_per_token", ("target_active_per_token", "target"), None, True),
    Panel("Router names the least surprised expert", "share", "gate_accuracy", ("gate_chance", "chance"), None, True),
)

Timeline: TypeAlias = "Mapping[str, Sequence[tuple[float, Record]]]"
"""The records of each phase with their places on the axis of steps."""


def curves(records: Sequence[Record], path: Path) -> None:
    """Draw the loss of every phase on one axis of steps, and the health of model and experts under it.

    The phase `dense` comes first; the others begin together where it ends (the carve), whatever their steps count from.
    Null and NaN are left out; a quantity that no record holds leaves a panel that says so.
    """
    check.instance("curves", "path", path, Path)
    placed, carve = timeline(records)
    figure = Figure(figsize=(9.5, 12.5), layout="constrained")
    grid = figure.add_gridspec(5, 2, height_ratios=(1.3, 1, 1, 1, 1))
    overview = figure.add_subplot(grid[0, :])
    if draw_panel(overview, PANELS[0], placed, carve):
        overview.legend(frameon=False, loc="upper right")
    for position, panel in enumerate(PANELS[1:]):
        draw_panel(figure.add_subplot(grid[1 + position // 2, position % 2]), panel, placed, carve)
    _save(figure, path)


def timeline(records: Sequence[Record]) -> tuple[Timeline, float | None]:
    """The records of each phase with their place on the common axis of steps, and the place of the carve."""
    check.instance("curves", "records", records, list, tuple)
    phases: dict[str, list[tuple[float, Record]]] = {}
    for position, record in enumerate(records):
        check.instance("curves", f"record {position}", record, Mapping)
        step, phase = number(record, "step"), record.get("phase")
        if step is None or not 0 <= step <= _LATEST_STEP or not isinstance(phase, str):
            found = check.shown(record)
            raise ValueError(f"curves: record {position} lacks a number 'step' >= 0 or a text 'phase': {found}.")
        phases.setdefault(phase, []).append((step, record))
    dense = phases.pop("dense", [])
    firsts = [entries[0][0] for entries in phases.values()]
    start = max([min(firsts, default=0.0), *(step + 1 for step, _ in dense)])
    placed = {
        phase: [(step - entries[0][0] + start, record) for step, record in entries] for phase, entries in phases.items()
    }
    return ({"dense": dense} if dense else {}) | placed, start - 0.5 if dense and firsts else None


def draw_panel(axes: Axes, panel: Panel, placed: Timeline, carve: float | None) -> bool:
    """Draw one panel; False when there was nothing to draw."""
    check.instances("draw_panel", ("axes", axes, Axes), ("panel", panel, Panel), ("placed", placed, Mapping))
    check.between("draw_panel", "carve", 0 if carve is None else carve, -1, _LATEST_STEP)
    axes.set_title(panel.title, loc="left", fontsize=11)
    axes.set(xlabel="step", ylabel=panel.ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    shown = [phase for phase in placed if not (panel.after_carve and phase == "dense")]
    drawn = {phase: plot_means(axes, placed[phase], panel.key, *_phase_style(phase)) for phase in shown}
    values = [value for points in drawn.values() for value in points]
    if not values:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color="0.4")
        axes.set(xticks=[], yticks=[])
        return False
    key, name = panel.against
    for phase in shown:
        if plot_means(axes, placed[phase], key, name, "black", ":"):
            axes.legend(handles=axes.lines[-1:], frameon=False)
    if panel.reference is not None:
        axes.axhline(panel.reference, color="0.7", linewidth=1, zorder=0)
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    if panel.after_carve and len(values) >= 50:
        low, high = min(values), sorted(values)[-(len(values) // 50) - 1]
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-9)
    if carve is not None and drawn.get("dense"):
        axes.axvline(carve, color="0.5", linestyle=(0, (2, 2)), linewidth=1)
        axes.annotate(" carve", (carve, 1), xycoords=axes.get_xaxis_transform(), va="top", color="0.35", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    return True


def _phase_style(phase: str) -> tuple[str, str, str]:
    """Name, colour (of Okabe and Ito's palette, which the colour blind can tell apart) and line style."""
    match phase:
        case "dense":
            return "dense", "0.25", "-"
        case "moe":
            return "Hyper-SMoE", "#D55E00", "-"
        case "dense_continued":
            return "dense, trained on", "#0072B2", "--"
    return phase, "#009E73", "-."


def plot_means(
    axes: Axes, entries: Sequence[tuple[float, Record]], key: str, name: str, colour: str, style: str
) -> Sequence[float]:
    """Plot the values under `key` that float32 holds as a line of means in a band of extremes; return them."""
    check.instance("plot_means", "axes", axes, Axes)
    check.instance("plot_means", "entries", entries, list, tuple)
    pairs = all(isinstance(entry, tuple) and len(entry) == 2 for entry in entries)
    check.require(pairs, "plot_means: expected entries as pairs of a step and a record.")
    check.require(is_color_like(colour), f"plot_means: colour={check.shown(colour)} is none.")
    check.one_of("plot_means", "style", style, _STYLES)
    found = [(step, number(record, key)) for step, record in entries]
    points = [(step, value) for step, value in found if value is not None and abs(value) <= check.LARGEST]
    size = max(1, -(-len(points) // BINS))
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    if bins:
        steps = [sum(step for step, _ in part) / len(part) for part in bins]
        values = [[value for _, value in part] for part in bins]
        if size > 1:
            low, high = [min(part) for part in values], [max(part) for part in values]
            axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        means = [sum(part) / len(part) for part in values]
        axes.plot(steps, means, style, color=colour, linewidth=1.6, marker="o" if len(bins) == 1 else "", label=name)
    return [value for _, value in points]


def expert_by_domain(usage: Tensor, domains: Sequence[str], path: Path) -> None:
    """Write `usage_figure` as a PNG."""
    check.instance("expert_by_domain", "path", path, Path)
    _save(usage_figure(usage, domains), path)


def usage_figure(usage: Tensor, domains: Sequence[str]) -> Figure:
    """Draw, layer by layer, which experts the tokens of a domain choose more and less often than by uniform choice.

    `usage` [L, D, E] counts the pairs of a token and an expert that is active on it. A cell is `log2(E share)`, where
    `share` is the expert's part of the pairs of its domain. The experts of a layer stand in the order of the domain
    they favour; the title gives the mutual information of expert and domain. Hatched: never active on that domain.
    """
    counts = check.counts("expert_by_domain", "usage", usage, "L D E")
    L, D, E = counts.shape
    check.instance("expert_by_domain", "domains", domains, list, tuple)
    named = len(domains) == D and all(isinstance(name, str) for name in domains)
    check.require(named, f"expert_by_domain: expected {D} names of domains, got {check.shown(list(domains))}.")
    share = counts / counts.sum(2, keepdim=True).clamp(min=1)
    favour = share / share.sum(1, keepdim=True).clamp(min=1e-12)
    order = (favour.argmax(1) - favour.amax(1) / 2 + D * (counts.sum(1) == 0)).argsort(dim=1, stable=True)
    ratio = (share * E).log2().where(counts > 0, torch.nan).gather(2, order[:, None].expand_as(share))

    wide = 1 if L == 1 else 2 if L <= 8 else 4
    tall = -(-L // wide)
    figure = Figure(figsize=(11, _height("expert_by_domain", 2 + tall * (0.5 + 0.17 * D))), layout="constrained")
    for layer in range(L):
        axes = figure.add_subplot(tall, wide, layer + 1)
        image = _heat(axes, ratio[layer], Normalize(-3, 3), "PuOr_r")
        axes.set_title(f"layer {layer}: {mutual_information(counts[layer]):.3f} nats", loc="left", fontsize=9)
        names = [name if len(name) <= 18 else name[:16] + "..." for name in domains] if layer % wide == 0 else [""] * D
        axes.set_yticks(range(D), names, fontsize=8, parse_math=False)
        axes.set_xticks([])
        if layer >= L - wide:
            axes.set_xlabel(f"{E} experts, by the domain they favour", fontsize=8)
    ratio_bar(figure, image, "share / uniform share")
    figure.suptitle(
        "Which experts each domain chooses (hatched: none of its tokens)\n"
        f"nats: mutual information of expert and domain, 0 if unrelated, at most {math.log(min(D, E)):.2f}",
        fontsize=11,
    )
    return figure


def surprise_map(surprise: Tensor, path: Path, *, per_layer: bool) -> None:
    """Draw the mean surprise [L, E] of each expert's active pairs on a logarithmic scale; hatched: NaN, never active.

    `per_layer` divides by the mean of the layer: early layers are surprised most, and the differences within a layer
    would hardly show.
    """
    check.holds("surprise_map", "surprise", surprise, "float")
    check.instances("surprise_map", ("path", path, Path), ("per_layer", per_layer, bool))
    seen = surprise.isfinite()
    values = check.counts("surprise_map", "surprise", torch.where(seen, surprise.double(), 0), "L E")
    values = values.where(seen.cpu(), torch.nan)
    figure = Figure(figsize=(10, _height("surprise_map", 2 + 0.22 * len(values))), layout="constrained")
    axes = figure.add_subplot()
    if per_layer:
        ratio = (values / values.nanmean(1, keepdim=True)).log2()
        image = _heat(axes, ratio.clamp(-3, 3), Normalize(-3, 3), "PuOr_r")
        ratio_bar(figure, image, "surprise / layer's mean")
    else:
        positive = values[values > 0].tolist() or [1.0]
        norm = LogNorm(min(positive), max(*positive, 2 * min(positive)))
        image = _heat(axes, values.clamp(min=min(positive)), norm, "cividis")
        figure.colorbar(image, ax=axes, label="gradient norm [nats]")
    title = "Surprise of each expert against the mean of its layer" if per_layer else "Mean surprise of each expert"
    axes.set_title(title + (" (hatched: never active)" if values.isnan().any() else ""), loc="left", fontsize=11)
    axes.set(xlabel="expert", ylabel="layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    _save(figure, path)


def hatched(axes: Axes, colours: str) -> Colormap:
    """A colour map that lets a hatched ground show through where values are NaN."""
    check.instance("hatched", "axes", axes, Axes)
    check.one_of("hatched", "colours", colours, matplotlib.colormaps)
    axes.patch.set(facecolor="0.9", edgecolor="0.6", hatch="//////", linewidth=0)
    return matplotlib.colormaps[colours].with_extremes(bad=(1, 1, 1, 0))


def _heat(axes: Axes, values: Tensor, norm: Normalize, colours: str) -> AxesImage:
    colormap = hatched(axes, colours)
    return axes.imshow(values.numpy(), colormap, norm, aspect="auto", interpolation="nearest")


def ratio_bar(figure: Figure, image: ScalarMappable, label: str) -> None:
    """A colour bar for logarithms to base 2 from -3 to 3, labelled with the ratios themselves."""
    check.instances("ratio_bar", ("figure", figure, Figure), ("image", image, ScalarMappable), ("label", label, str))
    check.require(bool(figure.axes), "ratio_bar: expected a figure with axes, got one without.")
    bar = figure.colorbar(image, ax=figure.axes, extend="both", extendfrac=0.02, label=label, aspect=40)
    bar.set_ticks([-3, -2, -1, 0, 1, 2, 3], labels=["1/8", "1/4", "1/2", "1", "2", "4", "8"])


def _height(where: str, inches: float) -> float:
    check.require(inches * DPI < 2**16, f"{where}: too many rows for a picture, {inches:.0f} inches.")
    return inches


def _save(figure: Figure, path: Path) -> None:
    """Write a PNG of 256 colours, a third of the size of one with all colours."""
    FigureCanvasAgg(figure)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    palette = Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    palette.save(path, format="PNG", optimize=True)
