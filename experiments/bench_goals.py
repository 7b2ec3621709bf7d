"""What the rows of `bench.py` say: fitted exponents, and whether the goals were met."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from experiments.measure import Row

SPEED_UP = "speed-up"
"""Note of the row that holds the fastest of transformers against the fastest of ours."""
OVER_ALL = "speed-up over all"
"""The same with every other peer, the naive loop among them; no goal was set for it."""
TIME_OF_SURPRISE = 1.02
PEAK = 1.0
STEP = 1.0
SMK_SLACK = 0.05
EXPONENTS: Mapping[str, float] = {"T": 1.05, "E": 0.3}


class Fit(NamedTuple):
    """`cost = c size^exponent`, by least squares of the logarithms."""

    exponent: float
    error: float
    """Standard error of the exponent; NaN for fewer than three sizes."""
    factor: float
    """c."""


def fit(sizes: Sequence[float], costs: Sequence[float]) -> Fit:
    """The power law nearest to the costs in logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    n = len(x)
    mean_x, mean_y = math.fsum(x) / n, math.fsum(y) / n
    spread = math.fsum((a - mean_x) ** 2 for a in x)
    exponent = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    offset = mean_y - exponent * mean_x
    rest = math.fsum((b - offset - exponent * a) ** 2 for a, b in zip(x, y, strict=True))
    error = math.sqrt(rest / (n - 2) / spread) if n > 2 else math.nan
    return Fit(exponent=exponent, error=error, factor=math.exp(offset))


def numbers(text: str) -> dict[str, float]:
    """The sizes that a case or a variant names: `T512 H256 rho0.25` gives T, H and rho."""
    return {name: float(value) for name, value in re.findall(r"\b([A-Za-z_]+)(\d+(?:\.\d+)?)\b", text)}


class Series(NamedTuple):
    """Costs against one size, the others fixed."""

    axis: str
    """T, E, I or L."""
    label: str
    """What was fixed, and the dtype."""
    sizes: tuple[float, ...]
    costs: tuple[float, ...]
    """Relative to the first size."""
    fit: Fit


def series(rows: Sequence[Row]) -> list[Series]:
    """The series of suite `scaling`: rows of one case and dtype, each a size against the smallest."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.suite == "scaling" and math.isfinite(row.ratio):
            groups.setdefault((row.case, row.dtype), []).append(row)
    found = []
    for (case, dtype), members in groups.items():
        ((axis, smallest),) = numbers(members[0].baseline).items()
        points = sorted([(smallest, 1.0), *((numbers(row.variant)[axis], row.ratio) for row in members)])
        sizes, costs = zip(*points, strict=True)
        found.append(Series(axis=axis, label=f"{case} {dtype}", sizes=sizes, costs=costs, fit=fit(sizes, costs)))
    return found


class Verdict(NamedTuple):
    """A goal and what was measured."""

    goal: str
    bound: float
    at_least: bool
    """Whether the bound is a lower one."""
    measured: float
    where: str
    """The case that decides."""

    @property
    def met(self) -> bool:
        """Whether the goal was reached; never by a NaN."""
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def __str__(self) -> str:
        state = "met   " if self.met else "MISSED"
        sign = ">=" if self.at_least else "<="
        return f"{state}  {self.goal}: {self.measured:.3f}, goal {sign} {self.bound:.3g} ({self.where})"


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """Every goal that the rows have figures for, each by the case where it is hardest."""
    shown = [row for row in rows if math.isfinite(row.ratio)]
    return [
        *_experts(shown),
        *_surprise(shown),
        *_smk(shown),
        *_memory(shown),
        *_scaling(shown),
        *_step(shown),
    ]


def _where(row: Row) -> str:
    return f"{row.case} {row.dtype}, {row.variant}"


def _experts(rows: Sequence[Row]) -> list[Verdict]:
    found = [row for row in rows if row.suite == "experts" and row.note == SPEED_UP]
    if not found:
        return []

    def least(goal: str, bound: float, wanted: Callable[[dict[str, float]], bool]) -> list[Verdict]:
        chosen = [row for row in found if wanted(numbers(row.case))]
        if not chosen:
            return []
        worst = min(chosen, key=lambda row: row.ratio)
        return [Verdict(goal, bound, at_least=True, measured=worst.ratio, where=_where(worst))]

    mean = geometric_mean([row.ratio for row in found])
    return [
        Verdict("transformers / ours, geometric mean", 1.5, at_least=True, measured=mean, where=f"{len(found)} cases"),
        *least("transformers / ours at k/E >= 0.5, worst", 2.0, lambda sizes: sizes["k"] / sizes["E"] >= 0.5),
        *least("transformers / ours at I <= 16, worst", 2.0, lambda sizes: sizes["I"] <= 16),
        *least("transformers / ours anywhere, worst", 0.95, lambda _: True),
    ]


def _most(goal: str, bound: float, found: Sequence[tuple[float, str]]) -> list[Verdict]:
    if not found:
        return []
    measured, where = max(found)
    return [Verdict(goal, bound, at_least=False, measured=measured, where=where)]


def _surprise(rows: Sequence[Row]) -> list[Verdict]:
    found = [
        (row.ratio, _where(row))
        for row in rows
        if row.suite == "surprise" and row.variant == "surprise" and row.baseline == "plain"
    ]
    return _most("exact surprise / plain, worst", TIME_OF_SURPRISE, found)


def _step(rows: Sequence[Row]) -> list[Verdict]:
    """Both under AdamW."""
    against_dense = [row for row in rows if row.suite == "step" and row.baseline.startswith("dense")]
    alike = [row for row in against_dense if row.variant.startswith("carved") and "consolidation" not in row.variant]
    found = [(row.ratio, _where(row)) for row in alike]
    return _most("step of the carved model / the dense one, worst", STEP, found)


def smk_bound(rho: float) -> float:
    """`(6 + 3 rho) / 9 + 0.05`: six products of nine are as before, three hold the kept rows alone."""
    return (6 + 3 * rho) / 9 + SMK_SLACK


def _smk(rows: Sequence[Row]) -> list[Verdict]:
    """By backend: SMK's time over its own bound, worst case."""
    found: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        if row.suite == "smk":
            bound = smk_bound(numbers(row.case)["rho"])
            entry = (row.ratio / bound, f"{_where(row)}: {row.ratio:.3f}, goal {bound:.3f}")
            found.setdefault(row.variant.split(":")[0], []).append(entry)
    return [
        verdict for name, entries in found.items() for verdict in _most(f"SMK / its goal, {name}, worst", 1, entries)
    ]


def _memory(rows: Sequence[Row]) -> list[Verdict]:
    found: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        (name, _, how), baseline = row.variant.partition(", "), row.baseline.split(",")[0]
        if row.suite == "memory" and name != "plain" and math.isfinite(row.peak_ratio):
            found.setdefault(f"peak of {name} / {baseline}, {how}", []).append((row.peak_ratio, _where(row)))
    return [verdict for goal, entries in found.items() for verdict in _most(f"{goal}, worst", PEAK, entries)]


def _scaling(rows: Sequence[Row]) -> list[Verdict]:
    found: dict[str, list[tuple[float, str]]] = {}
    for one in series(rows):
        if one.axis in EXPONENTS:
            where = f"{one.label}, standard error {one.fit.error:.3f}"
            found.setdefault(one.axis, []).append((one.fit.exponent, where))
    return [
        verdict
        for axis, entries in found.items()
        for verdict in _most(f"exponent of the cost in {axis}, worst", EXPONENTS[axis], entries)
    ]
