"""Write `report.html`, a page that holds everything it shows, into the folder of a run: finished, stopped or at work.

`uv run experiments/page.py RUN`
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Template

from torch import Tensor

from experiments import page_figures as figures
from experiments import report
from experiments.command import exit_status
from experiments.page_blocks import Literal, Piece, Table, Text, escape, html_of, inline
from experiments.page_data import Looks, Run, read_run
from onn.observe import Json, number, usage_figure

STYLE = Path(__file__).with_name("page.css")
SCRIPT = Path(__file__).with_name("page.js")
PAGE = "report.html"

_PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<main>
<h1>$heading</h1>
$body
</main>
<script>
$script</script>
</body>
</html>
"""
)

CAPTIONS: Mapping[str, str] = {file: text for file, _, text in report.FIGURES}
"""What `report.md` says under its figures."""
TOLD = (
    "samples",
    "versions",
    "threads",
    "machine",
    "code",
    "corpus_fingerprint",
    "resumed_from",
    "seconds",
    "finished",
)
"""Parts of a summary that have a place of their own here."""


def write_page(folder: Path) -> Path:
    """Write `report.html` from the files of a run's folder and return its path; the same files give the same bytes.

    Raises:
        ValueError: the folder holds no run, or a file of it is damaged; the message names it.
    """
    run = read_run(folder)
    path = folder / PAGE
    path.write_text(html_page(f"Run {run.name}", _body(run)), encoding="utf-8")
    return path


def html_page(title: str, body: str) -> str:
    """A whole page that needs no other file."""
    return _PAGE.substitute(
        title=escape(title),
        heading=inline(title),
        style=STYLE.read_text(encoding="utf-8"),
        script=SCRIPT.read_text(encoding="utf-8"),
        body=body,
    )


def section(heading: str, *parts: str) -> str:
    """A part of the page with its heading, and a link target made of it."""
    target = "".join(letter if letter.isalnum() else "-" for letter in heading.lower())
    return f'<section id="{escape(target)}">\n<h2>{inline(heading)}</h2>\n' + "\n".join(parts) + "\n</section>"


def figure(title: str, picture: str, text: str) -> str:
    """A picture with its title and what it means."""
    under = f"<p>{inline(text)}</p>" if text else ""
    return f'<figure><figcaption>{inline(title)}</figcaption><div class="wide">{picture}</div>{under}</figure>'


def _body(run: Run) -> str:
    sections: list[tuple[str, list[str]]] = [("In short", [])]
    if run.summary:
        sections[0][1].append(html_of([Text(report.verdict(run.summary)), *report.headline(run.summary)]))
    else:
        steps = len(run.records)
        sections[0][1].append(html_of([Text(f"**This run has not finished**: {steps} steps are recorded so far.")]))
    sections.append(("What was run", [html_of(report.setting(run.folder, run.records)), html_of(_conditions(run))]))
    if run.summary:
        sections.append(("Held-out loss", [html_of(report.losses(run.summary))]))
        sections.append(("Domains", [html_of(report.domains(run.summary))]))
    sections.append(("Curves", _curves(run)))
    sections.append(("Health", [html_of(report.health(run.summary, run.records))]))
    sections.append(("Experts and domains", list(_domains(run))))
    if run.looks is not None:
        sections.append(("Experts over time", list(_experts(run, run.looks))))
    sections.append(("Births and deaths of experts", list(_lives(run))))
    sections.append(("Time and memory", list(_costs(run.summary))))
    sections.append(("Checkpoints and skipped steps", [html_of(_safety(run))]))
    sections.append(("Samples", [html_of(_samples(run.summary))]))
    sections.append(("What else was recorded", [html_of(report.rest(run.summary, told=TOLD))]))
    sections.append(("Files", [html_of(report.files(run.folder))]))
    sections.append(("Run it again", [html_of(report.rerun(run.summary))]))
    return "\n".join(section(heading, *parts) for heading, parts in sections if any(parts))


def _conditions(run: Run) -> list[Piece]:
    """What a run depends on beside its configuration."""
    names = ("code", "versions", "threads", "machine", "corpus_fingerprint")
    known: dict[str, Json] = {name: run.summary[name] for name in names if name in run.summary}
    if "seed" in run.config:
        known = {"seed": run.config["seed"], **known}
    return report.listing(list(report.flatten(known, "")))


def _curves(run: Run) -> list[str]:
    drawn = [figure(title, picture, "") for title, picture in figures.panels(run.records)]
    if run.looks is not None:
        drawn.append(figure("Thresholds of the experts", figures.threshold_lines(run.looks), ""))
    return [f"<p>{inline(CAPTIONS['curves.png'])}</p>", f'<div class="grid">{"".join(drawn)}</div>']


def _domains(run: Run) -> Iterator[str]:
    title = "Use of every expert by domain"
    alt = f"{title}, a panel for each layer."
    if run.experts is not None:
        drawn = usage_figure(run.experts.usage, run.experts.domains)
        yield figure(title, figures.svg(drawn, name="domains", alt=alt), CAPTIONS["expert_by_domain.png"])
    elif (run.folder / "expert_by_domain.png").is_file():
        uri = figures.data_uri((run.folder / "expert_by_domain.png").read_bytes())
        yield figure(title, f'<img src="{uri}" alt="{alt}">', CAPTIONS["expert_by_domain.png"])


def _experts(run: Run, looks: Looks) -> Iterator[str]:
    surprise, usage = figures.relative_surprise(looks), figures.relative_usage(looks)
    yield (
        "<p>A look at every expert is kept of some steps: of each of the first ten, then of ever fewer. A look is one "
        "batch, so neighbouring looks differ by chance.</p>"
    )
    yield _slider(looks, {"Surprise, to the mean of the layer": surprise, "Tokens, to the mean of the layer": usage})
    yield figure(
        "Surprise of every expert over time",
        figures.over_time(looks, surprise, name="surprise", label="surprise / layer's mean"),
        "A line along the steps is one expert. Orange: more surprised than its layer at that step; purple: less; "
        "hatched: no token. " + CAPTIONS["surprise_map_per_layer.png"].split(". ", 1)[1],
    )
    yield figure(
        "Use of every expert over time",
        figures.over_time(looks, usage, name="usage", label="tokens / layer's mean"),
        "Orange: busier than the mean of the layer; purple: less busy; hatched: silent. Until the share of active "
        "experts has come down every expert gets every token, and all is white.",
    )
    yield figure(
        "Threshold of every expert against its layer over time",
        figures.thresholds_over_time(looks),
        "An expert is active where the squashed cosine of token and prototype is above the sigmoid of its threshold. "
        "Orange: harder to open than the mean of its layer; purple: easier; hatched: always open. All thresholds of a "
        "layer are moved together to hold the share of active experts (see the curves); what tells them apart is "
        "learnt.",
    )
    yield html_of([_numbers(looks)])


def _numbers(looks: Looks) -> Piece:
    """The last look in numbers, for those who cannot see the maps."""
    rows = []
    for layer in range(looks.surprise.shape[1]):
        surprise, active = looks.surprise[-1, layer], looks.active[-1, layer]
        seen = surprise[surprise.isfinite()]
        span = f"{report.show(float(seen.min()))} to {report.show(float(seen.max()))}" if seen.numel() else "-"
        share = active / active.sum().clamp(min=1)
        rows.append(
            (
                str(layer),
                report.show(float(seen.mean()) if seen.numel() else None),
                span,
                f"{float(share.min()):.1%} to {float(share.max()):.1%}",
                str(int((active == 0).sum())),
                report.show(number({"mean": float(looks.thresholds[-1, layer].nanmean())}, "mean")),
            )
        )
    heading = (
        f"layer, step {looks.steps[-1]}",
        "surprise, mean",
        "from, to",
        "part of the tokens",
        "silent",
        "threshold",
    )
    return Table(heading, rows)


def _slider(looks: Looks, maps: Mapping[str, Tensor]) -> str:
    """Maps of all layers and experts at one step; without a script, at the last."""
    count, layers = len(looks.steps), looks.surprise.shape[1]
    height = max(1, min(28, 450 // layers)) * layers
    drawn = []
    for title, ratio in maps.items():
        alt = f"{escape(title)}: a row for each of {layers} layers, the first on top, a column for each expert."
        style = f"--frames:{count};--height:{height}px;background-image:url({figures.frames(ratio)})"
        box = f'<div class="frames" role="img" aria-label="{alt}" style="{style}"></div>'
        drawn.append(f"<figure><figcaption>{inline(title)}</figcaption>{box}</figure>")
    chosen = f'<input type="range" min="0" max="{count - 1}" value="{count - 1}" hidden>'
    return (
        f'<div class="slider" data-steps="{" ".join(map(str, looks.steps))}">'
        f"<p><label>Every expert at step <output>{looks.steps[-1]}</output> {chosen}</label></p>"
        f'<div class="grid">{"".join(drawn)}</div><p>One row a layer, the first on top; one column an expert. Purple: '
        "an eighth of the layer's mean; white: the mean; orange: eight times as much; grey: silent.</p></div>"
    )


def _lives(run: Run) -> Iterator[str]:
    if not any(record.get("phase") == "moe" for record in run.records):
        return
    text = (
        "An expert is silent in a step whose tokens all chose others. One that stayed silent from one look of the "
        "lifecycle to the next counts as dead and is born again as a neighbour of a busy one: a birth is a death too."
    )
    yield figure("Silent experts, and births", figures.births(run.records, run.looks), text)
    rows = []
    for record in run.records:
        if number(record, "reborn"):
            born = record.get("born")
            pairs = [pair for pair in born if isinstance(pair, Sequence)] if isinstance(born, Sequence) else []
            who = ", ".join(f"{pair[0]}/{pair[1]}" for pair in pairs if len(pair) == 2) or "not recorded"
            rows.append((str(record.get("step")), report.show(number(record, "reborn")), who))
    yield html_of([Table(("step", "births", "layer/expert"), rows) if rows else Text("No expert was born again.")])


def _costs(summary: Mapping[str, Json]) -> Iterator[str]:
    seconds, memory = (_numbers_of(summary.get(name)) for name in ("seconds", "peak_memory_gib"))
    if seconds:
        yield figure("Seconds of each part", figures.bars(seconds, unit="s"), "")
    rows = [(f"`{name}`", report.show(value), report.show(memory.get(name))) for name, value in seconds.items()]
    if rows:
        yield html_of([Table(("part", "seconds", "peak memory [GiB]"), rows)])


def _numbers_of(value: Json) -> dict[str, float]:
    found = value if isinstance(value, Mapping) else {}
    return {name: size for name in found if (size := number(found, name)) is not None}


def _safety(run: Run) -> list[Piece]:
    skipped = [f"{r.get('phase')} {r.get('step')}" for r in run.records if r.get("skipped") is True]
    kept = sorted(path.name for path in (run.folder / "checkpoints").glob("*") if path.is_dir())
    resumed = run.summary.get("resumed_from")
    names = [str(name) for name in resumed] if isinstance(resumed, Sequence) and not isinstance(resumed, str) else []
    shown = ", ".join(skipped[:50]) + (", ..." if len(skipped) > 50 else "")
    rows = [
        (
            "steps skipped, because a loss or gradient was not finite",
            f"{len(skipped)}{f': {shown}' if skipped else ''}",
        ),
        ("the run was resumed from", ", ".join(names) or "no checkpoint" * bool(run.summary) or "-"),
        ("checkpoints kept", ", ".join(kept) or "none"),
    ]
    if run.damaged:
        rows.append(("lines of trace.jsonl that are damaged, and left out here", str(run.damaged)))
    return [Table(("what", "how many, which"), rows)]


def _samples(summary: Mapping[str, Json]) -> list[Piece]:
    samples = summary.get("samples")
    if not isinstance(samples, Mapping) or not samples:
        return []
    note = "Before ⟹ stands text of the corpus, after it what the trained Hyper-SMoE wrote on. Drawn, not chosen."
    return [Text(note), *(Literal(name, str(text)) for name, text in samples.items())]


def main(arguments: Sequence[str]) -> int:
    """Write the page of one run; the exit status."""
    parser = ArgumentParser(prog="page.py", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    given = parser.parse_args(arguments)
    return exit_status(lambda: print(write_page(given.run)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
