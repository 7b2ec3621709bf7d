"""Final accuracy at rates that the other seeds of the test choose: does a verdict hang on what tuning took?

Few seeds of tuning take a neighbour of the best rate easily, and what that costs an arm looks like a difference between
arms. Nineteen seeds choose better than three, and choose for the twentieth alone, so that no seed is judged at a rate
that it took part in choosing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from experiments.study import statistics
from experiments.study.records import Run


def along(runs: Iterable[Run], tuned: Mapping[int, Run]) -> dict[float, dict[int, float]]:
    """ACC by rate and seed, of the arm, optimizer and strength of the runs `tuned` (by seed), on their seeds.

    Rates that lack a seed or have an ACC that is not finite are left out.
    """
    wanted = {run.key._replace(lr=0.0) for run in tuned.values()}
    found: dict[float, dict[int, float]] = {}
    for run in runs:
        if run.stage in ("evaluation", "frontier", "neighbour") and run.key._replace(lr=0.0) in wanted:
            found.setdefault(run.key.lr, {})[run.key.seed] = statistics.scores(run.scores).accuracy
    return {
        rate: seeds
        for rate, seeds in found.items()
        if seeds.keys() == tuned.keys() and all(map(math.isfinite, seeds.values()))
    }


def rechosen(table: Mapping[float, Mapping[int, float]]) -> dict[int, float]:
    """Of every seed the value at the rate that is best in the mean of all other seeds; ties go to the lower rate.

    Empty without rates, or where a seed has no other.
    """
    rates = sorted(table)
    seeds = sorted(table[rates[0]]) if rates else []
    if len(seeds) < 2:
        return {}

    def others(rate: float, seed: int) -> float:
        return math.fsum(value for other, value in table[rate].items() if other != seed)

    return {seed: table[max(rates, key=lambda rate: others(rate, seed))][seed] for seed in seeds}


def bears_out(verdict: str, differences: Sequence[float], *, bound: float, margin: float, alpha: float) -> bool:
    """Whether differences at other rates say the same as a verdict, by one test that nothing is corrected for.

    `supported` and `refuted` have a mean that differs from `bound` to their side, `equivalent` one within the margin.
    `open` says nothing that could be borne out or not, and no differences say nothing against any.
    """
    if not differences or verdict == "open":
        return True
    if verdict == "equivalent":
        return statistics.equivalence_p(differences, margin=margin) < alpha
    over = [value - bound for value in differences]
    return (math.fsum(over) > 0) == (verdict == "supported") and statistics.p_value(over) < alpha
