"""Numbers as the report writes them; a dash for what is not known."""

from __future__ import annotations

import math
from collections.abc import Sequence

from experiments.study.statistics import Interval

NO_BREAK = "\u00a0"


def plus_minus(value: Interval) -> str:
    """The mean ± half of its interval, as far as there are any."""
    half = value.high - value.mean
    return number(value.mean) + (f"{NO_BREAK}±{NO_BREAK}{half:.3f}" if math.isfinite(half) else "")


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


def number(value: float) -> str:
    """To three places."""
    return f"{value:.3f}" if math.isfinite(value) else "-"


def among(value: float, permuted: Sequence[float]) -> tuple[str, str]:
    """The mean of a measure over permutations, and the p of its value: the share that reaches it, its own included."""
    if not permuted:
        return "-", "-"
    reached = sum(one >= value for one in permuted)
    return number(math.fsum(permuted) / len(permuted)), p_text((1 + reached) / (1 + len(permuted)))
