"""The mutation check: every mistake can still be planted, and the runner tells a mistake that is caught from one that
is not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from experiments import mutations
from experiments.mutants import Mutation
from experiments.mutations import MUTATIONS, Options, Outcome
from tests.support import needs_native

ROOT = Path(__file__).parents[1]
MISTAKE = Mutation("a mistake", "onn/module.py", "return 1", "return 2", ("one",))


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mistake_can_be_planted_and_changes_a_file_that_still_compiles(name: str) -> None:
    mutation = MUTATIONS[name]
    source = (ROOT / mutation.file).read_text(encoding="utf-8")
    changed = mutations.planted(source, mutation)
    assert changed != source
    if mutation.file.endswith(".py"):
        compile(changed, mutation.file, "exec")
    assert mutation.tests
    assert all((ROOT / "tests" / f"test_{test}.py").is_file() for test in mutation.tests)


@needs_native
@pytest.mark.parametrize(
    "name", [name for name, mutation in MUTATIONS.items() if mutation.file.endswith((".cpp", ".h"))]
)
def test_native_code_with_a_mistake_still_compiles(name: str) -> None:
    file = ROOT / MUTATIONS[name].file
    changed = mutations.planted(file.read_text(encoding="utf-8"), MUTATIONS[name])
    compiler = os.environ.get("CXX") or shutil.which("g++") or "clang++"
    options = ("-std=c++20", "-march=native", "-fsyntax-only", "-DONN_NUMBER=float", f"-I{file.parent}", "-xc++", "-")
    subprocess.run([compiler, *options], input=changed, text=True, check=True)


def test_there_are_at_least_the_twenty_likeliest_and_no_two_are_the_same() -> None:
    assert len({(mutation.file, mutation.old, mutation.new) for mutation in MUTATIONS.values()}) == len(MUTATIONS) >= 20
    assert len({mutation.mistake for mutation in MUTATIONS.values()}) == len(MUTATIONS)


@pytest.mark.parametrize("source", ["return 3", "return 1\nreturn 1"])
def test_a_mistake_that_does_not_apply_exactly_once_is_an_error(source: str) -> None:
    with pytest.raises(ValueError, match=r"onn/module\.py: expected one 'return 1', found [02]; mend"):
        mutations.planted(source, MISTAKE)


def test_the_likeliest_tests_run_first_then_all_others_but_those_of_the_mutations() -> None:
    tests = ["tests/test_all.py", "tests/test_mutations.py", "tests/test_one.py"]
    assert mutations.order(MISTAKE, tests, quick=False) == ["tests/test_one.py", "tests/test_all.py"]
    assert mutations.order(MISTAKE, tests, quick=True) == ["tests/test_one.py"]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one module and one test, in the place of this one."""
    root = tmp_path / "origin"
    for folder in ("onn", "experiments", "tests", "weights", ".git", "tests/__pycache__"):
        (root / folder).mkdir(parents=True)
    for package in ("onn", "experiments", "tests"):
        (root / package / "__init__.py").touch()
    (root / "onn" / "module.py").write_text("def f(): return 1\n", encoding="utf-8")
    test = "from onn.module import f\n\ndef test_that_it_is_one(): assert f() == 1\n"
    (root / "tests" / "test_one.py").write_text(test, encoding="utf-8")
    monkeypatch.setattr(mutations, "ROOT", root)
    return root


def test_a_copy_holds_the_sources_and_nothing_that_is_made_from_them(repository: Path, tmp_path: Path) -> None:
    copy = mutations.copied(tmp_path)
    found = {path.relative_to(copy).as_posix() for path in copy.rglob("*")}
    assert {"onn/module.py", "tests/test_one.py"} <= found
    assert not any(part in path.split("/") for path in found for part in ("weights", ".git", "__pycache__"))


def test_a_mistake_is_caught_by_the_first_test_that_fails_in_a_copy_and_the_original_stays(repository: Path) -> None:
    outcome = mutations.tried(MISTAKE, quick=False)
    assert outcome.caught_by == "tests/test_one.py::test_that_it_is_one"
    assert (repository / "onn" / "module.py").read_text(encoding="utf-8") == "def f(): return 1\n"
    assert mutations.tried(MISTAKE._replace(new="return 1.0"), quick=True).caught_by == ""


def test_a_mistake_that_breaks_the_import_is_caught_as_such_and_innocent_tests_pass(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def answered(copy: Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
        given.append((copy / "onn" / "module.py").read_text(encoding="utf-8"))
        failed = "return 2" in given[-1]
        return subprocess.CompletedProcess([], 2 if failed else 0, "ERROR tests/test_one.py\n" if failed else "", "")

    monkeypatch.setattr(mutations, "run_tests", answered)
    assert mutations.tried(MISTAKE, quick=True).caught_by == "tests/test_one.py"
    assert mutations.innocent(["tests/test_one.py"]) == ""
    assert given == ["def f(): return 2\n", "def f(): return 1\n"]


def test_nothing_runs_where_another_package_would_be_imported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected to import from"):
        mutations.run_tests(tmp_path, ["tests"])


def test_the_table_names_every_mistake_and_counts_those_that_are_caught() -> None:
    first, second, *_ = MUTATIONS
    text = mutations.table({first: Outcome("tests/test_a.py::test_b", 3.2, ""), second: Outcome("", 60.0, "")})
    assert f"| {MUTATIONS[first].mistake} (`{first}`) | tests/test_a.py::test_b | 3 |" in text
    assert f"(`{second}`) | NOTHING | 60 |" in text
    assert text.endswith("1 of 2 caught")


@pytest.mark.parametrize(
    ("caught_by", "failing", "status"),
    [("tests/test_a.py::test_b", "", 0), ("", "", 1), ("tests/test_a.py::test_b", "it fails", 1)],
)
def test_the_exit_status_says_whether_one_survived_or_a_test_fails_by_itself(
    caught_by: str, failing: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mutations, "tried", lambda mutation, quick: Outcome(caught_by, 1.0, ""))
    monkeypatch.setattr(mutations, "innocent", lambda tests: failing)
    assert mutations.main(Options(only=("smk_max",), jobs=2)) == status
    assert "max for min" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(only=("smk_mx",)), "unknown only='smk_mx'; did you mean 'smk_max'?"),
        (Options(jobs=0), "expected jobs=0 >= 1"),
    ],
)
def test_options_that_mean_nothing_are_refused_by_name(
    options: Options, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mutations.main(options) == 2
    assert message in capsys.readouterr().err
