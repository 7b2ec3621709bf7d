"""Faults of processes, disks and files, each with what must come of it."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from experiments.faults_process import Lab, Trial, dying_at, ended, kill, last_line, until, without_privilege
from experiments.keeping import FOLDER, METRICS

Damage = Callable[[Path, random.Random], None]
FILES = ("model.safetensors", "training.safetensors", "generators.safetensors", METRICS)
TYPED = "error: "
PLACE = ("moe", 2)
"""Where faults of one place strike: after this checkpoint of this phase."""


def killed(lab: Lab, source: random.Random, position: int, *, times: int = 1) -> Trial:
    """Kill -9 after a random share of the time that a run takes, and so again what was resumed."""
    folder = lab.root / f"killed-{times}-{position}"
    done = 0
    while done < times:
        child = lab.again(folder) if done else lab.begin(folder)
        time.sleep(source.random() * lab.seconds / times)
        kill(child)
        if ended(child) == -signal.SIGKILL:
            done += 1
        else:
            shutil.rmtree(folder, ignore_errors=True)  # it was faster than the kill, or had nothing to resume
            done = 0
    return lab.recovered(folder, steps=lab.steps(folder))


def killed_in_a_write(lab: Lab, source: random.Random, position: int, *, flushes: int) -> Trial:
    """Kill -9 amid the writing of a checkpoint or of another file that is written whole."""
    folder = lab.root / f"killed-in-write-{position}"
    status = ended(lab.begin(folder, dying_at(source.randint(1, flushes))))
    trial = lab.recovered(folder, steps=lab.steps(folder))
    return trial if status == -signal.SIGKILL else Trial(False, 0, f"was not killed, but ended with {status}")


def damaged(lab: Lab, source: random.Random, position: int, *, base: Path, damage: Damage) -> Trial:
    """Damage a file of a run that was killed."""
    folder = lab.root / f"damaged-{base.name}-{position}-{source.randrange(2**32):08x}"
    shutil.copytree(base, folder)
    steps = lab.steps(folder)
    damage(folder, source)
    trial = lab.recovered(folder, steps=steps)
    told = "damaged: " in lab.said(folder) or "is missing" in lab.said(folder)
    limit = 2 * lab.every
    kept = trial.outcome == "resumed to the same bits" and trial.lost <= limit and told
    return trial._replace(kept=kept, outcome=f"{trial.outcome}{', and said so' if told else ', in silence'}")


def newest(folder: Path) -> Path:
    """The newest checkpoint within the phase that was struck."""
    return sorted((folder / FOLDER).glob(f"{PLACE[0]}-0*"))[-1]


def truncate(path: Path, source: random.Random) -> None:
    """Cut a file off somewhere."""
    os.truncate(path, source.randrange(path.stat().st_size))


def flip(path: Path, source: random.Random) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    content[source.randrange(len(content))] ^= 1 << source.randrange(8)
    path.write_bytes(content)


def remove(path: Path, source: random.Random) -> None:
    """Remove a file."""
    path.unlink()


def of_newest(how: Callable[[Path, random.Random], None], name: str) -> Damage:
    """Damage to a file of the newest checkpoint; without a name any but the manifest."""

    def damage(folder: Path, source: random.Random) -> None:
        how(newest(folder) / (name or source.choice(FILES)), source)

    return damage


def of_finished(how: Callable[[Path, random.Random], None], name: str) -> Damage:
    """Damage to what the first phase left."""

    def damage(folder: Path, source: random.Random) -> None:
        how(folder / FOLDER / "dense-model" / name, source)

    return damage


def no_configuration(folder: Path, source: random.Random) -> None:
    """Remove config.json."""
    (folder / "config.json").unlink()


def lost_metrics(lab: Lab, source: random.Random, position: int, *, base: Path, how: Damage) -> Trial:
    """Damage metrics.jsonl, of which every checkpoint holds a copy."""
    folder = lab.root / f"metrics-{how.__name__}-{position}"
    shutil.copytree(base, folder)
    steps = lab.steps(folder)
    how(folder / METRICS, source)
    return lab.recovered(folder, steps=steps)


def other_configuration(lab: Lab, source: random.Random, position: int, *, base: Path) -> Trial:
    """Change a digit in config.json: refused, and as before when that file is gone."""
    folder = lab.root / f"configuration-{position}"
    shutil.copytree(base, folder)
    steps, path = lab.steps(folder), folder / "config.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    refused = ended(lab.again(folder)) == 2 and TYPED in lab.said(folder)
    path.unlink()
    trial = lab.recovered(folder, steps=steps)
    return trial._replace(
        kept=trial.kept and refused, outcome=f"{'refused' if refused else 'NOT refused'}, then same bits"
    )


def at_work(lab: Lab, folder: Path) -> bool:
    """Whether a run has come to the place where faults strike."""
    return lab.kept_step(folder, PLACE[0], PLACE[1] * lab.every)


def two_runs(lab: Lab, source: random.Random, position: int) -> Trial:
    """A second and a third run on the folder of one at work."""
    folder = lab.root / f"two-{position}"
    first = lab.begin(folder)
    until(partial(at_work, lab, folder), first)
    second, third = ended(lab.begin(folder)), ended(lab.again(folder))
    said = lab.said(folder)
    refused = (second, third) == (2, 2) and "holds a run already" in said and "another run is at work" in said
    trial = lab.judged(folder, steps=0, status=ended(first))
    return trial._replace(
        kept=trial.kept and refused, outcome=f"both {'' if refused else 'NOT '}refused, the first with the same bits"
    )


def interrupted(lab: Lab, source: random.Random, position: int, *, number: int, times: int) -> Trial:
    """Ctrl-C (or SIGTERM), once or twice, in a step."""
    folder = lab.root / f"signal-{number}-{times}-{position}"
    child = lab.begin(folder)
    until(partial(at_work, lab, folder), child)
    time.sleep(source.random() * lab.seconds / 20)
    for _ in range(times):
        kill(child, number)
    status, steps, said = ended(child), lab.steps(folder), lab.said(folder)
    trial = lab.recovered(folder, steps=steps)
    orderly = status == 130 and f"--resume {folder}" in said
    limit = 0 if times == 1 else lab.every
    return trial._replace(
        kept=trial.kept and orderly and trial.lost <= limit,
        outcome=f"ended with {status}{', said where' if orderly else f': {last_line(said, folder)}'}, {trial.outcome}",
    )


def without_room(lab: Lab, source: random.Random, position: int, *, real: bool) -> Trial:
    """Fill the disk: a small file system of its own (`real`), or a limit on the size of files."""
    place = lab.root / f"disk-{'full' if real else 'limit'}-{position}"
    place.mkdir()
    folder = place / f"run-{place.name}"
    if real:
        one = sum(file.stat().st_size for file in sorted((lab.reference / FOLDER).glob("*-0*"))[-1].iterdir())
        size = int(2.7 * one)
        subprocess.run(_mount(place, size), check=True)
    try:
        child = lab.begin(folder)
        if not real and until(partial(at_work, lab, folder), child):
            resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (4096, 4096))
        status, steps, said = ended(child), lab.steps(folder), lab.said(folder)
        saved = lab.root / f"saved-{place.name}"
        shutil.copytree(folder, saved)
    finally:
        if real:
            subprocess.run(["umount", str(place)], check=False)
    typed = status == 2 and TYPED in said and str(folder) in said and "Traceback" not in said
    trial = lab.recovered(saved, steps=steps)
    return trial._replace(
        kept=trial.kept and typed, outcome=f"ended with {status}: {last_line(said, folder)}; {trial.outcome}"
    )


def _mount(place: Path, size: int) -> list[str]:
    return ["mount", "-t", "tmpfs", "-o", f"size={size // 1024}k", "tmpfs", str(place)]


def can_mount(lab: Lab) -> bool:
    """Whether a small file system may be mounted here."""
    place = lab.root / "mount"
    place.mkdir()
    if shutil.which("mount") is None or subprocess.run(_mount(place, 2**16), check=False).returncode:
        return False
    subprocess.run(["umount", str(place)], check=True)
    return True


def read_only(lab: Lab, source: random.Random, position: int) -> Trial:
    """Take away the right to write while a run is at work, and ask for a run where there is none."""
    home = lab.root / f"read-only-{position}"
    home.mkdir()
    home.chmod(0o777)
    folder = home / f"run-{home.name}"
    child = lab.begin(folder, without_privilege)
    until(partial(at_work, lab, folder), child)
    for path in (folder / FOLDER, folder, home):
        path.chmod(0o555)
    status, steps = ended(child), lab.steps(folder)
    other = home / f"new-{home.name}"
    refused = ended(lab.begin(other, without_privilege))
    for path in (folder / FOLDER, folder, home):
        path.chmod(0o777)
    said = lab.said(folder) + lab.said(other)
    typed = (status, refused) == (2, 2) and said.count(TYPED) == 2 and "Traceback" not in said
    trial = lab.recovered(folder, steps=steps, sabotage=without_privilege)
    return trial._replace(
        kept=trial.kept and typed,
        outcome=f"ended with {status} and {refused}: {last_line(said, other)}; {trial.outcome}",
    )


def base(lab: Lab) -> Path:
    """A run killed amid its second phase, for files to be damaged in."""
    folder = lab.root / "base"
    child = lab.begin(folder)
    until(partial(at_work, lab, folder), child)
    kill(child)
    ended(child)
    return folder


SIGNALS = {
    "Ctrl-C": (signal.SIGINT, 1),
    "SIGTERM": (signal.SIGTERM, 1),
    "Ctrl-C twice": (signal.SIGINT, 2),
}
