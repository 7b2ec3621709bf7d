"""Pictures of what `bench.py` measured: speed against density, and cost against size with fitted exponents.

`uv run experiments/bench_figures.py FILE... --figure PNG` draws the rows of several runs of `bench.py --json FILE` as
one picture, and says which goals they met.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure

from experiments.bench_experts import FLOOR
from experiments.bench_goals import Series, judge, numbers, series
from experiments.measure import Row, read

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "0.25", "0.6", "#F0E442")
"""Okabe and Ito's palette, which the colour blind can tell apart, and greys."""
DPI = 120
AXES = {"T": "tokens T", "E": "experts E", "I": "neurons of an expert I", "L": "layers L"}


def density_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of suite `experts` that hold a variant against the floor."""
    return [r for r in rows if r.suite == "experts" and r.baseline == FLOOR and math.isfinite(r.ratio)]


def panels(rows: Sequence[Row]) -> dict[tuple[str, float, float], list[Row]]:
    """The rows of each dtype, E and I, in this order."""
    found: dict[tuple[str, float, float], list[Row]] = {}
    for row in density_rows(rows):
        sizes = numbers(row.case)
        found.setdefault((row.dtype, sizes["E"], sizes["I"]), []).append(row)
    return dict(sorted(found.items()))


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Draw what the rows allow; False, and no file, where they allow nothing."""
    speed, growth = panels(rows), series(rows)
    if not speed and not growth:
        return False
    wide = 4
    tall = [-(-len(speed) // wide), int(bool(growth))]
    figure = Figure(figsize=(4.1 * wide, 3.6 * sum(tall) + 0.4), layout="constrained")
    parts = figure.subfigures(2, 1, squeeze=False, height_ratios=[max(height, 0.001) for height in tall]).flatten()
    if speed:
        _draw_speed(parts[0], speed, tall[0], wide)
    if growth:
        _draw_growth(parts[1], growth)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=DPI)
    return True


def _draw_speed(figure: SubFigure, found: dict[tuple[str, float, float], list[Row]], tall: int, wide: int) -> None:
    names = list(dict.fromkeys(row.variant for rows in found.values() for row in rows))
    bases = list(dict.fromkeys(name.split(",")[0] for name in names))
    grid = figure.subplots(tall, wide, squeeze=False).flatten().tolist()
    for axes, ((dtype, experts, size), rows) in zip(grid, found.items(), strict=False):
        for name in names:
            own = [row for row in rows if row.variant == name]
            points = sorted((numbers(row.case)["k"] / experts, 1 / row.ratio) for row in own)
            ours = name.startswith("onn")
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                "-o" if ours else "--o",
                color=COLOURS[bases.index(name.split(",")[0]) % len(COLOURS)],
                markerfacecolor=None if name.endswith("compiled") else "white",
                linewidth=2 if ours else 1.2,
                markersize=4,
                label=name,
            )
        axes.axhline(1, color="0.3", linestyle=":", linewidth=1)
        axes.set_title(f"{dtype}, {experts:.0f} experts of {size:.0f}", loc="left", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        _plain(axes, "density k / E", "speed, share of the floor's")
    for axes in grid[len(found) :]:
        axes.set_visible(False)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.suptitle("Speed against density (filled: compiled; dashed: peers; dotted: the floor)", fontsize=11)


def _draw_growth(figure: SubFigure, found: Sequence[Series]) -> None:
    axes = dict(zip(AXES, figure.subplots(1, len(AXES), squeeze=False).flatten().tolist(), strict=True))
    for position, one in enumerate(found):
        panel, colour = axes[one.axis], COLOURS[position % len(COLOURS)]
        panel.plot(one.sizes, one.costs, "o", color=colour, markersize=4)
        line = [one.fit.factor * size**one.fit.exponent for size in one.sizes]
        dtype = one.label.rsplit(" ", 1)[-1]
        label = f"{dtype}: {one.fit.exponent:.2f} ± {one.fit.error:.2f}"
        panel.plot(one.sizes, line, "-", color=colour, linewidth=1.2, label=label)
        panel.set_title(one.label.split(", against")[0], loc="left", fontsize=9)
    for axis, panel in axes.items():
        shown = [one for one in found if one.axis == axis]
        if not shown:
            panel.set_visible(False)
            continue
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.legend(frameon=False, fontsize=8, title="exponent", title_fontsize=8)
        _plain(panel, AXES[axis], "time, smallest = 1")
    figure.suptitle("Cost against size", fontsize=11)


def _plain(axes: Axes, across: str, up: str) -> None:
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel=across, ylabel=up)


def main(files: Annotated[tuple[Path, ...], tyro.conf.Positional], figure: Path) -> None:
    """Draw the rows of some files, and judge them."""
    rows = [row for path in files for row in read(path)]
    if not draw(rows, figure):
        print(f"{figure}: nothing to draw; only `experts` and `scaling` have pictures.")
    for verdict in judge(rows):
        print(verdict)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
