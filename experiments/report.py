"""The report of a run: what was done, what came out, how to read it. Plain facts, also where the experts lost.

A summary maps names to JSON. Required, a number or null: `dense_loss`, `carved_loss`, `final_loss`,
`dense_continued_loss` (held out, nats per token), `pi`, `active_fraction`. Required, null or a mapping of domain names
to mappings of names to numbers: `per_domain`. Optional numbers: those of `OPTIONAL`. Optional text: `command`, the
command line that repeats the run. Whatever else a summary holds is listed near the end of the report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from experiments.page_blocks import Bullets, Details, Files, Literal, Picture, Piece, Table, Text, markdown
from onn import check
from onn.observe import Json, Record, decode, encode, number

LOSSES = (
    ("dense_loss", "dense, before the carve"),
    ("carved_loss", "carved into experts, not yet trained"),
    ("final_loss", "Hyper-SMoE, trained"),
    ("dense_continued_loss", "dense, trained on for as long"),
)
OPTIONAL = (
    ("gate_accuracy", "router names the least surprised expert, share"),
    ("gate_chance", "the same by chance, share"),
    ("dead_before_fallback", "dead experts before fallback"),
    ("dead_after_fallback", "dead experts after fallback"),
    ("expert_domain_information_nats", "information of expert and domain [nats]"),
)
DOMAIN_HEADINGS = (
    ("loss", "loss [nats]"),
    ("accuracy", "next-token accuracy"),
    ("active_per_token", "active experts per token"),
    ("gate_accuracy", "router accuracy"),
    ("gate_chance", "router chance"),
)
KEY_FACTS = (
    *("preset", "seed", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_experts"),
    *("expert_size", "min_k", "fallback_k", "combine", "squash", "batch_size", "sequence_length", "learning_rate"),
)
"""The values of a configuration, by the last part of their name, that are shown at first sight where there are any."""

FIGURES = (
    (
        "curves.png",
        "The run, step by step",
        "Lines are means of neighbouring steps; bands reach from the lowest to the highest step. All phases share "
        "one axis of steps, and the two models that go on after the carve start at the same place. The fair "
        "comparison is the close up: Hyper-SMoE against the dense model trained on. These are training losses; the "
        "held-out ones are in the table above. The router's accuracy means something only above its chance, and "
        "loss over tau is best near 1.",
    ),
    (
        "expert_by_domain.png",
        "Which experts each domain chooses",
        "One panel a layer, one row a domain, one column an expert. Orange: chosen more often than if all experts "
        "were chosen alike; purple: less often. A column of one colour is an expert that is busy (or idle) "
        "everywhere; a column that changes colour from row to row has specialised. The columns are sorted after the "
        "fact, which makes chance look like a pattern: trust the mutual information above each panel, and that only "
        "against its small positive bias.",
    ),
    (
        "surprise_map.png",
        "Mean surprise of each expert",
        "Surprise is the norm of the gradient that a token gives to an expert's own parameters. It is large in "
        "early layers whatever the experts have learnt, so compare experts within a row.",
    ),
    (
        "surprise_map_per_layer.png",
        "Surprise against the mean of the layer",
        "The same, divided by the mean of each layer. Orange experts are still surprised by what they are given; "
        "purple ones have learnt it, or get too small a weight to be surprised.",
    ),
)


def write_report(folder: Path, summary: Mapping[str, Json], records: Sequence[Record]) -> Path:
    """Write `report.md` into a run's folder and return its path; figures and files already there are linked.

    Raises:
        ValueError: the summary lacks a required key or holds something else than a number there; the message names it.
    """
    sections = [
        ("In short", headline(summary)),
        ("What was run", setting(folder, records)),
        ("Held-out loss", losses(summary)),
        ("Domains", domains(summary)),
        ("Health", health(summary, records)),
        ("Figures", _figures(folder)),
        ("What else was recorded", rest(summary, told=())),
        ("Files", files(folder)),
        ("Run it again", rerun(summary)),
    ]
    lines = [f"# Run `{folder.resolve().name}`", "", verdict(summary), ""]
    lines += [line for name, pieces in sections if pieces for line in (f"## {name}", "", *markdown(pieces), "")]
    path = folder / "report.md"
    path.write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")
    return path


def summary_table(summary: Mapping[str, Json]) -> str:
    """The headline numbers as aligned plain text, with the verdict under them."""
    rows = _rows(summary)
    width = max(len(name) for name, _ in rows)
    return "\n".join([*(f"{name:<{width}}  {value:>9}" for name, value in rows), "", verdict(summary)])


def verdict(summary: Mapping[str, Json]) -> str:
    """Say in a sentence or two who came out ahead, and by how much."""
    final, rival = _number(summary, "final_loss"), _number(summary, "dense_continued_loss")
    share = _number(summary, "active_fraction")
    if rival is None and summary.get("per_domain_dense_continued") is None:
        return "No verdict: no dense model was trained on beside it."
    if final is None or rival is None:
        return "No verdict: the Hyper-SMoE or the dense model trained on has no finite held-out loss."
    gap = final - rival
    used = "" if share is None else f", with {100 * share:.1f}% of its experts active on a token"
    if abs(gap) < 0.01:
        result = f"A draw: the Hyper-SMoE ends {gap:+.4f} nats from the dense model trained for as long{used}."
    elif gap < 0:
        result = f"The Hyper-SMoE ends {show(-gap)} nats better than the dense model trained for as long{used}."
    else:
        result = f"The Hyper-SMoE lost: it ends {show(gap)} nats worse than the dense model trained for as long{used}."
    return result + " One run with one seed says nothing about the spread between seeds."


def headline(summary: Mapping[str, Json]) -> list[Piece]:
    """The numbers that matter most."""
    return [Table(("quantity", "value"), _rows(summary))]


def _rows(summary: Mapping[str, Json]) -> list[tuple[str, str]]:
    models = [(f"loss [nats/token]: {name}", _number(summary, key)) for key, name in LOSSES]
    others = [("predictive integrity, PI", _number(summary, "pi"))]
    others += [("active share of the experts", _number(summary, "active_fraction"))]
    others += [(name, _number(summary, key)) for key, name in OPTIONAL if key in summary]
    return [(name, show(value)) for name, value in models + others]


def setting(folder: Path, records: Sequence[Record]) -> list[Piece]:
    """What was run, in short and in full."""
    rows = []
    for phase in phases(records):
        own = [record for record in records if record.get("phase") == phase]
        rows.append((f"`{phase}`", str(len(own)), show(_mean(own, "tokens_per_second"))))
    table: Piece = Text("No step was recorded.")
    if rows:
        table = Table(("phase", "steps recorded", "tokens per second, mean"), rows)
    config = folder / "config.json"
    if not config.exists():
        return [table, Text("There is no `config.json`.")]
    entries = list(flatten(decode(config.read_text(encoding="utf-8")), ""))
    facts = [f"{name} {' '.join(text.split())}" for name, text in entries if name.rpartition(".")[2] in KEY_FACTS]
    return [
        Text("Configuration: " + ("; ".join(facts) or "see below") + "."),
        table,
        Details("Every value of the configuration", listing(entries)),
    ]


def phases(records: Sequence[Record]) -> list[str]:
    """Names of the phases that have records, in order."""
    return list(dict.fromkeys(phase for record in records if isinstance(phase := record.get("phase"), str)))


def losses(summary: Mapping[str, Json]) -> list[Piece]:
    """The losses of all models, and what may be compared with what."""
    dense, carved, final, rival = values = [_number(summary, key) for key, _ in LOSSES]
    rows = [
        (name, show(value), show(_perplexity(value)), change(rival, value))
        for (_, name), value in zip(LOSSES, values, strict=True)
    ]
    return [
        Table(("model", "loss [nats per token]", "perplexity", "against dense, trained on"), rows),
        Text(
            f"The carve, before any training as experts, changed the loss by {change(dense, carved)} nats; training "
            f"the experts changed it by {change(carved, final)} nats. Against the dense model at the moment of the "
            f"carve that makes {change(dense, final)} nats, but the experts were trained for longer than that model: "
            "the comparison that counts is with the dense model trained on."
        ),
        Text("Lower is better; `-` means not measured or not finite."),
    ]


def domains(summary: Mapping[str, Json]) -> list[Piece]:
    """The held-out figures of every domain."""
    found = _mapping(summary, "per_domain", "summary")
    tables = {name: _mapping(found, name, "summary.per_domain") for name in found}
    keys = list(dict.fromkeys(key for table in tables.values() for key in table))
    if not keys:
        return [Text("Not measured by domain.")]
    known = dict(DOMAIN_HEADINGS)
    ordered = [key for key in known if key in keys] + [key for key in keys if key not in known]
    rows = [
        (name, *(show(_number(table, key, f"summary.per_domain.{name}") if key in table else None) for key in ordered))
        for name, table in tables.items()
    ]
    note = "Losses of different domains are not comparable: some texts are easier to predict than others."
    return [Table(("domain", *(known.get(key, key.replace("_", " ")) for key in ordered)), rows), Text(note)]


def health(summary: Mapping[str, Json], records: Sequence[Record]) -> list[Piece]:
    """How the experts were at the end, and how far each figure can be trusted."""
    own = [record for record in records if record.get("phase") == "moe"]
    tail = own[-max(1, len(own) // 10) :]
    names = ["tau", "error_over_tau", "surprise", "pi", "active_per_token", "target_active_per_token", "gate_accuracy"]
    names += ["gate_chance", "dead_experts"]
    means = {name: _mean(tail, name) for name in names}
    rows = [(f"`{name}`", show(value)) for name, value in means.items()]
    rows += [(f"`{name}`, sum over the phase", show(_total(own, name))) for name in ("skipped", "reborn")]
    notes = [
        f"**PI** ({show(number(summary, 'pi'))} at the end) measures calibration more than skill: a model that "
        "knows little and says so has a loss equal to tau, and scores the same as one that knows much, but for "
        "the surprise. It also collapses as tau goes to 0. Never compare two models by PI alone.",
        "**error / tau** is the loss over the entropy of the model's own predictions. 1 is calibrated; above 1 "
        "the model is surer than it is right, below 1 it is less sure than it could be.",
        "**surprise** is the mean gradient norm of the active pairs of token and expert. It falls when experts "
        "learn their tokens, but also when combine weights get smaller.",
    ]
    ratio, accuracy, chance = means["error_over_tau"], means["gate_accuracy"], means["gate_chance"]
    if ratio is not None and abs(ratio - 1) > 0.1:
        notes.append(f"Mind: the model is too {'sure' if ratio > 1 else 'unsure'} of itself.")
    if accuracy is not None and chance is not None and accuracy <= chance:
        notes.append("Mind: the router names the least surprised expert no more often than chance does.")
    if (means["dead_experts"] or 0) > 0:
        notes.append("Mind: some experts were chosen by no token of a step.")
    if (_total(own, "skipped") or 0) > 0:
        notes.append("Mind: some updates were skipped; `metrics.jsonl` says which.")
    return [Table(("phase `moe`", f"mean of the last {len(tail)} steps"), rows), Bullets(notes)]


def _figures(folder: Path) -> list[Piece]:
    shown = [Picture(*figure) for figure in FIGURES if (folder / figure[0]).exists()]
    return [*shown] or [Text("None was drawn.")]


def rest(summary: Mapping[str, Json], *, told: Sequence[str]) -> list[Piece]:
    """Whatever of a summary has no place elsewhere: `told` names what has, beside what every report tells."""
    known = {"pi", "active_fraction", "per_domain", "command", *told} | {key for key, _ in LOSSES + OPTIONAL}
    return listing(list(flatten({key: value for key, value in summary.items() if key not in known}, "")))


def files(folder: Path) -> list[Piece]:
    """Links to the files and folders of a run, but for the reports themselves."""
    rows = []
    for path in sorted(folder.iterdir()):
        if not path.name.startswith((".", "report.")):
            inner = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            size = sum(file.stat().st_size for file in inner)
            rows.append((path.name + "/" * path.is_dir(), f"{size:,}"))
    return [Files(rows)]


def rerun(summary: Mapping[str, Json]) -> list[Piece]:
    """The command that repeats a run."""
    command = summary.get("command")
    text = command if isinstance(command, str) else "uv run experiments/run.py"
    return [Text("From the root of the repository, with the values of `config.json`:"), Literal("", text)]


def _number(table: Mapping[str, Json], key: str, where: str = "summary") -> float | None:
    """A required number; None where it is null or not finite."""
    value = _required(table, key, where)
    wrong = isinstance(value, bool) or not isinstance(value, int | float | None)
    check.require(not wrong, f"{where}: expected a number or null at {key!r}, got {value!r}.")
    return number(table, key)


def _mapping(table: Mapping[str, Json], key: str, where: str) -> Mapping[str, Json]:
    """A required mapping; empty where it is null."""
    value = _required(table, key, where)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected a mapping or null at {key!r}, got {value!r}.")
    return value or {}


def _required(table: Mapping[str, Json], key: str, where: str) -> Json:
    known = ", ".join(table) or "nothing"
    check.require(key in table, f"{where}: missing key {key!r}{check.nearest(key, table)}. Present: {known}.")
    return table[key]


def _values(records: Sequence[Record], key: str) -> list[float]:
    return [value for record in records if (value := number(record, key)) is not None]


def _mean(records: Sequence[Record], key: str) -> float | None:
    values = _values(records, key)
    return sum(values) / len(values) if values else None


def _total(records: Sequence[Record], key: str) -> float | None:
    values = _values(records, key)
    return sum(values) if values else None


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None or loss > 700 else math.exp(loss)


def show(value: float | None) -> str:
    """A number as short as it may be; `-` where there is none."""
    if value is None:
        return "-"
    if value == int(value) and abs(value) < 1e9:
        return str(int(value))
    size = abs(value)
    return f"{value:.4f}" if 0.01 <= size < 1000 else f"{value:.0f}" if 1000 <= size < 1e9 else f"{value:.3g}"


def change(before: float | None, after: float | None) -> str:
    """A difference with its sign."""
    return "-" if before is None or after is None else f"{after - before:+.4f}"


def flatten(value: Json, name: str) -> Iterator[tuple[str, str]]:
    """Dotted names and texts of the leaves; a list without mappings is one leaf."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from flatten(child, f"{name}.{key}" if name else key)
    elif isinstance(value, str):
        yield name, value
    elif isinstance(value, Sequence) and any(isinstance(child, Mapping | str) for child in value):
        for position, child in enumerate(value):
            yield from flatten(child, f"{name}.{position}")
    else:
        yield name, encode(value, indent=None)


def listing(entries: Sequence[tuple[str, str]]) -> list[Piece]:
    """A table of the short texts, then the long ones each by itself."""
    long = [(name, text) for name, text in entries if "\n" in text or len(text) > 100]
    short = [(f"`{name}`", text) for name, text in entries if (name, text) not in long]
    table: list[Piece] = [Table(("name", "value"), short)] if short else []
    return table + [Literal(f"`{name}`", text) for name, text in long]
