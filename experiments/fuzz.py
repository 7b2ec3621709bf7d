"""Is there a file that makes a parser do anything but read it or say what is wrong with it?

`uv run --group fuzz experiments/fuzz.py [--target NAME ...] [--inputs N] [--seed S]`: 136,000 inputs on one CPU core,
guided by coverage (atheris; without it the same mutations are drawn blindly, and a line says so). Expected: no finding.

A finding is any outcome but success and a `ValueError` that names the file: another exception, an assertion, ten
seconds of one core, memory beyond 4 GiB, or what `experiments/fuzz_guard.py` forbids (code compiled or imported, a
process, a pickle, the network, a path outside the folder). It is minimised and printed with the command that repeats
it; the exit status is 1.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, NamedTuple

import tyro

if TYPE_CHECKING:
    from experiments.fuzz_guard import Guard
    from experiments.fuzz_targets import Target

NAMES = (
    *("manifest", "safetensors", "tree", "index", "config", "run", "chat", "text", "metrics", "tokenizer"),
    *("checkpoint", "figures"),
)
INSTRUMENTED = ("onn", "experiments.presets", "experiments.keeping", "tomllib", "json")
SECONDS, MEMORY, LONGEST = 10, 4 * 2**30, 65536
TRIES = 400
"""Of the minimiser, for each finding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What to fuzz, and for how long."""

    target: tuple[str, ...] = NAMES
    """Parsers."""
    inputs: int | None = None
    """Of each target; without it each has its own number."""
    seed: int = 1
    replay: str = ""
    """One input of one target in base64, as a finding prints it: its outcome is printed, and nothing else is done."""
    report: Path | None = None
    """Where a process that the script starts for one target leaves its counts."""


class TimeLimit(BaseException):
    """One input took too long; not an `Exception`, so that no parser swallows it."""


class Finding(NamedTuple):
    """An outcome that is neither success nor a typed error."""

    signature: str
    """What was raised, and where."""
    message: str
    input: str
    """base64"""


def out_of_time(number: int, frame: FrameType | None) -> None:
    raise TimeLimit(f"{SECONDS} s")


@contextmanager
def limited() -> Iterator[None]:
    """Time of the processor, which does not pass while the process is stopped."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


class Trial:
    """One target, its folder and what came of its inputs."""

    def __init__(self, target: Target, guard: Guard, folder: Path) -> None:
        self.target, self.guard, self.folder = target, guard, folder
        self.counts = {"inputs": 0, "accepted": 0, "refused": 0}
        self.findings: dict[str, Finding] = {}
        for name, data in target.beside:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        for seed in target.seeds:
            (folder / target.file).write_bytes(seed)
            with guard.armed(learning=True):
                target.read(folder)

    def outcome(self, data: bytes) -> str | Finding:
        """`accepted`, `refused`, or what is wrong."""
        (self.folder / self.target.file).write_bytes(data)
        try:
            with limited(), self.guard.armed(learning=False):
                self.target.read(self.folder)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever it is, it is what is looked for
            text = str(error)
            named = any(word in text for word in (self.target.file, *self.target.named))
            if type(error) is ValueError and named and len(text) < 4000:
                return "refused"
            return Finding(signature_of(error), text[:200], base64.b64encode(data).decode())
        return "accepted"

    def note(self, data: bytes) -> None:
        """Count one input."""
        found = self.outcome(data)
        self.counts["inputs"] += 1
        if isinstance(found, str):
            self.counts[found] += 1
        elif found.signature not in self.findings or len(found.input) < len(self.findings[found.signature].input):
            self.findings[found.signature] = found

    def minimised(self, finding: Finding) -> Finding:
        """The shortest input found by leaving parts out that is wrong in the same way."""
        data, size, tries = base64.b64decode(finding.input), 0, TRIES
        size = len(data) // 2
        while size >= 1 and tries > 0:
            start, shorter = 0, False
            while start < len(data) and tries > 0:
                tries -= 1
                found = self.outcome(data[:start] + data[start + size :])
                if isinstance(found, Finding) and found.signature == finding.signature:
                    data, finding, shorter = data[:start] + data[start + size :], found, True
                else:
                    start += size
            size = size if shorter else size // 2
        return finding

    def report(self) -> str:
        """What the process that started this one reads."""
        findings = [self.minimised(finding)._asdict() for finding in self.findings.values()]
        return json.dumps({**self.counts, "watched": self.guard.watched, "findings": findings})


def signature_of(error: BaseException) -> str:
    """The exception and the innermost place in this repository that it came through."""
    root = str(Path(__file__).parents[1])
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(root)]
    inner = [frame for frame in frames if "fuzz" not in frame.filename] or frames
    where = f"{Path(inner[-1].filename).relative_to(root)}:{inner[-1].name}" if inner else "outside"
    return f"{type(error).__name__} in {where}"


def prepared(name: str, guided: ModuleType | None, folder: Path) -> Trial:
    """The target, with the parsers instrumented where coverage guides, and the guard in place."""
    if guided is None:
        module = importlib.import_module("experiments.fuzz_targets")
    else:
        with guided.instrument_imports(include=list(INSTRUMENTED)):
            module = importlib.import_module("experiments.fuzz_targets")
    from experiments.fuzz_guard import Guard

    place = folder / "folder"
    place.mkdir()
    target: Target = module.targets()[name]
    signal.signal(signal.SIGPROF, out_of_time)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    return Trial(target, Guard(place), place)


def work(name: str, inputs: int | None, seed: int, report: Path) -> None:
    """Fuzz one target in this process, which ends here."""
    guided = importlib.import_module("atheris") if find_spec("atheris") else None
    with tempfile.TemporaryDirectory() as folder:
        trial = prepared(name, guided, Path(folder))
        limit = inputs or trial.target.inputs

        def one(data: bytes) -> None:
            trial.note(data)
            if trial.counts["inputs"] >= limit:
                report.write_text(trial.report())
                sys.stderr.flush()
                os._exit(0)

        if guided is None:
            blind(trial, one, seed)
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        for number, data in enumerate(trial.target.seeds):
            (corpus / str(number)).write_bytes(data)
        guide(
            guided,
            trial,
            one,
            [f"-seed={seed}", f"-max_len={LONGEST}", "-rss_limit_mb=0", "-mutate_depth=2", str(corpus)],
        )


def guide(atheris: ModuleType | None, trial: Trial, one: Callable[[bytes], None], options: list[str]) -> None:
    """Mutations whose results reach new code are mutated further; does not return."""
    assert atheris is not None

    def mutated(data: bytes, longest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        base = rng.choice(trial.target.seeds) if rng.random() < 0.5 else data
        found = trial.target.mutate(base, rng) if rng.random() < 0.85 else bytes(atheris.Mutate(data, longest))
        return found if len(found) <= longest else bytes(atheris.Mutate(data, longest))

    atheris.Setup([sys.argv[0], *options], one, custom_mutator=mutated)
    atheris.Fuzz()


def blind(trial: Trial, one: Callable[[bytes], None], seed: int) -> None:
    """Up to four mutations of a seed at a time; does not return."""
    rng = random.Random(seed)
    for data in trial.target.seeds:
        one(data)
    while True:
        data = rng.choice(trial.target.seeds)
        for _ in range(rng.choice((1, 1, 2, 4))):
            data = trial.target.mutate(data, rng)
        one(data[:LONGEST])


def fuzz(name: str, options: Options) -> Mapping[str, object]:
    """The counts of one target, from a process of its own: coverage is instrumented before anything is imported."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, __file__, "--target", name, "--seed", str(options.seed), "--report", str(report)]
        command += ["--inputs", str(options.inputs)] if options.inputs else []
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if not report.is_file():
            tail = done.stderr[-2000:]
            crash = Finding(f"the process died with status {done.returncode}", tail, "")
            return {"inputs": 0, "accepted": 0, "refused": 0, "findings": [crash._asdict()], "edges": "-", "seconds": 0}
        counts: dict[str, object] = json.loads(report.read_text())
        edges = re.findall(r"cov: (\d+)", done.stderr)
        return {**counts, "edges": edges[-1] if edges else "-", "seconds": round(time.monotonic() - started)}


def main(options: Options) -> int:
    """Fuzz and print the table; the exit status."""
    unknown = [name for name in options.target if name not in NAMES]
    if unknown or (options.replay and len(options.target) != 1) or (options.inputs is not None and options.inputs < 1):
        what = f"unknown target {unknown[0]!r}" if unknown else "--replay needs one --target, and --inputs at least 1"
        print(f"error: {what}. Known: {', '.join(NAMES)}.", file=sys.stderr)
        return 2
    if options.report is not None:
        work(options.target[0], options.inputs, options.seed, options.report)
    if options.replay:
        with tempfile.TemporaryDirectory() as folder:
            found = prepared(options.target[0], None, Path(folder)).outcome(base64.b64decode(options.replay))
        print(found if isinstance(found, str) else f"{found.signature}: {found.message}")
        return int(isinstance(found, Finding))
    if not find_spec("atheris"):
        print(
            "atheris is not installed (`uv sync --group fuzz`): mutations are drawn without coverage.", file=sys.stderr
        )
    print("| target | inputs | accepted | refused | findings | edges | events watched | seconds |\n|---|" + "---|" * 7)
    wrong, total = 0, 0
    for name in options.target:
        row = fuzz(name, options)
        findings = [Finding(**finding) for finding in row["findings"]] if isinstance(row["findings"], list) else []
        cells = (row["inputs"], row["accepted"], row["refused"], len(findings), row["edges"], row.get("watched", 0))
        print(f"| {name} | {' | '.join(map(str, cells))} | {row['seconds']} |", flush=True)
        for finding in findings:
            print(f"  {finding.signature}: {finding.message}\n    fuzz.py --target {name} --replay {finding.input}")
        wrong, total = wrong + len(findings), total + int(str(row["inputs"]))
    print(f"{total} inputs, seed {options.seed}, {wrong} findings.")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="fuzz.py", description=__doc__)))
