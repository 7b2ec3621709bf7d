"""Two or more runs side by side: figures, differences to the first, and their curves on one page.

`uv run experiments/compare.py RUN RUN [RUN...] [--out DIR]` prints the tables and writes `compare.html` and
`compare.png`. Runs may be of any length and preset, finished or not.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import report
from experiments.command import exit_status
from experiments.page import figure, html_page, section
from experiments.page_blocks import Piece, Table, Text, html_of, markdown
from experiments.page_data import Run, read_run
from experiments.page_figures import SIZE, svg
from onn import check
from onn.observe import Json, number, plot_means

PAGE = "compare.html"
PICTURE = "compare.png"
STYLES = (
    *(("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":")),
    *(("#56B4E9", "--"), ("#E69F00", "-"), ("#404040", "-."), ("#F0E442", ":")),
)
"""Colours (of Okabe and Ito) and lines of the runs, in turn."""
CURVES = (
    *(("moe", "loss"), ("dense_continued", "loss"), ("dense", "loss"), ("moe", "error_over_tau"), ("moe", "pi")),
    *(("moe", "surprise"), ("moe", "active_per_token"), ("moe", "gate_accuracy"), ("moe", "dead_experts")),
    *(("moe", "grad_norm"), ("moe", "tokens_per_second")),
)
"""Phase and quantity of each panel."""
FACTS = ("versions", "threads", "machine", "code", "corpus_fingerprint")
ENDS = ("loss", "error_over_tau", "pi", "surprise", "active_per_token", "gate_accuracy", "dead_experts")
"""Quantities of a record whose last steps can be compared when a run has no summary."""


def compare(folders: Sequence[Path]) -> list[tuple[str, list[Piece]]]:
    """Headings and tables of a comparison; the first run is the one that the others are held against.

    Raises:
        ValueError: fewer than two folders, one given twice, or one that holds no run; the message names it.
    """
    return _sections(_read(folders))


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write `compare.html`, which holds everything it shows, and `compare.png`; return the page's path.

    Raises:
        ValueError: as `compare`.
    """
    runs = _read(folders)
    parts = [section(heading, html_of(pieces)) for heading, pieces in _sections(runs)]
    note = "Every phase begins at step 0 of its own. Lines are means of neighbouring steps, bands their extremes."
    panels = [figure(title, picture, "") for title, picture in _panels(runs)]
    parts.insert(1, section("Curves", f"<p>{note}</p>", f'<div class="grid">{"".join(panels)}</div>'))
    out.mkdir(parents=True, exist_ok=True)
    title = "Runs " + ", ".join(_names(runs))
    (out / PAGE).write_text(html_page(title, "\n".join(parts)), encoding="utf-8")
    _picture(runs, out / PICTURE)
    return out / PAGE


def _read(folders: Sequence[Path]) -> list[Run]:
    check.require(len(folders) >= 2, f"compare: expected two runs or more, got {len(folders)}.")
    found = [folder.resolve() for folder in folders]
    twice = [str(folder) for folder in found if found.count(folder) > 1]
    check.require(not twice, f"compare: {', '.join(twice[:1])} is given twice.")
    return [read_run(folder) for folder in folders]


def _names(runs: Sequence[Run]) -> list[str]:
    """The folders' names, with the folder above where two have the same."""
    short = [run.name for run in runs]
    full = [f"{run.folder.resolve().parent.name}/{run.name}" for run in runs]
    chosen = [long if short.count(name) > 1 else name for name, long in zip(short, full, strict=True)]
    return [f"{name} ({place})" if chosen.count(name) > 1 else name for place, name in enumerate(chosen, start=1)]


def _sections(runs: Sequence[Run]) -> list[tuple[str, list[Piece]]]:
    names = _names(runs)
    configs = [dict(report.flatten(run.config, "")) for run in runs]
    facts = [dict(report.flatten({key: run.summary[key] for key in FACTS if key in run.summary}, "")) for run in runs]
    return [
        ("Figures", [_figures(runs, names), *_cautions(runs, names)]),
        ("Held-out loss by domain", [_domains(runs, names)]),
        ("Last steps", [_ends(runs, names)]),
        ("Configuration: what differs", [_differing(configs, names, "config.json")]),
        ("Versions and machine: what differs", [_differing(facts, names, "summary.json")]),
    ]


def _figures(runs: Sequence[Run], names: Sequence[str]) -> Piece:
    """The numbers of the summaries, and the difference to the first run behind them."""
    wording = dict((*report.LOSSES, *report.OPTIONAL))
    keys = list(dict.fromkeys(key for run in runs for key in run.summary if number(run.summary, key) is not None))
    known = [key for key in wording if key in keys]
    rows = [_row("steps recorded", [float(len(run.records)) for run in runs])]
    for key in known + [key for key in keys if key not in known and key != "finished"]:
        label = f"loss: {wording[key]}" if key.endswith("_loss") and key in wording else wording.get(key, f"`{key}`")
        rows.append(_row(label, [number(run.summary, key) for run in runs]))
    seconds = [run.summary.get("seconds") for run in runs]
    times = [number(value, "all") if isinstance(value, Mapping) else None for value in seconds]
    return Table(("quantity", *names), [*rows, _row("seconds, all", times)])


def _row(name: str, values: Sequence[float | None]) -> tuple[str, ...]:
    first = values[0]
    rest = [f"{report.show(v)} ({_delta(first, v)})" if v is not None else "-" for v in values[1:]]
    return (name, report.show(first), *rest)


def _delta(first: float | None, value: float | None) -> str:
    if first is None or value is None:
        return "-"
    size = value - first
    return "same" if size == 0 else f"{'+' if size > 0 else '-'}{report.show(abs(size))}"


def _cautions(runs: Sequence[Run], names: Sequence[str]) -> Iterator[Piece]:
    """What keeps the figures from being comparable."""
    unfinished = [name for name, run in zip(names, runs, strict=True) if not run.summary]
    if unfinished:
        yield Text(f"**Not finished, so without held-out figures**: {', '.join(unfinished)}.")
    texts = {json for run in runs if (json := run.summary.get("corpus_fingerprint")) is not None}
    if len(texts) > 1:
        yield Text("**The texts differ** (see the fingerprints): losses on different texts are not comparable.")
    lengths = {tuple(_steps(run).items()) for run in runs}
    if len(lengths) > 1:
        listed = "; ".join(f"{name}: {_told(_steps(run))}" for name, run in zip(names, runs, strict=True))
        yield Text(f"**The runs are of different lengths**: {listed}.")
    yield Text(
        "In brackets: the difference to the first run. Two runs with other seeds differ too: a difference means "
        "something only beside the spread between seeds."
    )


def _steps(run: Run) -> dict[str, int]:
    return {phase: sum(r.get("phase") == phase for r in run.records) for phase in report.phases(run.records)}


def _told(steps: Mapping[str, int]) -> str:
    return ", ".join(f"{phase} {count}" for phase, count in steps.items()) or "no step"


def _domains(runs: Sequence[Run], names: Sequence[str]) -> Piece:
    tables = [_mapping(run.summary.get("per_domain")) for run in runs]
    domains = list(dict.fromkeys(name for table in tables for name in table))
    if not domains:
        return Text("No run has finished.")
    rows = [_row(name, [number(_mapping(table.get(name)), "loss") for table in tables]) for name in domains]
    return Table(("domain, loss of the Hyper-SMoE [nats]", *names), rows)


def _ends(runs: Sequence[Run], names: Sequence[str]) -> Piece:
    """Means over the last tenth of the phase `moe`, as far as each run has come."""
    tails = []
    for run in runs:
        own = [record for record in run.records if record.get("phase") == "moe"]
        tails.append(own[-max(1, len(own) // 10) :])
    rows = []
    for key in ENDS:
        series = [[value for record in tail if (value := number(record, key)) is not None] for tail in tails]
        rows.append(_row(f"`{key}`", [sum(values) / len(values) if values else None for values in series]))
    return Table(("phase `moe`, mean of the last tenth", *names), rows)


def _differing(entries: Sequence[Mapping[str, str]], names: Sequence[str], file: str) -> Piece:
    missing = [name for name, entry in zip(names, entries, strict=True) if not entry]
    keys = dict.fromkeys(key for entry in entries for key in entry)
    present = [entry for entry in entries if entry]
    rows = [
        (f"`{key}`", *(" ".join(entry.get(key, "-").split())[:80] for entry in entries))
        for key in keys
        if len({entry.get(key) for entry in present}) > 1
    ]
    if rows:
        return Table(("name", *names), rows)
    unknown = f" Unknown, for want of {file}: {', '.join(missing)}." if missing else ""
    return Text(("Nothing differs." if len(present) > 1 else "Nothing to compare.") + unknown)


def _mapping(value: Json) -> Mapping[str, Json]:
    return value if isinstance(value, Mapping) else {}


def _draw(axes: Axes, runs: Sequence[Run], phase: str, key: str) -> bool:
    """Lay the curves of all runs over one another; False when there was none."""
    drawn = False
    for run, name, (colour, style) in zip(runs, _names(runs), _styles(len(runs)), strict=True):
        own = [record for record in run.records if record.get("phase") == phase]
        start = number(own[0], "step") or 0.0 if own else 0.0
        placed = [((number(record, "step") or 0.0) - start, record) for record in own]
        label = name.lstrip("_").replace("$", r"\$") or "run"
        drawn |= bool(plot_means(axes, placed, key, label, colour, style))
    axes.set(xlabel=f"step of the phase {phase}", ylabel=key.replace("_", " "))
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    if drawn:
        axes.legend(frameon=False, fontsize=8)
    return drawn


def _styles(count: int) -> list[tuple[str, str]]:
    return [STYLES[place % len(STYLES)] for place in range(count)]


def _panels(runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    for place, (phase, key) in enumerate(CURVES):
        drawing = Figure(figsize=SIZE, layout="constrained")
        if _draw(drawing.add_subplot(), runs, phase, key):
            title = f"{key.replace('_', ' ')}, phase {phase}"
            yield title, svg(drawing, name=f"curve{place}", alt=f"{title}, of {', '.join(_names(runs))}.")


def _picture(runs: Sequence[Run], path: Path) -> None:
    drawing = Figure(figsize=(11, 16), layout="constrained")
    FigureCanvasAgg(drawing)
    for place, (phase, key) in enumerate(CURVES, start=1):
        _draw(drawing.add_subplot(-(-len(CURVES) // 2), 2, place), runs, phase, key)
    drawing.savefig(path, dpi=100)


def main(arguments: Sequence[str]) -> int:
    """Compare runs; the exit status."""
    parser = ArgumentParser(prog="compare.py", description="Two or more runs side by side.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, default=Path(), help=f"folder for {PAGE} and {PICTURE}; here by default")
    given = parser.parse_args(arguments)

    def told() -> None:
        for heading, pieces in compare(given.runs):
            print(f"## {heading}\n\n" + "\n".join(markdown(pieces)) + "\n")
        print(f"Page: {write_comparison(given.runs, given.out)}")

    return exit_status(told)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
