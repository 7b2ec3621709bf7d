"""How to compute the banks of a run on this machine: measured once, and kept in a file for `run.py --calibration`.

calibrating.py [PRESET] [--file FILE] [--repeats N] [any value of the preset, as for run.py]
uv run experiments/run.py [PRESET] --calibration FILE [the same values]

Question: is native code fastest, or which parts of a bank stay in this machine's caches, and from which share of the
tokens is computing all of them faster than the active ones alone? Cost: under a minute for `tiny` on one CPU core. What
other sizes and machines have in the file stays; what this one has is not measured again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from experiments.command import exit_status
from experiments.presets import PRESETS, RunConfig, bank_sizes
from experiments.run import preset
from onn.calibration import calibrated
from onn.tiling import tiling_name


def main(arguments: Sequence[str]) -> int:
    """Carry out what a command line asks for; the exit status."""

    def measure() -> None:
        name, rest = preset("calibrating.py", arguments)

        def options(
            config: Annotated[RunConfig, tyro.conf.arg(name="")] = PRESETS[name],
            file: Annotated[Path, tyro.conf.arg(help="What is measured is added to.")] = Path("calibration.json"),
            repeats: Annotated[int, tyro.conf.arg(help="Interleaved rounds, of which the median counts.")] = 9,
        ) -> None:
            sizes = bank_sizes(config)
            tiling = calibrated(file, **sizes, repeats=repeats)
            print(f"{tiling_name(tiling)}\nuv run experiments/run.py {name} --calibration {file} [the same values]")

        tyro.cli(options, prog="calibrating.py", description=__doc__, args=rest)

    return exit_status(measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
