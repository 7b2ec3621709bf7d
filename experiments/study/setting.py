"""What a study ran, as the report tells it: places, bank, arms with their grids, and what could not be tested."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from experiments.page_blocks import Bullets, Details, Piece, Table, Text
from experiments.report import flatten, listing
from experiments.study.arms import ALL, ARMS, BASE_ACTIVE, EXPLORATIONS, Arm
from experiments.study.groups import of, places
from experiments.study.records import Run, Stage
from experiments.study.store import Results
from onn.settings import Regime

STAGES: tuple[Stage, ...] = ("tuning", "evaluation", "frontier", "neighbour", "exploration")
REGIMES: Mapping[Regime, str] = {
    "experts": "after the first task only the experts and the router learn (of text, in the first too)",
    "everything": "experts, router, read-out and features learn throughout (of text, the trunk stays frozen)",
}
KNOWN: Mapping[str, Arm] = {**ARMS, **EXPLORATIONS}


def setting(results: Results, not_run: Sequence[str]) -> Iterator[Piece]:
    """What was run, and why the claims of `not_run` were not tested."""
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
        regimes = {run.key.regime for run in results.runs}
        for regime, meaning in REGIMES.items():
            if regime in regimes:
                yield Text(f"Regime `{regime}`: {meaning}. Updating everything means all that the regime lets learn.")
        yield from _bank(results)
        yield Text(
            "Rates and strengths were chosen by ACC on the seeds of tuning, which no other stage uses; `own` is an arm "
            "that is its own optimizer."
        )
        yield Details("Every arm and its grids", [_arms(results.runs)])
    if not_run:
        yield Text("**Not run**, so not tested:")
        yield Bullets(not_run)
    if results.settings:
        shown = {name: value for name, value in results.settings.items() if name != "arms"}
        yield Details("Settings", listing(list(flatten(shown, ""))))
    if results.facts:
        yield Details("Versions, machine and data", listing(list(flatten(results.facts, ""))))


def idle(results: Results) -> list[str]:
    """Arms whose rule leaves nothing out: no more experts of this bank are active on a token than may learn from it."""
    experts = results.settings.get("experts")
    if not isinstance(experts, int):
        return []
    seen = {run.key.arm for run in results.runs}
    return [
        name
        for name, arm in KNOWN.items()
        if name in seen and not arm.dynamic and round(arm.active * experts) <= arm.learners < ALL
    ]


def _bank(results: Results) -> Iterator[Piece]:
    experts, width = (results.settings.get(name) for name in ("experts", "width"))
    if isinstance(experts, int) and isinstance(width, int):
        yield Text(
            f"Experts of the bank: {experts}; neurons of each: {width}; experts that a token has active, unless an arm "
            f"says otherwise: {round(BASE_ACTIVE * experts)}."
        )


def _arms(runs: Sequence[Run]) -> Table:
    rows = []
    for arm, optimizer in dict.fromkeys((run.key.arm, run.key.optimizer) for run in runs):
        own = [run.key for run in runs if run.key[2:4] == (arm, optimizer)]
        rates, strengths = (sorted(set(values)) for values in ([k.lr for k in own], [k.strength for k in own]))
        note = KNOWN[arm].note if arm in KNOWN else ""
        rows.append((arm, optimizer, _some(rates), _some(strengths) if strengths != [0.0] else "-", note))
    return Table(("arm", "optimizer", "learning rates", "strengths", "what it is"), rows)


def _some(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
