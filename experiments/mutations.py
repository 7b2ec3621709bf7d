"""Does the suite notice mistakes? The likeliest (`mutants.py`, `mutants_above.py`) are planted one at a time.

`uv run experiments/mutations.py [--only NAME ...] [--jobs N]`: each mistake in a private copy of the repository, the
tests that are likeliest to notice first, then the rest, up to the first failure. Then every test that noticed runs in a
copy without a mistake, where all have to pass. Expected: every mistake is caught, in about 15 seconds each. Exit status
1 if one survives, or if a test fails without a mistake; 2 if a mistake cannot be planted.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import tyro

from experiments.mutants import FUNCTIONAL, Mutation
from experiments.mutants_above import ABOVE
from experiments.progress import progress
from onn import check

ROOT = Path(__file__).parents[1]
MUTATIONS: Mapping[str, Mutation] = MappingProxyType({**FUNCTIONAL, **ABOVE})
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "dist", "runs", "shared", "weights")
"""What a copy does not need. The mutation check is left out as well: a planted mistake can be planted no more."""
OWN_TESTS = "tests/test_mutations.py"
_FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Which mistakes, and how."""

    only: tuple[str, ...] = ()
    """Names of mistakes; all where none is given."""
    jobs: int = 1
    """Mistakes tried at the same time."""
    quick: bool = False
    """Run only the tests that are likeliest to notice."""


class Outcome(NamedTuple):
    """What became of one mistake."""

    caught_by: str
    """The test that failed first; empty where none did."""
    seconds: float
    output: str


def planted(text: str, mutation: Mutation) -> str:
    """The source with the mistake in it.

    Raises:
        ValueError: `old` does not occur exactly once.
    """
    found = text.count(mutation.old)
    check.require(
        found == 1, f"{mutation.file}: expected one {mutation.old!r}, found {found}; mend its entry in experiments/."
    )
    return text.replace(mutation.old, mutation.new)


def copied(place: Path) -> Path:
    """A copy of the repository below `place`."""
    return Path(shutil.copytree(ROOT, place / "copy", ignore=LEFT_OUT))


def order(mutation: Mutation, tests: Sequence[str], *, quick: bool) -> list[str]:
    """Test files, the likeliest to notice first."""
    first = [f"tests/test_{name}.py" for name in mutation.tests]
    return first if quick else [*first, *(test for test in tests if test not in first and test != OWN_TESTS)]


def run_tests(copy: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """pytest in a copy, up to the first failure. What it imports is the copy, or it does not begin.

    Raises:
        ValueError: another `onn` than that of the copy would be imported.
    """
    variables: Mapping[str, str] = {**os.environ, "PYTHONPATH": str(copy), "CI": "1", "PYTHONDONTWRITEBYTECODE": "1"}

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], cwd=copy, env=variables, capture_output=True, text=True, check=False
        )

    where = python("-c", "import experiments, onn; print(onn.__file__, experiments.__file__)").stdout.split()
    check.require(
        len(where) == 2 and all(Path(file).resolve().is_relative_to(copy.resolve()) for file in where),
        f"mutations: expected to import from {copy}, found {where}.",
    )
    return python("-m", "pytest", "--numprocesses=0", "-x", "--tb=short", "-rfE", "-p", "no:cacheprovider", *tests)


def tried(mutation: Mutation, *, quick: bool) -> Outcome:
    """Plant one mistake and see what notices it.

    Raises:
        ValueError: it cannot be planted, or pytest found no tests.
    """
    before = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutation-") as place:
        copy = copied(Path(place))
        source = copy / mutation.file
        source.write_text(planted(source.read_text(encoding="utf-8"), mutation), encoding="utf-8")
        tests = sorted(path.relative_to(copy).as_posix() for path in (copy / "tests").glob("test_*.py"))
        done = run_tests(copy, order(mutation, tests, quick=quick))
    check.require(done.returncode in (0, 1, 2), f"mutations: pytest did not run: {done.stdout}{done.stderr}")
    failed = _FAILED.search(done.stdout)
    caught_by = failed[1] if failed else ("collection" if done.returncode else "")
    return Outcome(caught_by=caught_by, seconds=time.monotonic() - before, output=done.stdout)


def innocent(tests: Sequence[str]) -> str:
    """What fails of the tests that noticed a mistake where there is none; empty is as it shall be."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as place:
        done = run_tests(copied(Path(place)), tests)
    return "" if done.returncode == 0 else done.stdout


def table(outcomes: Mapping[str, Outcome]) -> str:
    """One line for each mistake: what it is, what caught it, and how long that took."""
    lines = ["| mistake | caught by | seconds |", "|---|---|---|"]
    lines += [
        f"| {MUTATIONS[name].mistake} (`{name}`) | {found.caught_by or 'NOTHING'} | {found.seconds:.0f} |"
        for name, found in outcomes.items()
    ]
    caught = sum(bool(found.caught_by) for found in outcomes.values())
    return "\n".join([*lines, "", f"{caught} of {len(outcomes)} caught"])


def main(options: Options) -> int:
    """Try the mistakes, print the table; the exit status."""
    try:
        for name in options.only:
            check.one_of("mutations", "only", name, MUTATIONS)
        check.at_least("mutations", "jobs", options.jobs, 1)
        names = options.only or tuple(MUTATIONS)
        for mutation in map(MUTATIONS.__getitem__, names):
            planted((ROOT / mutation.file).read_text(encoding="utf-8"), mutation)
        with ThreadPoolExecutor(options.jobs) as pool, progress(names, desc="mistakes", unit="mistake") as bar:

            def one(name: str) -> Outcome:
                outcome = tried(MUTATIONS[name], quick=options.quick)
                bar.update()
                return outcome

            outcomes = dict(zip(names, pool.map(one, names), strict=True))
        print(table(outcomes))
        noticed = sorted({found.caught_by for found in outcomes.values() if "::" in found.caught_by})
        broken = innocent(noticed) if noticed else ""
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if broken:
        print(f"without any mistake:\n{broken}")
    return 1 if broken or not all(found.caught_by for found in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="mutations.py", description=__doc__)))
