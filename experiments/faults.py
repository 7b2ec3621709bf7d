"""Does a run keep its promises when things go wrong? Faults are injected into real runs, and what they cost is counted.

`uv run experiments/faults.py [--kills 50] [--seed 0] [--out DIR] [--only NAME]`: a small configuration of the main job
in all its phases, a quarter of an hour on two CPU cores. Expected: every promise kept (exit status 0), every run that
was killed resumed to the same bits, and no step lost but those since the last whole checkpoint. `experiments/LOG.md`
has the last table.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import tyro
from tqdm import tqdm

from experiments import faults_cases as cases
from experiments.faults_numbers import LASTING, PASSING, planted
from experiments.faults_process import Lab, Trial, counting, ended
from experiments.keeping import METRICS
from onn.checkpoint import MANIFEST

EVERY, DENSE, STEPS = 5, 10, 24
OPTIONS = (
    *("--model.hidden-size", "32", "--model.intermediate-size", "40", "--model.num-hidden-layers", "2"),
    *("--sparse.moe.num-experts", "10", "--sparse.density.ramp-steps", "4", "--data.bytes-per-domain", "4000"),
    *("--data.sequence-length", "16", "--data.batch-size", "4", "--data.eval-windows", "4"),
    *("--train.dense-steps", str(DENSE), "--train.steps", str(STEPS), "--train.rebirth-every", "7"),
    *("--sample.prompt-tokens", "8", "--sample.new-tokens", "4", "--train.max-skipped", "3"),
    *("--train.checkpoint-every", str(EVERY)),
)
Attempt = Callable[[Lab, random.Random, int], Trial]


class Fault(NamedTuple):
    """One line of the table."""

    name: str
    times: int
    attempt: Attempt


def faults(lab: Lab, base: Path, *, kills: int, flushes: int, mounts: bool) -> Iterator[Fault]:
    """Everything that is tried."""
    aimed = kills * 2 // 5
    yield Fault("kill -9 at a random moment", kills - aimed, cases.killed)
    yield Fault("kill -9 amid a checkpoint", aimed, partial(cases.killed_in_a_write, flushes=flushes))
    yield Fault("kill -9 three times in a row", max(1, kills // 10), partial(cases.killed, times=3))
    damage = partial(partial, cases.damaged, base=base)
    for verb, how in (("truncated", cases.truncate), ("bit flipped in", cases.flip), ("missing", cases.remove)):
        yield Fault(f"{verb} shard of the newest checkpoint", 3, damage(damage=cases.of_newest(how, "")))
        yield Fault(f"{verb} manifest of it", 2, damage(damage=cases.of_newest(how, MANIFEST)))
        yield Fault(f"{verb} model of a finished phase", 1, damage(damage=cases.of_finished(how, "model.safetensors")))
        yield Fault(f"{verb} {METRICS}", 1, partial(cases.lost_metrics, base=base, how=how))
    yield Fault("missing config.json", 1, damage(damage=cases.no_configuration))
    yield Fault("other value in config.json", 1, partial(cases.other_configuration, base=base))
    yield Fault("two runs on one folder", 2, cases.two_runs)
    for name, (number, times) in cases.SIGNALS.items():
        yield Fault(name, 3, partial(cases.interrupted, number=number, times=times))
    if mounts:
        yield Fault("disk full (small tmpfs)", 1, partial(cases.without_room, real=True))
    yield Fault("disk full (RLIMIT_FSIZE)", 2, partial(cases.without_room, real=False))
    yield Fault("read-only folder", 1, cases.read_only)
    for value in (float("nan"), float("inf")):
        for place in (*PASSING, *LASTING):
            yield Fault(f"{value} in {place}: skip", 1, partial(planted, place=place, value=value, policy="skip"))
            yield Fault(f"{value} in {place}: stop", 1, partial(planted, place=place, value=value, policy="stop"))


def referred(root: Path) -> tuple[Lab, int]:
    """The run that nothing happens to, and how often it flushed something to the disk."""
    lab = Lab(root, OPTIONS, EVERY, DENSE, 0.0)
    before = time.monotonic()
    status = ended(lab.begin(lab.reference, counting(root / "flushes")))
    if status != 0:
        raise ValueError(f"faults.py: a run without faults ended with {status}:\n{lab.said(lab.reference)}")
    flushes = int((root / "flushes").read_text(encoding="utf-8"))
    return lab._replace(seconds=time.monotonic() - before), flushes


def tried(lab: Lab, fault: Fault, seed: int) -> list[Trial]:
    """All attempts at one fault; folders of those that went well are removed."""
    trials = []
    for position in range(fault.times):
        there = set(lab.root.iterdir())
        trials.append(fault.attempt(lab, random.Random(f"{seed} {fault.name} {position}"), position))
        if trials[-1].kept:
            for path in set(lab.root.iterdir()) - there:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return trials


def row(fault: Fault, trials: Sequence[Trial]) -> tuple[str, ...]:
    """A line of the table."""
    outcomes = list(dict.fromkeys(trial.outcome for trial in trials))
    kept = sum(trial.kept for trial in trials)
    same = sum("same bits" in trial.outcome for trial in trials)
    lost = max(trial.lost for trial in trials)
    return fault.name, str(len(trials)), str(kept), str(same) if same else "-", str(lost), "; ".join(outcomes)


def main(kills: int = 50, seed: int = 0, out: Path | None = None, only: str = "") -> int:
    """Inject every fault and print what came of it; 1 if a promise was broken.

    Args:
        kills: kill -9 so often, two fifths of them amid the writing of a file.
        seed: of the moments and places.
        out: folder for the runs, of which those that broke a promise stay; without it a temporary one.
        only: try nothing but the faults with this in their names.
    """
    root = (out or Path(tempfile.mkdtemp(prefix="faults-"))).resolve()
    root.mkdir(parents=True, exist_ok=True)
    root.chmod(0o777)
    lab, flushes = referred(root)
    print(f"a run without faults: {lab.seconds:.1f} s, {flushes} flushes, a checkpoint every {EVERY} steps")
    base = cases.base(lab)
    mounts = cases.can_mount(lab)
    everything = faults(lab, base, kills=kills, flushes=flushes, mounts=mounts)
    plan = [fault for fault in everything if only in fault.name]
    lines: list[tuple[str, ...]] = [("fault", "times", "kept", "same bits", "lost", "outcome")]
    broken = 0
    for fault in tqdm(plan, disable=None):
        trials = tried(lab, fault, seed)
        broken += sum(not trial.kept for trial in trials)
        lines.append(row(fault, trials))
        tqdm.write("  ".join(lines[-1]))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    print("\n" + "\n".join("  ".join([*map(str.ljust, line[:5], widths), line[5]]) for line in lines))
    if not mounts:
        print("No small file system could be mounted here: a full disk was a limit on the size of files.")
    print(f"\n{broken} promises broken." if broken else "\nEvery promise kept.")
    if out is None and not broken:
        shutil.rmtree(root)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
