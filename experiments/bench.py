"""What the expert bank, surprise and SMK cost: time and peak memory as ratios, all variants of a case in one run.

`uv run experiments/bench.py SUITE [--json FILE] [--figure FILE] [--repeats N] [--quick] [--backend NAME]`, minutes each
on two CPU cores, `experts` about 20. Every suite prints its rows and whether it met its goals:

- `experts`: the best of transformers takes at least 1.5 times our time in the geometric mean, 2 times where at least
  half of the experts are active or an expert has at most 16 neurons, and nowhere less than 0.95 times.
- `surprise`: exact surprise takes at most 1.02 times the plain bank. Eager `vmap(grad)` takes tens of times as long and
  a hundred times the memory; Opacus and BackPACK, which know modules and no routing, several times as long.
- `smk`: at most `(6 + 3 rho) / 9 + 0.05` of the plain bank, `rho` being the kept share of the computed rows.
- `memory`: surprise, SMK and recomputation peak at no more than the plain bank.
- `scaling`: the exponent of the cost is at most 1.05 in T and 0.3 in E.
- `step`: a training step of a carved model, a quarter active, takes no longer than the dense one (`bench_step.py`).

The process keeps what it frees, so that no variant waits for the kernel to map and clear memory.
`experiments/LOG.md` has the figures of the last measurement; `bench_figures.py` draws several runs as one picture.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType

import tyro

from experiments.bench_cases import Options, Suite
from experiments.bench_experts import experts_suite
from experiments.bench_figures import draw
from experiments.bench_goals import judge
from experiments.bench_scaling import scaling_suite
from experiments.bench_step import step_suite
from experiments.bench_surprise import memory_suite, smk_suite, surprise_suite
from experiments.command import exit_status
from experiments.measure import Row, report
from experiments.memory import keep_freed_memory

SUITES: Mapping[Suite, Callable[[Options], list[Row]]] = MappingProxyType(
    {
        "experts": experts_suite,
        "surprise": surprise_suite,
        "smk": smk_suite,
        "memory": memory_suite,
        "scaling": scaling_suite,
        "step": step_suite,
    }
)


def main(options: Options) -> list[Row]:
    """Measure a suite, print its rows and what they say of the goals, and write them where that was asked for."""
    keep_freed_memory()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
        rows = report(SUITES[options.suite](options), options.json)
    for verdict in judge(rows):
        print(verdict)
    if options.figure is not None and not draw(rows, options.figure):
        print(f"{options.figure}: nothing to draw; only `experts` and `scaling` have pictures.")
    return rows


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(tyro.cli(Options, prog="bench.py", description=__doc__, args=sys.argv[1:]))))
