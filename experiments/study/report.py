"""The report of the forgetting study: verdicts, what was run, every number with its interval, and how to read it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg

from experiments import page
from experiments.page_blocks import Bullets, Details, Picture, Piece, Table, Text, html_of, markdown
from experiments.page_figures import svg
from experiments.report import flatten, listing
from experiments.study import figures
from experiments.study.arms import ARMS, EXPLORATIONS
from experiments.study.contrasts import CORRELATION_MARGIN, MARGIN, Finding, Verdict, findings
from experiments.study.figures import Drawing
from experiments.study.groups import ALL, Group, baseline, difference, grid, grouped, of, on_edge, places
from experiments.study.records import Run, Specialisation, Stage
from experiments.study.statistics import Interval
from experiments.study.store import Results

TITLE = "Does surprise lessen forgetting?"
DPI = 120
NO_BREAK = "\u00a0"
STAGES: tuple[Stage, ...] = ("tuning", "evaluation", "frontier", "exploration")
VERDICTS: Mapping[Verdict, str] = {
    "supported": "**supported**",
    "refuted": "**refuted**",
    "equivalent": "**no difference** that matters",
    "open": "**open**",
}


def write_report(folder: Path, results: Results) -> Path:
    """Write `report.md` with its pictures, and `report.html`, which needs no other file; return the path of the latter.

    The same results give the same files.
    """
    lines, sections = [f"# {TITLE}", ""], []
    for heading, parts in pieces(results).items():
        shown: list[Piece] = []
        written = []
        for part in parts:
            if isinstance(part, Drawing):
                shown.append(_kept(part, folder))
                written.append(page.figure(part.title, svg(part.figure, name=part.name, alt=part.alt), part.text))
            else:
                shown.append(part)
                written.append(html_of([part]))
        lines += [f"## {heading}", "", *markdown(shown), ""]
        sections.append(page.section(heading, *written))
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")
    path = folder / page.PAGE
    path.write_text(page.html_page(TITLE, "\n".join(sections)), encoding="utf-8")
    return path


def _kept(drawing: Drawing, folder: Path) -> Picture:
    FigureCanvasAgg(drawing.figure)
    drawing.figure.savefig(folder / f"{drawing.name}.png", dpi=DPI, metadata={"Software": None})
    drawing.figure.set_layout_engine("none")  # it is laid out now, and need not be again
    return Picture(f"{drawing.name}.png", drawing.title, drawing.text)


def pieces(results: Results) -> dict[str, Sequence[Piece | Drawing]]:
    """What stands under each heading, headings without anything left out."""
    verdicts, not_run = _tested(results.runs)
    everywhere = places(run.key for run in results.runs)
    sections: dict[str, Sequence[Piece | Drawing]] = {
        "The question, and the verdicts": verdicts,
        "What was run": list(_setting(results, not_run)),
    }
    for place in everywhere:
        sections[f"Results: {', '.join(place)}"] = list(_place(of(results.runs, place), place))
    known = [one.key for one in results.specialisations]
    for place in places(known):
        own = [one for one in results.specialisations if one.key[:2] == place]
        sections[f"Who serves which task: {', '.join(place)}"] = list(_specialisation(own, place))
    sections["Explorations"] = list(_explorations(results.runs))
    sections["How to read it, and its limits"] = [Bullets(LIMITS)]
    return {heading: parts for heading, parts in sections.items() if parts}


def _tested(runs: Sequence[Run]) -> tuple[list[Piece], list[str]]:
    """The verdicts, and what could not be tested."""
    question = Text(
        "A network of many tiny experts learns tasks one after the other. Is less forgotten when surprise (the norm of "
        "a token's gradient at an expert) decides which experts learn (SMK), where tokens go (SurpriseMin), or how "
        "much each neuron may still change (consolidation), than sparsity, optimizer and learning rate explain?"
    )
    try:
        found, not_run = findings(runs)
    except ValueError as error:
        return [question, Text(f"**No claim was tested**, because these runs do not go together: {error}")], []
    return [question, *_verdicts(found)], not_run


def _verdicts(found: Sequence[Finding]) -> Iterator[Piece]:
    if not found:
        yield Text("**No claim could be tested**: the runs that one needs are not there.")
        return
    counts = Counter(finding.verdict for finding in found)
    told = ", ".join(f"{counts[verdict]} {name}" for verdict, name in VERDICTS.items() if counts[verdict])
    yield Text(f"Of {len(found)} claims: {told}.")
    header = (
        "claim",
        "family, optimizer",
        "verdict",
        "measure",
        "difference [95% interval]",
        "seeds",
        "p, Holm",
        "p, equivalence",
        "what would have told against it",
    )
    rows = [
        (
            one.claim,
            ", ".join(filter(None, (one.family, one.optimizer))),
            VERDICTS[one.verdict],
            one.measure,
            signed(one.interval),
            str(one.interval.n),
            p_text(one.p_holm),
            p_text(one.p_equivalent),
            one.falsifier,
        )
        for one in found
    ]
    yield Table(header, rows)
    yield Text(
        f"A difference above 0 (above -{MARGIN} for a claim of `not below`) speaks for the claim. Holm's p allows for "
        "all the claims of a family together. The equivalence p is small where the difference, whatever its sign, is "
        f"too small to matter: within {MARGIN} of a score, {CORRELATION_MARGIN} of a correlation. **Open** means that "
        "these runs do not decide: it is neither a yes nor a no."
    )


def _setting(results: Results, not_run: Sequence[str]) -> Iterator[Piece]:
    rows = []
    for place in places(run.key for run in results.runs):
        own = of(results.runs, place)
        stages = Counter(run.stage for run in own)
        seeds = [len({run.key.seed for run in own if run.stage == stage}) for stage in ("tuning", "evaluation")]
        rows.append(
            (
                ", ".join(place),
                ", ".join(sorted({str(len(run.scores[0])) for run in own})),
                str(len({run.key.arm for run in own})),
                ", ".join(sorted({run.key.optimizer for run in own})),
                *map(str, seeds),
                *(str(stages[stage]) for stage in STAGES),
            )
        )
    if rows:
        seeds_of = ("seeds, tuning", "seeds, evaluation")
        yield Table(("family, regime", "tasks", "arms", "optimizers", *seeds_of, *(f"runs, {s}" for s in STAGES)), rows)
        yield Text(
            "Regime `experts`: after the first task only the experts and the router learn. Regime `everything`: all is "
            "trained throughout. Rates and strengths were chosen by ACC on the seeds of tuning, which no other stage "
            "uses; `own` is an arm that is its own optimizer."
        )
        yield Details("Every arm and its grids", [_arms(results.runs)])
    if not_run:
        yield Text("**Not run**, so not tested:")
        yield Bullets(not_run)
    if results.settings:
        yield Details("Settings", listing(list(flatten(results.settings, ""))))
    if results.facts:
        yield Details("Versions, machine and data", listing(list(flatten(results.facts, ""))))


def _arms(runs: Sequence[Run]) -> Table:
    rows = []
    for arm, optimizer in dict.fromkeys((run.key.arm, run.key.optimizer) for run in runs):
        own = [run.key for run in runs if run.key[2:4] == (arm, optimizer)]
        rates, strengths = (sorted(set(values)) for values in ([k.lr for k in own], [k.strength for k in own]))
        known = {**ARMS, **EXPLORATIONS}.get(arm)
        note = known.note if known else ""
        rows.append((arm, optimizer, _some(rates), _some(strengths) if strengths != [0.0] else "-", note))
    return Table(("arm", "optimizer", "learning rates", "strengths", "what it is"), rows)


def _some(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def _place(runs: Sequence[Run], place: tuple[str, str]) -> Iterator[Piece | Drawing]:
    groups = grouped([run for run in runs if run.stage == "evaluation"])
    if groups:
        yield Text(
            "Means over seeds ± half of their 95% interval, best ACC first. ACC: mean score of all tasks at the end; "
            "LA: of each task just after it was trained; BWT: the end less that; forgetting: the best since less the "
            "end. Scores are accuracies from 0 to 1, or minus nats for text. Differences are paired by seed."
        )
        yield _table(groups, runs)
        yield from _warnings(groups, runs)
    else:
        yield Text("No run of the evaluation is there yet.")
    yield from figures.of_runs(runs, place)


def _table(groups: Sequence[Group], runs: Sequence[Run]) -> Table:
    best = baseline(groups, "")
    rows = [
        (
            group.setup.name,
            _tuned(group, runs),
            seeds(group),
            *_means(group),
            _against(group, baseline(groups, group.setup.optimizer)),
            _against(group, best),
        )
        for group in groups
    ]
    header = (
        "arm, optimizer",
        "rate (strength)",
        "seeds",
        "ACC",
        "LA",
        "BWT",
        "forgetting",
        "experts' change",
        "active",
        f"ACC less `{ALL}`, same optimizer",
        f"ACC less the best `{ALL}`",
    )
    return Table(header, rows)


def _against(group: Group, other: Group | None) -> str:
    return "-" if other is None or other is group else signed(difference(group, other))


def _tuned(group: Group, runs: Sequence[Run]) -> str:
    rate, strength = group.setup.lr, group.setup.strength
    text = f"{rate:.3g}" + (f" ({strength:.3g})" if strength else "")
    return text + (", edge" if _edges(group, runs) else "")


def _edges(group: Group, runs: Sequence[Run]) -> list[str]:
    """Which of the tuned numbers lie on the edge of their grid."""
    rates, strengths = grid(runs, group.setup)
    tuned = (("rate", group.setup.lr, rates), ("strength", group.setup.strength, strengths))
    return [f"{what} {value:.3g}" for what, value, tried in tuned if on_edge(value, tried)]


def _warnings(groups: Sequence[Group], runs: Sequence[Run]) -> Iterator[Piece]:
    edges = [f"{g.setup.name} ({', '.join(found)})" for g in groups if (found := _edges(g, runs))]
    if edges:
        yield Text(
            "**Warning: on the edge of its grid**, so that a better value may lie beyond, and the arm may be better "
            f"than shown: {'; '.join(edges)}."
        )
    lost = [f"{g.setup.name} ({g.lost} of {len(g.runs)})" for g in groups if g.lost]
    if lost:
        yield Text(
            "**Warning: seeds that came to no finite score**; means are over the others, which flatters, and these "
            f"rows stand last: {'; '.join(lost)}."
        )
    if any(len(g.scores) == 1 for g in groups):
        yield Text("**Warning: one seed alone** has no interval, and shows nothing.")


def _specialisation(found: Sequence[Specialisation], place: tuple[str, str]) -> Iterator[Piece | Drawing]:
    rows = []
    for one in found:
        beaten = sum(value >= one.information for value in one.permuted)
        usage = [sum(column) for column in zip(*one.usage, strict=True)]
        rows.append(
            (
                figures.name(one),
                str(one.key.seed),
                _number(one.information),
                _number(math.fsum(one.permuted) / len(one.permuted)) if one.permuted else "-",
                p_text((1 + beaten) / (1 + len(one.permuted))) if one.permuted else "-",
                f"{sum(count == 0 for count in usage)} of {len(usage)}",
                _number(one.coactivation),
            )
        )
    header = ("model", "seed", "information [nats]", "when permuted, mean", "p", "experts never used", "co-activation")
    yield Table(header, rows)
    yield Text(
        "Information of expert and task over the active pairs of held-out tokens; p: the share of permutations that "
        "reach it. Co-activation: P(both active) over the smaller P(one active), mean over pairs of experts."
    )
    yield from figures.of_specialisation(found, place)


def _explorations(runs: Sequence[Run]) -> Iterator[Piece]:
    explored = [run for run in runs if run.stage == "exploration"]
    if not explored:
        return
    yield Text(
        "Ablations: one number of an arm changed at a time. They were looked at freely, no p is corrected for that, "
        "and they belong to no claim above: **leads, not results**."
    )
    for place in places(run.key for run in explored):
        rows = [
            (
                group.setup.name,
                _tuned(group, runs),
                seeds(group),
                *_means(group),
            )
            for group in grouped(of(explored, place))
        ]
        header = ("arm, optimizer", "rate (strength)", "seeds", "ACC", "LA", "BWT", "forgetting", "experts' change")
        yield Text(f"**{', '.join(place)}**")
        yield Table((*header, "active"), rows)


def _means(group: Group) -> list[str]:
    found = (group.accuracy, group.learning, group.transfer, group.forgetting)
    return [*map(plus_minus, found), _number(group.change.mean), share(group.active)]


def seeds(group: Group) -> str:
    """`8`, or `6 of 8` where some came to no finite score."""
    return f"{len(group.scores)} of {len(group.runs)}" if group.lost else str(len(group.runs))


def plus_minus(value: Interval) -> str:
    """The mean ± half of its interval, as far as there are any."""
    half = value.high - value.mean
    return _number(value.mean) + (f"{NO_BREAK}±{NO_BREAK}{half:.3f}" if math.isfinite(half) else "")


def signed(value: Interval) -> str:
    """A difference with its sign and interval."""
    if not math.isfinite(value.mean):
        return "-"
    bounds = (value.low, value.high)
    return f"{value.mean:+.3f}" + (
        f" [{bounds[0]:+.3f},{NO_BREAK}{bounds[1]:+.3f}]" if all(map(math.isfinite, bounds)) else ""
    )


def share(value: Interval) -> str:
    """A share in per cent."""
    return f"{value.mean:.1%}" if math.isfinite(value.mean) else "-"


def p_text(p: float) -> str:
    """A p value, to three places."""
    return "-" if math.isnan(p) else f"<{NO_BREAK}0.001" if p < 0.001 else f"{p:.3f}"


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


LIMITS = (
    "**Shown** is what a verdict says, in its family and regime, by a test that was fixed before the runs. Everything "
    "else here, the order of a table included, is a **lead**: the best of many arms looks better than it is.",
    "Seeds are paired: all arms of a seed see the same tasks, first weights and order of examples. Intervals are over "
    "those seeds, and say nothing of other data, sizes or schedules.",
    "More accuracy at the end can come from less forgetting or from more learning, and less forgetting from learning "
    "less. Compare at equal learning: the frontier, not a single row.",
    "Freezing the experts, random choice and a lowered rate forget less too. A rule by surprise has shown something "
    "only where it betters these.",
    "The arms of an optimizer had the same grid of learning rates. Where the best of one lies on the edge, the "
    "comparison is not fair to it.",
    "The models are tiny, the tasks few and their borders sharp; inputs are digits or short texts. Nothing here is "
    "about language models at scale.",
    "**No difference that matters** is a claim of its own, with its own test; **open** is not.",
)
