"""The main job: train a dense Qwen3, carve it into experts, train these by surprise, and report what came of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import tyro

from experiments.pipeline import run
from experiments.presets import PRESETS, RunConfig
from experiments.report import summary_table
from onn import check

DESCRIPTION = """Train a dense Qwen3, carve its MLPs into experts, train these by surprise, and report.

run.py [PRESET] [--out DIR] [any value of the preset, such as --train.steps 20 --seed 3]

Presets: tiny (default: the whole pipeline on two CPU cores in minutes), qwen3-0.6b (the real checkpoint in weights/).
"""


def parse(arguments: Sequence[str]) -> tuple[RunConfig, Path]:
    """The configuration and the run folder that a command line asks for.

    Raises:
        ValueError: an unknown preset; the nearest name is suggested.
        SystemExit: tyro found an unknown option or value, and has said so, or was asked for help.
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    name = arguments[0] if named else "tiny"
    check.one_of("run.py", "preset", name, PRESETS)

    def options(
        config: Annotated[RunConfig, tyro.conf.arg(name="")] = PRESETS[name],
        out: Annotated[Path | None, tyro.conf.arg(help="Folder of the run; without it runs/<preset>-<time>.")] = None,
    ) -> tuple[RunConfig, Path]:
        return config, out or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"

    return tyro.cli(options, prog="run.py", description=DESCRIPTION, args=list(arguments[1:] if named else arguments))


def main(arguments: Sequence[str]) -> int:
    """Run one configuration; the exit status."""
    try:
        config, folder = parse(arguments)
        summary = run(config, folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{summary_table(summary)}\n\nReport: {folder / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
