"""The table and the figure of `carving.py`, from what its results.json holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from onn import observe
from onn.observe import Record

COLOURS = ("0.45", "0.7", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00")
"""Of Okabe and Ito's palette, which the colour blind can tell apart; greys for the first two."""
TITLES: Mapping[str, str] = {
    "oracle": "oracle: the experts that contribute most",
    "gate": "mean gate rows, one threshold",
    "representative": "representative neurons (CMoE)",
    "analytic": "analytic: discriminants, matched thresholds",
    "trained": "trained towards the oracle",
}
DPI = 120


def points(results: Record) -> list[Record]:
    """The measurements of results.json."""
    found = results.get("points")
    assert isinstance(found, Sequence)
    return [point for point in found if isinstance(point, Mapping)]


def series(results: Record, *, method: str, router: str) -> list[Record]:
    """The points of one curve, and the one with all experts open, from the largest fraction down."""
    own = [p for p in points(results) if p["method"] == method]
    shown = [p for p in own if p["router"] == router or (observe.number(p, "target_fraction") == 1)]
    return sorted(shown, key=lambda p: -_number(p, "target_fraction"))


def names(results: Record, key: str) -> list[str]:
    """The methods or routers measured, in their order."""
    return list(dict.fromkeys(str(point[key]) for point in points(results)))


def table(results: Record) -> str:
    """Loss by router and method (rows) and fraction (columns), with the measured active fraction where it differs."""
    fractions = sorted({_number(p, "target_fraction") for p in points(results)}, reverse=True)
    rows = [["router", "method", *(str(Fraction(f).limit_denominator(999)) for f in fractions)]]
    for router in names(results, "router"):
        for method in names(results, "method"):
            found = {_number(p, "target_fraction"): p for p in series(results, method=method, router=router)}
            rows.append([router, method, *(_cell(found.get(fraction)) for fraction in fractions)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return f"dense: {_number(results, 'dense_loss'):.4f} nats per token\n\n" + "\n".join(lines)


def _cell(point: Record | None) -> str:
    if point is None:
        return "-"
    target, active = _number(point, "target_fraction"), _number(point, "active_fraction")
    measured = "" if abs(active - target) < 0.0005 else f" ({active:.3f})"
    return f"{_number(point, 'loss'):.4f}{measured}"


def _number(record: Record, key: str) -> float:
    value = observe.number(record, key)
    assert value is not None, f"{key} is not a number in {record}"
    return value


def draw(results: Record, path: Path) -> None:
    """Loss above the dense model's against the measured active fraction: panels are routers, lines are methods.

    The vertical axis is linear below 0.01 nats and logarithmic above.
    """
    dense = _number(results, "dense_loss")
    routers, methods = names(results, "router"), names(results, "method")
    columns = min(3, len(routers))
    tall = -(-len(routers) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * tall + 0.6), layout="constrained")
    axes = figure.subplots(tall, columns, sharex=True, sharey=True, squeeze=False).flatten().tolist()
    for panel, router in zip(axes, routers, strict=False):
        panel.set_title(TITLES.get(router, router), loc="left", fontsize=9)
        panel.axhline(0, color="0.3", linestyle=":", linewidth=1)
        for method, colour in zip(methods, COLOURS, strict=False):
            curve = series(results, method=method, router=router)
            across, losses = ([_number(p, key) for p in curve] for key in ("active_fraction", "loss"))
            panel.plot(
                across,
                [loss - dense for loss in losses],
                "o-",
                color=colour,
                markersize=3.5,
                linewidth=1.4,
                label=method,
            )
        panel.set_xscale("log", base=2)
        panel.set_xticks([1, 1 / 2, 1 / 4, 1 / 8, 1 / 16], labels=["1", "1/2", "1/4", "1/8", "1/16"])
        panel.set_yscale("symlog", linthresh=0.01)
        panel.grid(axis="y", color="0.9", linewidth=0.8)
        panel.tick_params(labelbottom=True, labelleft=True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set(xlabel="active experts, share", ylabel="held-out loss above dense [nats]")
    axes[0].legend(frameon=False, fontsize=8)
    for panel in axes[len(routers) :]:
        panel.set_visible(False)
    figure.suptitle(
        f"{results['preset']}: what a carve loses, by method (dense: {dense:.3f} nats per token)", fontsize=11
    )
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=DPI)
