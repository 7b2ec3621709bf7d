"""The pictures of the forgetting study. Shape letters: E experts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from experiments.study.groups import Group, baseline, chosen, grouped
from experiments.study.records import Run, Series, Specialisation
from experiments.study.statistics import Vector
from onn.observe import hatched

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D46")
"""Okabe and Ito's palette, which the colour blind can tell apart, and a brown."""
MARKERS = "osD^vPX<"
OPTIMIZERS = ("sgd", "adamw", "adagrad", "own")
SHOWN = 6
"""Arms that a figure shows."""
LONGEST = 32
"""Letters of a name in a figure."""
SERIES: tuple[tuple[Series, str], ...] = (
    ("loss", "training loss [nats]"),
    ("tau", "entropy of the predictions, tau [nats]"),
    ("surprise", "mean surprise"),
    ("pi", "predictive integrity, PI"),
)


class Drawing(NamedTuple):
    """A picture for a page."""

    name: str
    title: str
    alt: str
    text: str
    """What it means."""
    figure: Figure


def of_runs(runs: Sequence[Run], place: tuple[str, str]) -> Iterator[Drawing]:
    """What the runs of one family and regime look like."""
    groups = grouped([run for run in runs if run.stage == "evaluation"])
    where, slug = ", ".join(place), _slug(place)
    if groups:
        yield Drawing(
            f"accuracy-{slug}",
            f"Accuracy at the end by arm: {where}",
            f"ACC of every arm and optimizer with 95% intervals, best arm first: {_listed(groups)}.",
            "Mean over seeds with its 95% interval, at the learning rate (and strength) that was best in tuning. The "
            "line is the best of the optimizers that updates everything. Intervals of two arms that overlap do not "
            "make a draw: the seeds are paired, see the differences in the tables. "
            "Arms far below the others are cut off.",
            _accuracy(groups),
        )
    curves = [run for run in runs if run.stage == "frontier"]
    if curves:
        yield Drawing(
            f"frontier-{slug}",
            f"Learning against forgetting: {where}",
            "Backward transfer over learning accuracy along the learning rates, a curve for each arm, a panel for "
            "each optimizer.",
            "Each point is a learning rate, mean over seeds; a curve joins the rates in order, and its largest marker "
            "is the smallest rate. Right is more learnt, up is less forgotten. A curve above another forgets less at "
            "the same learning; further along the same curve is nothing but another learning rate. Points far outside "
            "of the others are cut off.",
            _frontier(curves),
        )
    shown = chosen(groups, SHOWN)
    if not shown:
        return
    yield Drawing(
        f"matrix-{slug}",
        f"Score of every task after every task: {where}",
        "A map for each chosen arm: mean score by task (columns) after each task (rows).",
        "Row i is after i tasks, column j the score of task j, mean over seeds. Below the diagonal a column that pales "
        "downwards is being forgotten; above it, what is known before being taught.",
        _matrices(shown),
    )
    if any(run.series for group in shown for run in group.runs):
        yield Drawing(
            f"series-{slug}",
            f"While training: {where}",
            "Loss, tau, surprise and PI over training, a line for each chosen arm; dotted lines part the tasks.",
            "Means over seeds of equal stretches of training; dotted lines part the tasks.",
            _series(shown),
        )
    if any(_foretold(group, "pi") for group in shown):
        yield Drawing(
            f"integrity-{slug}",
            f"PI when a task ends, and what is forgotten of it later: {where}",
            "Drop of a task's score by the end, over PI (left) and over the training loss (right) when the task ended.",
            "A point is one task of one run; the last task is left out. PI would be worth its cost if it told more "
            "than the loss beside it does: the verdicts have the rank correlation with the loss taken out. Points of "
            "one arm differ by task as well: early tasks have more time to be forgotten.",
            _integrity(shown),
        )


def of_specialisation(found: Sequence[Specialisation], place: tuple[str, str]) -> Iterator[Drawing]:
    """Who serves which task, in one family and regime."""
    where, slug = ", ".join(place), _slug(place)
    if not found:
        return
    yield Drawing(
        f"information-{slug}",
        f"What an expert tells of the task: {where}",
        "Mutual information of expert and task of each model beside the same for permuted tasks.",
        "Diamond: information of the active pairs. Ticks: the same after the tasks were permuted over the tokens, "
        "which is what chance gives. A diamond right of all ticks is more than chance.",
        _information(found),
    )
    firsts = list({name(one): one for one in reversed(found)}.values())[::-1][:SHOWN]
    yield Drawing(
        f"experts-{slug}",
        f"Experts and tasks: {where}",
        "For each model two maps with a row a task and a column an expert: use, and harm of leaving the expert out.",
        "Left: use against uniform use (orange more, purple less, hatched never). Right: nats that the task's held-out "
        "loss rises by without the expert (orange harm, purple gain). One seed a model; the experts stand in the order "
        "of the task they favour, the same in both maps, which makes chance look like a pattern: trust the information "
        "above. Specialised are experts whose harm, too, is in one row.",
        _experts(firsts),
    )
    if any(one.saturation for one in found):
        yield Drawing(
            f"saturation-{slug}",
            f"When routes settle: {where}",
            "Share of the finally active experts that were active already, after each task, by model.",
            "1: the tokens already use the experts that they use at the end. Mean over seeds.",
            _saturation(found),
        )


def name(one: Specialisation) -> str:
    """`smk-2, adamw`."""
    return one.key.arm if one.key.optimizer == "own" else f"{one.key.arm}, {one.key.optimizer}"


def _accuracy(groups: Sequence[Group]) -> Figure:
    arms = list(dict.fromkeys(group.setup.arm for group in groups))
    optimizers = _optimizers(groups)
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(arms)), layout="constrained")
    axes = _axes(figure, 1, 1, 1)
    for place, optimizer in enumerate(optimizers):
        own = [g for g in groups if g.setup.optimizer == optimizer and g.scores]
        axes.errorbar(
            [g.accuracy.mean for g in own],
            [arms.index(g.setup.arm) + 0.6 * ((place + 0.5) / len(optimizers) - 0.5) for g in own],
            xerr=np.nan_to_num([g.accuracy.high - g.accuracy.mean for g in own]),
            fmt=MARKERS[place % len(MARKERS)],
            color=COLOURS[place % len(COLOURS)],
            markersize=4,
            linewidth=1.2,
            label=_plain(optimizer),
        )
    best = baseline(groups, "")
    if best is not None and best.scores:
        axes.axvline(best.accuracy.mean, color="0.6", linewidth=1, linestyle=(0, (3, 3)), zorder=0)
    axes.set_yticks(range(len(arms)), [_plain(arm) for arm in arms], fontsize=9, parse_math=False)
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.grid(axis="y", color="0.6", alpha=0.25, linewidth=0.8)
    axes.set_xlabel("ACC, mean score of all tasks at the end")
    _crop(axes.set_xlim, [g.accuracy.mean for g in groups])
    _legend(figure, axes, len(optimizers))
    return figure


def _frontier(runs: Sequence[Run]) -> Figure:
    groups = grouped(runs)
    optimizers = _optimizers(groups)
    lines = sorted({(g.setup.arm, g.setup.strength) for g in groups})
    several = {arm for arm, strength in lines if len({s for a, s in lines if a == arm}) > 1}
    styles = dict(zip(lines, zip(cycle(COLOURS), cycle(MARKERS), strict=False), strict=False))
    wide = min(2, len(optimizers))
    tall = -(-len(optimizers) // wide)
    figure = Figure(figsize=(5 * wide, 3.8 * tall + 0.3 * -(-len(lines) // 4)), layout="constrained")
    drawn = {}
    for place, optimizer in enumerate(optimizers):
        axes = _axes(figure, tall, wide, place + 1)
        own = [g for g in groups if g.setup.optimizer == optimizer and math.isfinite(g.transfer.mean)]
        for line in lines:
            points = sorted((g for g in own if (g.setup.arm, g.setup.strength) == line), key=lambda g: g.setup.lr)
            if points:
                colour, marker = styles[line]
                xs, ys = [g.learning.mean for g in points], [g.transfer.mean for g in points]
                (curve,) = axes.plot(xs, ys, f"{marker}-", color=colour, markersize=3.5, linewidth=1.2)
                axes.plot(xs[:1], ys[:1], marker, color=colour, markersize=7)
                drawn[_plain(f"{line[0]}, {line[1]:g}" if line[0] in several else line[0])] = curve
        axes.set_title(_plain(optimizer), loc="left", fontsize=10, parse_math=False)
        axes.set(xlabel="learning accuracy, LA", ylabel="backward transfer, BWT")
        _crop(axes.set_xlim, [g.learning.mean for g in groups])
        _crop(axes.set_ylim, [g.transfer.mean for g in groups])
        axes.xaxis.set_major_locator(MaxNLocator(5))
    legend = figure.legend(list(drawn.values()), list(drawn), loc="outside lower center", ncols=4, frameon=False)
    _as_is(legend.get_texts())
    return figure


def _matrices(groups: Sequence[Group]) -> Figure:
    means = [np.asarray([run.scores for run in g.runs if run.key.seed in g.scores]).mean(axis=0) for g in groups]
    low, high = (float(limit([limit(mean) for mean in means])) for limit in (np.nanmin, np.nanmax))
    wide = min(3, len(groups))
    tall = -(-len(groups) // wide)
    rows, columns = means[0].shape
    figure = Figure(figsize=(3.3 * wide + 0.9, (1.1 + 0.3 * rows) * tall), layout="constrained")
    for place, (group, mean) in enumerate(zip(groups, means, strict=True)):
        axes = _axes(figure, tall, wide, place + 1)
        image = axes.imshow(mean, "cividis", Normalize(low, high), aspect="auto", interpolation="nearest")
        for row, column in np.ndindex(*mean.shape) if columns <= 8 else ():
            value = mean[row, column]
            is_dark = value < (low + high) / 2
            colour = "#f5f5f5" if is_dark else "#111111"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
        axes.set_title(_plain(group.setup.name), loc="left", fontsize=9, parse_math=False)
        axes.set_xticks(range(columns), [str(task + 1) for task in range(columns)], fontsize=8)
        axes.set_yticks(range(rows), [str(row) for row in range(rows)], fontsize=8)
        axes.set_xlabel("score of task", fontsize=8)
        if place % wide == 0:
            axes.set_ylabel("after tasks", fontsize=8)
    figure.colorbar(image, ax=figure.axes, label="score", aspect=40)
    return figure


def _series(groups: Sequence[Group]) -> Figure:
    figure = Figure(figsize=(10, 6.6), layout="constrained")
    for place, (kind, label) in enumerate(SERIES):
        axes = _axes(figure, 2, 2, place + 1)
        for group, colour in zip(groups, cycle(COLOURS), strict=False):
            curves = [run.series[kind] for run in group.runs if run.series.get(kind) and run.key.seed in group.scores]
            whole = [curve for curve in curves if len(curve) == len(curves[0])]
            if whole:
                tasks = len(group.runs[0].scores[0])
                at = (np.arange(len(whole[0])) + 0.5) * tasks / len(whole[0])
                axes.plot(at, np.mean(whole, axis=0), color=colour, linewidth=1.3, label=_plain(group.setup.name))
        for task in range(1, len(groups[0].runs[0].scores[0])):
            axes.axvline(task, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
        axes.set_title(label, loc="left", fontsize=10)
        axes.set_xlabel("tasks trained")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, max(figure.axes, key=lambda axes: len(axes.lines)), 3)
    return figure


def _foretold(group: Group, kind: Series) -> list[tuple[float, float]]:
    """Of each task but the last of each run: a number when the task ended, and its score's later fall from its best."""
    points = []
    for run in group.runs:
        tasks, curve = len(run.scores[0]), run.series.get(kind, ())
        for task in range(tasks - 1 if len(curve) >= tasks else 0):
            at = curve[(task + 1) * len(curve) // tasks - 1]
            drop = max(row[task] for row in run.scores[task + 1 :]) - run.scores[-1][task]
            points += [(at, drop)] * (math.isfinite(at) and math.isfinite(drop))
    return points


def _integrity(groups: Sequence[Group]) -> Figure:
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    panels: tuple[tuple[Series, str], ...] = (("pi", "PI when the task ended"), ("loss", "training loss then [nats]"))
    for place, (kind, label) in enumerate(panels):
        axes = _axes(figure, 1, 2, place + 1)
        for group, colour, marker in zip(groups, cycle(COLOURS), cycle(MARKERS), strict=False):
            points = _foretold(group, kind)
            if points:
                xs, ys = zip(*points, strict=True)
                axes.plot(xs, ys, marker, color=colour, markersize=4, alpha=0.6, label=_plain(group.setup.name))
        axes.set(xlabel=label, ylabel="fall of the score by the end")
    _legend(figure, figure.axes[0], 3)
    return figure


def _information(found: Sequence[Specialisation]) -> Figure:
    figure = Figure(figsize=(9, 1 + 0.32 * len(found)), layout="constrained")
    axes = _axes(figure, 1, 1, 1)
    for row, one in enumerate(found):
        axes.plot(one.permuted, [row] * len(one.permuted), "|", color=COLOURS[0], alpha=0.4, markersize=9)
        axes.plot([one.information], [row], "D", color=COLOURS[1], markersize=6)
    names = [f"{_plain(name(one))}, seed {one.key.seed}" for one in found]
    axes.set_yticks(range(len(found)), names, fontsize=9, parse_math=False)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("I(expert; task) [nats]")
    return figure


def _experts(found: Sequence[Specialisation]) -> Figure:
    figure = Figure(figsize=(11, 0.8 + (0.7 + 0.2 * len(found[0].usage)) * len(found)), layout="constrained")
    ablations = [np.asarray(one.ablation, dtype=np.float64).T for one in found]
    largest = max((float(np.abs(a[np.isfinite(a)]).max(initial=0.0)) for a in ablations), default=0.0) or 1.0
    for row, (one, ablation) in enumerate(zip(found, ablations, strict=True)):
        counts = np.asarray(one.usage, dtype=np.float64)
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        with np.errstate(divide="ignore"):
            ratio = np.where(counts > 0, np.log2(share * counts.shape[1]), np.nan)
        favour = share / np.maximum(share.sum(axis=0), 1e-12)
        idle = counts.sum(axis=0) == 0
        order = np.argsort(favour.argmax(axis=0) - favour.max(axis=0) / 2 + len(counts) * idle, kind="stable")
        shown, tall = _plain(name(one)), len(found)
        used = _map(figure, (tall, 2 * row + 1), ratio[:, order], Normalize(-3, 3), f"{shown}: use")
        harm = _map(figure, (tall, 2 * row + 2), ablation[:, order], Normalize(-largest, largest), f"{shown}: harm")
    for axes in figure.axes[-2:]:
        axes.set_xlabel("experts, by the task they favour", fontsize=8)
    left, right = figure.axes[0::2], figure.axes[1::2]
    bar = figure.colorbar(used.images[0], ax=left, label="use / uniform use", aspect=40, location="bottom")
    bar.set_ticks([-3, -2, -1, 0, 1, 2, 3], labels=["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    figure.colorbar(harm.images[0], ax=right, label="loss without it [nats]", aspect=40, location="bottom")
    return figure


def _map(figure: Figure, place: tuple[int, int], values: Vector, norm: Normalize, title: str) -> Axes:
    axes = figure.add_subplot(place[0], 2, place[1])
    axes.imshow(values, hatched(axes, "PuOr_r"), norm, aspect="auto", interpolation="nearest")
    axes.set_title(title, loc="left", fontsize=9, parse_math=False)
    axes.set_yticks(range(len(values)), [f"task {task + 1}" for task in range(len(values))], fontsize=8)
    axes.set_xticks([])
    return axes


def _saturation(found: Sequence[Specialisation]) -> Figure:
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = _axes(figure, 1, 1, 1)
    names = list(dict.fromkeys(map(name, found)))
    for label, colour, marker in zip(names, cycle(COLOURS), cycle(MARKERS), strict=False):
        curves = [one.saturation for one in found if name(one) == label]
        mean = np.mean([curve for curve in curves if len(curve) == len(curves[0])], axis=0)
        axes.plot(range(len(mean)), mean, f"{marker}-", color=colour, markersize=4, label=_plain(label))
    axes.set(xlabel="tasks trained", ylabel="share of the final experts", ylim=(0, 1.03))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, axes, 3)
    return figure


def _axes(figure: Figure, tall: int, wide: int, place: int) -> Axes:
    axes = figure.add_subplot(tall, wide, place)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        legend = figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=max(1, min(columns, len(labels))),
            frameon=False,
            fontsize=9,
        )
        _as_is(legend.get_texts())


def _as_is(texts: Iterable[Text]) -> None:
    for text in texts:
        text.set_parse_math(False)


def _crop(limit: Callable[[float, float], object], values: Sequence[float]) -> None:
    """Set limits that leave out what lies far outside of the middle half of the values."""
    seen = [value for value in values if math.isfinite(value)]
    if len(seen) > 1:
        lower, upper = np.quantile(seen, (0.25, 0.75))
        reach = max(4 * (upper - lower), 1e-3)
        low, high = max(min(seen), lower - reach), min(max(seen), upper + reach)
        margin = 0.06 * (high - low) or 0.5
        limit(low - margin, high + margin)


def _optimizers(groups: Sequence[Group]) -> list[str]:
    found = {group.setup.optimizer for group in groups}
    return [known for known in OPTIMIZERS if known in found] + sorted(found - set(OPTIMIZERS))


def _listed(groups: Sequence[Group]) -> str:
    return ", ".join(f"{group.setup.name} {group.accuracy.mean:.3f}" for group in groups)


def _slug(place: tuple[str, str]) -> str:
    return re.sub("[^a-z0-9]+", "-", "-".join(place).lower())


def _plain(text: str) -> str:
    """The beginning of a text, as a figure can hold it."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text[:LONGEST])
