"""The report of the forgetting study, of whole and of sparse results."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import pytest

from experiments.page_blocks import Bullets, Details, Table, Text
from experiments.study import contrasts, figures, report
from experiments.study.contrasts import Verdict, findings
from experiments.study.groups import Setup, baseline, chosen, difference, grouped, interval, on_edge
from experiments.study.records import Run
from experiments.study.report import pieces, write_report
from experiments.study.setting import REGIMES
from experiments.study.shown import NO_BREAK, among, p_text, plus_minus, signed
from experiments.study.statistics import Interval, scores
from experiments.study.store import Results
from onn.settings import Regime
from tests.study_runs import full_study, key, run, specialisation

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> $x^2$ **b** `c` &amp; |"


class Page(HTMLParser):
    """What a page would run, load or leave unsaid, and its words."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.scripts = self.pictures = self.unlabelled = 0
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.markup = path.read_text(encoding="utf-8")
        self.feed(self.markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.scripts += tag == "script"
        self.pictures += tag == "svg"
        self.unlabelled += tag == "svg" and not given.get("aria-label")
        self.ids += [value] if (value := given.get("id")) else []
        if tag in ("img", "script", "link", "iframe", "object", "embed", "source", "image"):
            self.loads += [value for name in ("src", "href", "data", "xlink:href") if (value := given.get(name))]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def results(runs: Sequence[Run], *, specialised: bool = True) -> Results:
    found = [specialisation(key(0, arm=arm)) for arm in ("all", "smk-2")] if specialised else []
    return Results({"threads": 1}, {"digits": {"steps": 400}, "arms": {"all": {"learners": 3}}}, runs, found)


@pytest.fixture(scope="module", autouse=True)
def _few_draws() -> Iterator[None]:
    """Of the bootstrap, whose figures are tested by themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrasts, "DRAWS", 20)
        yield


@pytest.fixture(scope="module")
def full() -> Results:
    return results(full_study())


Parts = Mapping[str, Sequence[object]]


@pytest.fixture(scope="module")
def parts(full: Results) -> Parts:
    return pieces(full)


@pytest.fixture(scope="module")
def folder(full: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study")
    assert write_report(path, full) == path / "report.html"
    return path


def tables(parts: Parts, heading: str) -> list[Table]:
    return [part for part in parts[heading] if isinstance(part, Table)]


def texts(parts: Parts) -> str:
    return "\n".join(part.text for found in parts.values() for part in found if isinstance(part, Text))


def test_a_full_study_tells_every_part_and_needs_no_other_file(folder: Path) -> None:
    page = Page(folder / "report.html")
    assert all(address.startswith(("data:", "#")) for address in page.loads)
    assert not re.search(r"url\((?!['\"]?(data:|#))", page.markup)
    assert page.pictures == 8
    assert page.unlabelled == 0
    assert len(page.ids) == len(set(page.ids))
    words = " ".join(page.words)
    for part in (
        "verdicts",
        "What was run",
        "Results: digits, experts",
        "Who serves which task",
        "Explorations",
        "limits",
    ):
        assert part in words


def test_the_markdown_links_pictures_that_are_there_and_holds_the_same_tables(folder: Path, parts: Parts) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    linked = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(linked) == 8
    assert {*linked, "report.md", "report.html"} == {path.name for path in folder.iterdir()}
    for row in tables(parts, "Results: digits, experts")[0].rows:
        assert f"| {row[0]} | {row[1]} |" in text


def test_the_same_results_give_the_same_files(folder: Path, full: Results, tmp_path: Path) -> None:
    write_report(tmp_path, full)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_every_verdict_stands_in_the_table_and_what_was_not_run_is_told(full: Results, parts: Parts) -> None:
    found, not_run = findings(full.runs)
    assert found
    assert not_run
    table, _ = tables(parts, "The question, and the verdicts")
    assert [row[0] for row in table.rows] == [one.claim for one in found]
    assert [row[2] for row in table.rows] == [report.VERDICTS[one.verdict] for one in found]
    assert [row[-1] for row in table.rows] == [one.falsifier for one in found]
    bullets = [part for part in parts["What was run"] if isinstance(part, Bullets)]
    assert [list(part.items) for part in bullets] == [not_run]


def test_every_verdict_has_its_words() -> None:
    assert set(report.VERDICTS) == set(get_args(Verdict))


def test_the_report_says_which_regime_its_verdicts_hold_for() -> None:
    arms = ("smk-2", "frozen-experts", "output-2")
    runs = [run(key(seed, arm=arm, regime="everything")) for seed in range(3) for arm in arms]
    some = pieces(results(runs, specialised=False))
    both = texts(pieces(results([*runs, *(run(key(seed, arm=arm)) for seed in range(3) for arm in arms[:2])])))
    told = dict(re.findall(r"^Of (\d) claims in regime `(\w+)`: .*They hold for this regime alone\.$", both, re.M))
    assert told == {"3": "everything", "2": "experts"}
    verdicts, within = tables(some, "The question, and the verdicts")
    assert {row[1] for row in verdicts.rows} == {"digits, everything, sgd", "digits, everything, all runs"}
    assert within.rows[0][0] == "digits, everything"
    assert "Results: digits, everything" in some
    assert REGIMES["everything"] in texts(some)
    assert REGIMES["experts"] not in texts(some)


def test_every_regime_is_explained() -> None:
    assert set(REGIMES) == set(get_args(Regime))


def test_the_bank_is_told_and_an_arm_that_selects_nothing_of_it_is_warned_of() -> None:
    arms = ("all", "smk-1", "smk-2", "smk-2-surprise-route", "random-2", "smk-4", "root-neuron, with smk-2")
    runs = [run(key(seed, arm=arm)) for seed in range(2) for arm in arms]
    idle = {10: ["smk-2", "random-2", "smk-4", "root-neuron, with smk-2"], 11: ["smk-4"], 18: ["smk-4"], 19: []}
    for experts, names in idle.items():
        some = texts(pieces(Results({}, {"experts": experts, "width": 4}, runs, [])))
        active = round(experts / 4)
        assert f"Experts of the bank: {experts}; neurons of each: 4;" in some
        assert f"says otherwise: {active}." in some
        warned = re.findall(r"nothing is left out\*\* by (.*?): a token", some)
        assert sorted(name for found in warned for name in found.split("; ")) == sorted(names)
    for settings in ({}, {"experts": "32", "width": None}):
        some = texts(pieces(Results({}, settings, runs, [])))
        assert "Experts of the bank" not in some
        assert "nothing is left out" not in some


def test_the_table_is_sorted_by_accuracy_and_holds_the_means_of_the_seeds(full: Results, parts: Parts) -> None:
    (table,) = tables(parts, "Results: digits, experts")
    column = list(table.header).index("ACC")
    means = [float(row[column].split(NO_BREAK)[0]) for row in table.rows]
    assert means == sorted(means, reverse=True)
    own = [r for r in full.runs if r.key[2:4] == ("replay", "adamw") and r.stage == "evaluation"]
    expected = sum(scores(r.scores).accuracy for r in own) / len(own)
    (got,) = [row[column] for row in table.rows if row[0] == "replay, adamw"]
    assert got.startswith(f"{expected:.3f}")


def test_differences_are_paired_by_seed_whatever_the_order_and_over_common_seeds_alone() -> None:
    ours = [run(key(seed, arm="replay")) for seed in (2, 0, 1, 7)]
    theirs = [run(key(seed)) for seed in (0, 1, 2, 9)]
    first, second = (grouped(runs)[0] for runs in (ours, theirs))
    by_seed = [{r.key.seed: scores(r.scores).accuracy for r in runs} for runs in (ours, theirs)]
    apart = [by_seed[0][seed] - by_seed[1][seed] for seed in (0, 1, 2)]
    assert difference(first, second) == interval(apart)
    assert difference(first, second).n == 3


def test_a_rate_on_the_edge_of_its_grid_is_warned_of_and_one_within_is_not() -> None:
    tuning = [run(key(100, arm=arm, lr=lr), stage="tuning") for arm in ("all", "smk-2") for lr in (0.01, 0.1, 1.0)]
    evaluated = [run(key(seed, lr=1.0)) for seed in range(2)] + [run(key(seed, arm="smk-2")) for seed in range(2)]
    some = pieces(results([*tuning, *evaluated]))
    warning = next(line for line in texts(some).split("\n") if "edge of its grid" in line)
    assert "all, sgd (rate 1)" in warning
    assert "smk-2" not in warning
    rates = {row[0]: row[1] for row in tables(some, "Results: digits, experts")[0].rows}
    assert rates == {"all, sgd": "1, edge", "smk-2, sgd": "0.1"}


@pytest.mark.parametrize(("grid", "is_warned"), [((0.1, 1.0, 10.0), False), ((1.0, 10.0, 100.0), True)])
def test_a_strength_is_warned_of_on_the_edge_of_its_grid_alone(grid: Sequence[float], is_warned: bool) -> None:
    points = [(lr, strength) for lr in (0.01, 0.1, 1.0) for strength in grid]
    tuning = [run(key(100, arm="ewc", lr=lr)._replace(strength=strength), stage="tuning") for lr, strength in points]
    some = texts(pieces(results([*tuning, *(run(key(seed, arm="ewc")) for seed in range(2))])))
    assert ("edge of its grid" in some) == ("ewc, sgd (strength 1)" in some) == is_warned


@pytest.mark.parametrize(
    ("value", "tried", "edge"),
    [
        (1.0, [1.0], False),
        (1.0, [], False),
        (1.0, [1.0, 2.0], True),
        (2.0, [1.0, 2.0, 3.0], False),
        (9.0, [1.0, 2.0], False),
    ],
)
def test_an_edge_needs_a_grid(value: float, tried: list[float], edge: bool) -> None:
    assert on_edge(value, tried) is edge


def lost(one: Run) -> Run:
    nothing = tuple(tuple(math.nan for _ in row) for row in one.scores)
    return one._replace(scores=nothing, losses=nothing, change=math.inf, series={"loss": (math.nan,) * 20})


def test_seeds_without_a_finite_score_are_told_and_never_lead_the_table() -> None:
    best = [run(key(seed, arm="replay")) for seed in range(3)]
    some = pieces(results([*best[:2], lost(best[2]), *(run(key(seed)) for seed in range(3))]))
    (table,) = tables(some, "Results: digits, experts")
    assert [row[0] for row in table.rows] == ["all, sgd", "replay, sgd"]
    assert table.rows[1][list(table.header).index("seeds")] == "2 of 3"
    assert "replay, sgd (1 of 3)" in texts(some)


SPARSE: dict[str, list[Run]] = {
    "nothing": [],
    "one run": [run(key())],
    "tuning alone": [run(key(lr=lr), stage="tuning") for lr in (0.1, 1.0)],
    "frontier alone": [run(key(lr=lr), stage="frontier") for lr in (0.1, 1.0)],
    "one point of a frontier": [run(key(), stage="frontier")],
    "exploration alone": [run(key(), stage="exploration")],
    "no baseline": [run(key(seed, arm="smk-2")) for seed in range(2)],
    "unpaired seeds": [*(run(key(seed)) for seed in (0, 1)), *(run(key(seed, arm="root-neuron")) for seed in (1, 2))],
    "one task": [run(key(seed), tasks=1) for seed in range(2)],
    "other numbers of tasks": [run(key(0), tasks=2), run(key(0, family="text"), tasks=5)],
    "no series": [run(key(seed))._replace(series={}) for seed in range(2)],
    "series of other lengths": [run(key(seed), stretches=2 + seed) for seed in range(2)],
    "nothing finite": [lost(run(key(seed))) for seed in range(2)],
    "some not finite": [run(key(0)), lost(run(key(1))), lost(run(key(0, arm="smk-2")))],
    "a frontier that is not finite": [lost(run(key(lr=lr)))._replace(stage="frontier") for lr in (0.1, 1.0)],
    "an arm and optimizer of another study": [run(key(arm="x", optimizer="y"))],
}


@pytest.mark.parametrize("what", SPARSE)
def test_sparse_results_have_a_report_too(what: str, tmp_path: Path) -> None:
    write_report(tmp_path, results(SPARSE[what], specialised=False))
    page = Page(tmp_path / "report.html")
    assert page.unlabelled == 0
    words = " ".join(page.words)
    assert not re.search(r"\bnan\b|\binf\b", words)
    assert "limits" in words


def test_seeds_that_do_not_pair_are_said_to_forbid_the_verdicts() -> None:
    some = pieces(results(SPARSE["unpaired seeds"]))
    assert "No claim was tested" in texts(some)
    assert "same seeds" in texts(some)


def test_unusual_specialisations_are_drawn(tmp_path: Path) -> None:
    plain = specialisation(key())
    bare = plain._replace(permuted=(), saturation=(), ablation=tuple((math.nan,) * 4 for _ in range(16)))
    idle = plain._replace(key=key(arm="smk-2"), usage=((0,) * 16,) * 4, information=0.0, ablation=((0.0,) * 4,) * 16)
    for found in ([bare], [idle], [plain, bare._replace(key=key(1)), idle]):
        write_report(tmp_path, Results({}, {}, [], found))
        assert Page(tmp_path / "report.html").pictures >= 2


def test_the_p_of_information_counts_itself_among_the_permutations() -> None:
    one = specialisation(key())._replace(information=0.5, permuted=(0.1, 0.5, 0.6))
    table, *_ = tables(pieces(Results({}, {}, [], [one])), "Who serves which task: digits, experts")
    assert table.rows[0][list(table.header).index("p")] == "0.750"


def test_names_never_become_markup(tmp_path: Path) -> None:
    odd = [run(key(seed, arm=EVIL, optimizer=EVIL, family=EVIL)) for seed in range(2)]
    more = [one._replace(stage="frontier") for one in odd]
    found = specialisation(odd[0].key)
    write_report(tmp_path, Results({EVIL: EVIL}, {EVIL: [EVIL]}, [*odd, *more], [found]))
    page = Page(tmp_path / "report.html")
    assert page.scripts == 1
    assert "<img src=x" not in page.markup
    assert page.pictures == 8
    assert any("$x^2$" in word for word in page.words)


def test_control_characters_and_surrogates_do_not_stop_the_page(tmp_path: Path) -> None:
    write_report(tmp_path, Results({"a": "\x00"}, {"b\ud800": "\ud800"}, [run(key(arm="a\x00\ud800"))], []))
    assert "\x00" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_figures_show_the_baseline_and_smk_before_all_and_never_the_joint_bound() -> None:
    runs = [
        run(key(seed, arm=arm))
        for arm in ("joint", "replay", "random-2", "random-4", "smk-2", "all")
        for seed in (0, 1)
    ]
    groups = grouped(runs)
    shown = [group.setup.arm for group in chosen(groups, 4)]
    assert shown[:2] == ["all", "smk-2"]
    assert "joint" not in shown
    assert len({arm.split("-")[0] for arm in shown}) == len(shown)
    assert [g.setup.arm for g in chosen(groups, 1)] == ["all"]


def test_the_baseline_is_of_the_optimizer_or_the_best_of_any() -> None:
    runs = [run(key(seed, optimizer=name, lr=lr)) for seed in (0, 1) for name, lr in (("sgd", 10.0), ("adamw", 0.1))]
    groups = grouped(runs)
    best, own, none = baseline(groups, ""), baseline(groups, "sgd"), baseline(groups, "adagrad")
    assert best is not None
    assert own is not None
    assert (best.setup.optimizer, own.setup.optimizer, none) == ("adamw", "sgd", None)


def test_a_run_that_comes_twice_counts_once() -> None:
    (group,) = grouped([run(key(0)), run(key(1)), run(key(0))])
    assert group.accuracy.n == 2


def test_numbers_are_written_as_far_as_they_are_known() -> None:
    gap = NO_BREAK
    assert plus_minus(Interval(0.5, 0.4, 0.6, 3)) == f"0.500{gap}±{gap}0.100"
    assert plus_minus(Interval(0.5, math.nan, math.nan, 1)) == "0.500"
    assert plus_minus(Interval(math.nan, math.nan, math.nan, 0)) == "-"
    assert signed(Interval(0.5, -0.25, 1.25, 3)) == f"+0.500 [-0.250,{gap}+1.250]"
    assert signed(Interval(-0.5, math.nan, math.nan, 1)) == "-0.500"
    assert (p_text(math.nan), p_text(0.0004), p_text(0.04)) == ("-", f"<{gap}0.001", "0.040")


def test_an_arm_that_is_its_own_optimizer_needs_no_second_name() -> None:
    assert Setup("f", "r", "root-neuron", "own", 0.1, 0.0).name == "root-neuron"
    assert figures.name(specialisation(key(arm="smk-2"))) == "smk-2, sgd"


def test_details_hold_every_setting_but_the_arms_and_every_fact(parts: Parts) -> None:
    opened = [part for part in parts["What was run"] if isinstance(part, Details)]
    told = [row for part in opened for piece in part.pieces if isinstance(piece, Table) for row in piece.rows]
    assert ("`digits.steps`", "400") in told
    assert ("`threads`", "1") in told
    assert not any("learners" in row[0] for row in told)


def test_vocabularies_stand_beside_chance_and_the_expert_farthest_from_its_own_is_named() -> None:
    plain = specialisation(key())
    (read, following) = plain.vocabulary
    nothing = following._replace(experts=(math.nan,) * 16, chance=(math.nan,) * 16, mean=math.nan, permuted=())
    other = specialisation(key(1))._replace(vocabulary=(nothing._replace(symbols="class"),))
    old = specialisation(key(2))._replace(vocabulary=())
    found = [plain._replace(vocabulary=(read._replace(mean=0.275), following)), other, old]
    _, table = tables(pieces(Results({}, {}, [], found)), "Who serves which task: digits, experts")
    assert list(table.header[2::4]) == [f"vocabulary, by {kind}" for kind in ("input", "target", "class")]
    reached = 1 + sum(value >= 0.275 for value in read.permuted)
    chance = read.chance[5]
    farthest = f"{chance + 0.4:.3f} ({chance:.3f})"
    assert list(table.rows[0][:6]) == ["all, sgd", "0", "0.275", "0.275", f"{reached / 51:.3f}", farthest]
    assert list(table.rows[0][6:10]) == [f"{following.mean:.3f}", "0.275", "0.020", farthest]
    assert list(table.rows[1][2:]) == ["-"] * 12
    assert list(table.rows[2][2:]) == ["-"] * 12
    (alone,) = tables(pieces(Results({}, {}, [], [old])), "Who serves which task: digits, experts")
    assert "vocabulary" not in " ".join(alone.header)


def test_the_correlation_of_pi_within_arms_stands_beside_the_pooled_one(full: Results, parts: Parts) -> None:
    _, table = tables(parts, "The question, and the verdicts")
    (pooled,) = [one.interval for one in findings(full.runs)[0] if one.claim == contrasts.PREDICTION.claim]
    within = contrasts.within_arms(full.runs, ("digits", "experts"))
    assert table.rows == [("digits, experts", signed(pooled), signed(within))]
    assert pooled != within


def test_a_value_counts_itself_among_the_permutations_that_reach_it() -> None:
    assert among(0.5, (0.1, 0.5, 0.6)) == ("0.400", "0.750")
    assert among(0.5, (0.1, 0.2)) == ("0.150", "0.333")
    assert among(0.5, ()) == ("-", "-")
