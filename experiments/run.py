"""The main job: train a dense Qwen3, carve it into experts, train these by surprise, and report what came of it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from experiments.guard import INTERRUPTED, Stopped
from experiments.pipeline import resume, run
from experiments.presets import PRESETS, RunConfig, tiled
from experiments.replay import replay, table
from experiments.report import summary_table
from onn import check

DESCRIPTION = """Train a dense Qwen3, carve its MLPs into experts, train these by surprise, and report.

run.py [PRESET] [--out DIR] [--calibration FILE] [any value of the preset, such as --train.steps 20 --seed 3]
run.py --resume DIR: go on with a run that was stopped, from its last whole checkpoint
run.py --replay DIR [--out NEW]: repeat a finished run and compare

Presets: tiny (default: the whole pipeline on two CPU cores in minutes), qwen3-0.6b (the real checkpoint in weights/).
Exit status: 0 done, 1 a replay differed, 2 refused, 3 stopped by steps that are not finite, 130 interrupted.
"""
PROGRAM = "uv run experiments/run.py"
CALIBRATION = "File of experiments/calibrating.py, whose tiling takes the place of sparse.moe.backend."


class Order(NamedTuple):
    """What a command line asks for."""

    config: RunConfig
    calibration: Path | None
    out: Path
    resume: Path | None
    replay: Path | None


def parse(arguments: Sequence[str]) -> Order:
    """What a command line asks for.

    Raises:
        ValueError: an unknown preset (the nearest name is suggested), or values for a run that has its own.
        SystemExit: tyro found an unknown option or value, and has said so, or was asked for help.
    """
    name, rest = preset("run.py", arguments)
    named = rest != list(arguments)

    def options(
        config: Annotated[RunConfig, tyro.conf.arg(name="")] = PRESETS[name],
        out: Annotated[Path | None, tyro.conf.arg(help="Folder of the run; without it runs/<preset>-<time>.")] = None,
        calibration: Annotated[Path | None, tyro.conf.arg(help=CALIBRATION)] = None,
        resume: Annotated[Path | None, tyro.conf.arg(help="Folder of a run to go on with.")] = None,
        replay: Annotated[Path | None, tyro.conf.arg(help="Folder of a finished run to repeat.")] = None,
    ) -> Order:
        check.require(
            config.preset == name,
            f"run.py: a preset is named first, not by --preset: run.py {config.preset} [OPTIONS].",
        )
        given = resume or replay
        own = f"{given.name}-replay" if replay and given else name
        if given is not None:
            check.require(
                not (named or calibration) and config == PRESETS[name] and not (resume and (replay or out)),
                f"run.py: {given} brings its own configuration; --resume takes nothing else, --replay only --out.",
            )
        return Order(config, calibration, out or Path("runs") / f"{own}-{datetime.now():%Y%m%d-%H%M%S}", resume, replay)

    return tyro.cli(options, prog="run.py", description=DESCRIPTION, args=rest)


def preset(program: str, arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The preset that a command line begins with, else `tiny`, and what follows.

    Raises:
        ValueError: an unknown preset; the nearest name is suggested.
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    name = arguments[0] if named else "tiny"
    check.one_of(program, "preset", name, PRESETS)
    return name, list(arguments[1:] if named else arguments)


def main(arguments: Sequence[str]) -> int:
    """Carry out what a command line asks for; the exit status."""
    folder: Path | None = None
    try:
        order = parse(arguments)
        folder = order.resume or order.out
        return _carried_out(order, command(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        print(f"error: {folder}: {error.strerror or error}{place}; checkpoints are as they were.", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        begun = folder is not None and folder.is_dir()
        print(f"\nInterrupted{f'; go on with: {PROGRAM} --resume {folder}' if begun else '.'}", file=sys.stderr)
        return INTERRUPTED


def command(arguments: Sequence[str]) -> str:
    """What repeats a run that these arguments began, in a folder of its own."""
    own = list(arguments)
    for place, argument in enumerate(arguments):
        if argument == "--out" or argument.startswith("--out="):
            del own[place : place + 1 + (argument == "--out")]
            break
    return shlex.join([*PROGRAM.split(), *own])


def _carried_out(order: Order, again: str) -> int:
    if order.replay is not None:
        rows = replay(order.replay, order.out)
        print(f"\n{table(rows)}\n\nReplay: {order.out}")
        return 1 if any(row.first for row in rows) else 0
    folder = order.resume or order.out
    if order.resume:
        summary = resume(folder)
    else:
        config = tiled(order.config, order.calibration) if order.calibration else order.config
        summary = run(config, folder, command=again)
    print(f"\n{summary_table(summary)}\n\nReport: {folder / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
