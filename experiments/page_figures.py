"""Figures of a page as SVG text or data URIs. Shape letters: N looks, L layers, E experts."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO, StringIO
from itertools import pairwise

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from experiments.page_blocks import escape
from experiments.page_data import Looks
from onn.observe import PANELS, Record, draw_panel, hatched, number, ratio_bar, timeline

SIZE = (5.0, 3.1)
"""Inches of a small figure: its words can be read on a phone."""
SHOWN = 32
"""Layers that a figure shows, evenly chosen from more."""
RATIO = "PuOr_r"
"""Colours from purple (an eighth) over white (as many as the rest) to orange (eight times)."""


def svg(figure: Figure, *, name: str, alt: str) -> str:
    """A figure as an SVG element for the inside of a page, in the page's own ink and on its ground.

    The same figure gives the same text; ids begin with `name`, so that several can stand on one page.
    """
    figure.patch.set_visible(False)
    for axes in figure.axes:
        if not axes.patch.get_hatch():
            axes.patch.set_visible(False)
    buffer = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", dpi=100)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"#(?:000000|404040)\b", "currentColor", text)
    width = figure.get_size_inches()[0] * 96
    head = re.compile(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', flags=re.DOTALL)
    sizes = f"min-width:{width * 0.62:.0f}px;max-width:{width * 1.1:.0f}px"
    opening = rf'<svg \1 xmlns:xlink="http://www.w3.org/1999/xlink" style="{sizes}" role="img"'
    return head.sub(f'{opening} aria-label="{escape(alt)}">', text, count=1).strip()


def panels(records: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """Title and SVG of every curve that the records hold."""
    placed, carve = timeline(records)
    for position, panel in enumerate(panel for panel in PANELS if panel.key != "dead_experts"):
        figure, axes = _small()
        if draw_panel(axes, panel, placed, carve):
            axes.set_title("", loc="left")
            axes.legend(frameon=False, fontsize=8)
            yield panel.title, svg(figure, name=f"curve{position}", alt=f"{panel.title}, over the steps.")


def threshold_lines(looks: Looks) -> str:
    """The mean threshold of the experts of some layers over time."""
    figure, axes = _small()
    layers = _chosen(looks.thresholds.shape[1], 4)
    for layer, style in zip(layers, ("-", "--", "-.", ":"), strict=False):
        axes.plot(looks.steps, looks.thresholds[:, layer].nanmean(dim=1).numpy(), style, label=f"layer {layer}")
    axes.legend(frameon=False, fontsize=8)
    _over_steps(axes, "threshold, mean of the layer")
    return svg(figure, name="thresholds", alt="Mean threshold of the experts of a layer over the steps.")


def over_time(looks: Looks, ratio: Tensor, *, name: str, label: str) -> str:
    """A map of every layer, an expert a row and a look a column; `ratio` [N, L, E] is to what is usual, NaN hatched."""
    return _maps(looks, ratio.log2().clamp(-3, 3), name, label, None)


def thresholds_over_time(looks: Looks) -> str:
    """A map of every layer, an expert a row and a look a column: the threshold less the mean of the layer."""
    apart = looks.thresholds - looks.thresholds.nanmean(dim=2, keepdim=True)
    most = max(float(apart.nan_to_num().abs().max()), 1e-6)
    return _maps(looks, apart, "thresholdmap", "threshold - layer's mean", Normalize(-most, most))


def _maps(looks: Looks, values: Tensor, name: str, label: str, norm: Normalize | None) -> str:
    layers = _chosen(values.shape[1], SHOWN)
    wide = min(len(layers), 2 if len(layers) <= 8 else 4)
    tall = -(-len(layers) // wide)
    figure = Figure(figsize=(10, 1 + 1.7 * tall), layout="constrained")
    grid = figure.subplots(tall, wide, sharex=True, sharey=True, squeeze=False)
    edges, rows = _edges(looks.steps), [expert - 0.5 for expert in range(values.shape[2] + 1)]
    for place, layer in enumerate(layers):
        axes = grid[place // wide, place % wide]
        colours = hatched(axes, RATIO)
        image = axes.pcolormesh(
            edges, rows, values[:, layer].T.numpy(), cmap=colours, norm=norm or Normalize(-3, 3), rasterized=True
        )
        axes.set_title(f"layer {layer}", loc="left", fontsize=9)
        axes.set_xlim(edges[0], edges[-1])
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.tick_params(labelsize=8)
        if place % wide == 0:
            axes.set_ylabel("expert", fontsize=8)
        if place >= len(layers) - wide:
            axes.set_xlabel("step", fontsize=8)
    if norm:
        figure.colorbar(image, ax=figure.axes, label=label, aspect=40)
    else:
        ratio_bar(figure, image, label)
    return svg(figure, name=name, alt=f"A map for each layer: {label}, by expert (rows) and step (columns).")


def births(records: Sequence[Record], looks: Looks | None) -> str:
    """How many experts no token chose in each step, and how many were born again."""
    own = [record for record in records if record.get("phase") == "moe"]
    figure, axes = _small()
    steps = [number(record, "step") or 0.0 for record in own]
    silent = [number(record, "dead_experts") for record in own]
    axes.step(steps, [math.nan if value is None else value for value in silent], where="mid", label="silent", zorder=2)
    born = [(step, value) for step, record in zip(steps, own, strict=True) if (value := number(record, "reborn"))]
    if born:
        axes.plot(*zip(*born, strict=True), "D", color="#D55E00", markersize=6, label="born again")
    axes.legend(frameon=False, fontsize=8)
    axes.set_ylim(bottom=0)
    _over_steps(axes, "experts, all layers")
    return svg(figure, name="births", alt="Silent experts in each step, and experts born again, over the steps.")


def bars(values: Mapping[str, float], *, unit: str) -> str:
    """Horizontal bars with their numbers."""
    figure = Figure(figsize=(SIZE[0], 0.5 + 0.3 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.barh(range(len(values)), list(values.values()), color="#0072B2", height=0.65)
    axes.bar_label(drawn, [f"{value:.3g} {unit}" for value in values.values()], padding=3, fontsize=8)
    axes.set_yticks(range(len(values)), list(values), fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    listed = ", ".join(f"{name} {value:.3g} {unit}" for name, value in values.items())
    return svg(figure, name="bars", alt=f"Bars: {listed}.")


def frames(ratio: Tensor) -> str:
    """All looks of a ratio [N, L, E] one below the other, a pixel an expert: a PNG as a data URI; NaN is grey."""
    place = (ratio.log2() / 6 + 0.5).clamp(0, 1).flatten(0, 1)
    colours = matplotlib.colormaps[RATIO].with_extremes(bad="0.6")(place.numpy(), bytes=True)
    buffer = BytesIO()
    Image.fromarray(colours[..., :3]).save(buffer, format="PNG", optimize=True)
    return data_uri(buffer.getvalue())


def data_uri(content: bytes) -> str:
    """A PNG that a page holds itself."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def relative_surprise(looks: Looks) -> Tensor:
    """Surprise over the mean of the layer in the same step, [N, L, E]."""
    return looks.surprise / looks.surprise.nanmean(dim=2, keepdim=True)


def relative_usage(looks: Looks) -> Tensor:
    """Tokens over the mean of the layer in the same step, [N, L, E]; NaN without any."""
    return (looks.active / looks.active.mean(dim=2, keepdim=True)).where(looks.active > 0, torch.nan)


def _small() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE)
    figure.subplots_adjust(left=0.15, right=0.97, bottom=0.15, top=0.95)
    return figure, figure.add_subplot()


def _over_steps(axes: Axes, ylabel: str) -> None:
    axes.set(xlabel="step", ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def _chosen(total: int, most: int) -> list[int]:
    if total <= most:
        return list(range(total))
    return [round(place * (total - 1) / (most - 1)) for place in range(most)]


def _edges(steps: Sequence[int]) -> list[float]:
    """Where the columns of looks begin and end."""
    middles = [(a + b) / 2 for a, b in pairwise(steps)]
    return [steps[0] - 0.5, *middles, steps[-1] + 0.5]
