"""The report of the forgetting study: verdicts, what was run, every number with its interval, and how to read it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg

from experiments import page
from experiments.page_blocks import Bullets, Picture, Piece, Table, Text, html_of, markdown
from experiments.page_figures import svg
from experiments.study import figures
from experiments.study.contrasts import CORRELATION_MARGIN, MARGIN, PREDICTION, Finding, Verdict, findings, within_arms
from experiments.study.figures import Drawing
from experiments.study.groups import ALL, Group, baseline, difference, grid, grouped, of, on_edge, places
from experiments.study.records import Run, Specialisation, Vocabulary
from experiments.study.setting import idle, setting
from experiments.study.shown import among, number, p_text, plus_minus, share, signed
from experiments.study.store import Results

TITLE = "Does surprise lessen forgetting?"
DPI = 120
VERDICTS: Mapping[Verdict, str] = {
    "supported": "**supported**",
    "refuted": "**refuted**",
    "equivalent": "**no difference** that matters",
    "open": "**open**",
    "unsteady": "**open**, hangs on the rate",
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
    verdicts, not_run = _tested(results)
    everywhere = places(run.key for run in results.runs)
    sections: dict[str, Sequence[Piece | Drawing]] = {
        "The question, and the verdicts": verdicts,
        "What was run": list(setting(results, not_run)),
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


def _tested(results: Results) -> tuple[list[Piece], list[str]]:
    """The verdicts, and what could not be tested."""
    question = Text(
        "A network of many tiny experts learns tasks one after the other. Is less forgotten when surprise (the norm of "
        "a token's gradient at an expert) decides which experts learn (SMK), where tokens go (SurpriseMin), or how "
        "much each neuron may still change (consolidation), than sparsity, optimizer and learning rate explain?"
    )
    try:
        found, not_run = findings(results.runs)
    except ValueError as error:
        return [question, Text(f"**No claim was tested**, because these runs do not go together: {error}")], []
    return [question, *_verdicts(found), *_idle(results), *_within_arms(results.runs, found)], not_run


def _verdicts(found: Sequence[Finding]) -> Iterator[Piece]:
    if not found:
        yield Text("**No claim could be tested**: the runs that one needs are not there.")
        return
    for regime in dict.fromkeys(finding.regime for finding in found):
        counts = Counter(finding.verdict for finding in found if finding.regime == regime)
        told = ", ".join(f"{counts[verdict]} {name}" for verdict, name in VERDICTS.items() if counts[verdict])
        yield Text(f"Of {counts.total()} claims in regime `{regime}`: {told}. They hold for this regime alone.")
    header = (
        "claim",
        "family, regime, optimizer",
        "verdict",
        "measure",
        "difference [95% interval]",
        "at rates that the other seeds choose",
        "seeds",
        "p, Holm",
        "p, equivalence",
        "what would have told against it",
    )
    rows = [
        (
            one.claim,
            ", ".join(filter(None, (one.family, one.regime, one.optimizer))),
            VERDICTS[one.verdict],
            one.measure,
            signed(one.interval),
            signed(one.rechosen) if one.rechosen else "-",
            str(one.interval.n),
            p_text(one.p_holm),
            p_text(one.p_equivalent),
            one.falsifier,
        )
        for one in found
    ]
    yield Table(header, rows)
    yield Text(
        "Rates are those that few seeds of tuning took. Beside that difference stands the same with every seed at the "
        "rates that all other seeds of the test choose, each arm among those it was run at there. A verdict on ACC "
        "that this does not bear out (a test of its own, not adjusted) counts as open."
    )
    yield Text(
        f"A difference above 0 (above -{MARGIN} for a claim of `not below`) speaks for the claim. Holm's p allows for "
        "all the claims of a family and regime together. The equivalence p is small where the difference, whatever its "
        f"sign, is too small to matter: within {MARGIN} of a score, {CORRELATION_MARGIN} of a correlation. **Open** "
        "means that these runs do not decide: it is neither a yes nor a no."
    )


def _idle(results: Results) -> Iterator[Piece]:
    if names := idle(results):
        yield Text(
            f"**Warning: nothing is left out** by {'; '.join(names)}: a token has no more active experts than may "
            "learn from it, so these arms select nothing, and no claim on them says anything of selection."
        )


def _within_arms(runs: Sequence[Run], found: Sequence[Finding]) -> Iterator[Piece]:
    """The correlation that the claim on PI pools over arms, once arms are kept apart."""
    pooled = {(one.family, one.regime): one.interval for one in found if one.claim == PREDICTION.claim}
    if pooled:
        yield Text(
            "The claim on PI pools all arms: one that keeps both PI high and tasks well speaks for it. Beside it the "
            "same correlation within each arm and optimizer, mean over these, where only seeds and tasks differ. No "
            "verdict rests on it."
        )
        rows = [(", ".join(place), signed(whole), signed(within_arms(runs, place))) for place, whole in pooled.items()]
        yield Table(("family, regime", "PI and what is kept, all arms pooled", "within arms"), rows)


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
        usage = [sum(column) for column in zip(*one.usage, strict=True)]
        rows.append(
            (
                figures.name(one),
                str(one.key.seed),
                number(one.information),
                number(one.course[0]) if one.course else "-",
                *among(one.information, one.permuted),
                f"{sum(count == 0 for count in usage)} of {len(usage)}",
                number(one.coactivation),
            )
        )
    header = (
        *("model", "seed", "information [nats]", "before any training", "when permuted, mean", "p"),
        *("experts never used", "co-activation"),
    )
    yield Table(header, rows)
    yield Text(
        "Information of expert and task over the active pairs of held-out tokens. A random router has it, too, as far "
        "as the inputs of tasks differ: what was learnt is the difference to before any training. p, the share of "
        "permutations that reach it, does not tell that. Co-activation: P(both active) over the smaller P(one active), "
        "mean over pairs of experts."
    )
    yield from _vocabulary(found)
    yield from figures.of_specialisation(found, place)


def _vocabulary(found: Sequence[Specialisation]) -> Iterator[Piece]:
    kinds = list(dict.fromkeys(each.symbols for one in found for each in one.vocabulary))
    if not kinds:
        return
    header = [
        cell for kind in kinds for cell in (f"vocabulary, by {kind}", "when permuted, mean", "p", "farthest expert")
    ]
    rows = []
    for one in found:
        known = {each.symbols: each for each in one.vocabulary}
        cells = [cell for kind in kinds for cell in (_kept_to(known[kind]) if kind in known else ["-"] * 4)]
        rows.append((figures.name(one), str(one.key.seed), *cells))
    yield Table(("model", "seed", *header), rows)
    yield Text(
        "Vocabulary specialisation: of all occurrences of a token's symbol, the share that an expert serves; mean over "
        "its tokens, then over experts. Symbols are the characters read (input), those that come next (target), or the "
        "digits shown (class). It is 1 where experts divide the symbols, and what it is when permuted where symbols do "
        "not matter; frequent experts and rare symbols raise both alike. Symbols are permuted over all tokens, so the "
        "experts of a task with symbols of its own stand out too. Farthest expert: the one most above its own chance, "
        "which stands in brackets."
    )


def _kept_to(one: Vocabulary) -> list[str]:
    apart = [(mine - chance, mine, chance) for mine, chance in zip(one.experts, one.chance, strict=True)]
    farthest = max((found for found in apart if math.isfinite(found[0])), default=None)
    largest = f"{number(farthest[1])} ({number(farthest[2])})" if farthest else "-"
    return [number(one.mean), *among(one.mean, one.permuted), largest]


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
    return [*map(plus_minus, found), number(group.change.mean), share(group.active)]


def seeds(group: Group) -> str:
    """`8`, or `6 of 8` where some came to no finite score."""
    return f"{len(group.scores)} of {len(group.runs)}" if group.lost else str(len(group.runs))


LIMITS = (
    "**Shown** is what a verdict says, in its family and regime, by a test that was fixed before the runs. Everything "
    "else here, the order of a table included, is a **lead**: the best of many arms looks better than it is.",
    "Seeds are paired: all arms of a seed see the same tasks, first weights and order of examples. Intervals are over "
    "those seeds, and say nothing of other data, banks or schedules.",
    "Rates are chosen by the few seeds of tuning, in the table of all arms too, where neighbours may change places at "
    "another rate: only the arms of claims were run at several rates on all seeds.",
    "More accuracy at the end can come from less forgetting or from more learning, and less forgetting from learning "
    "less. Compare at equal learning: the frontier, not a single row.",
    "Freezing the experts, random choice and a lowered rate can forget less too. A rule by surprise has shown "
    "something only where it betters these.",
    "The arms of an optimizer had the same grid of learning rates. Where the best of one lies on the edge, the "
    "comparison is not fair to it.",
    "The models are tiny, the tasks few and their borders sharp; inputs are digits or short texts. Nothing here is "
    "about language models at scale.",
    "**No difference that matters** is a claim of its own, with its own test; **open** is not.",
)
