"""Wrong shapes, dtypes, devices and numbers, to every public function of `onn.optim`, `onn.data`, `onn.tiling` and
`onn.calibration`, and to every class of `onn.settings`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from functools import partial
from itertools import starmap
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

import pytest
import torch
from torch import Tensor

import onn.functional as F
from onn import calibration, data, optim, rounding, settings, tiling
from onn.corpus import Corpus
from onn.data import Batch, Pool
from tests.bad_arguments import Spec, Tensors
from tests.bad_calls import Refusal, assert_all_handled, assert_all_tried, refused
from tests.bad_optim import OPTIM
from tests.test_train import SETTINGS, SPARSE


def pool_of(t: Tensors) -> Pool:
    return Pool(t["tokens"], t["mask"], t["starts"], t["bounds"], 3)


TEXT = {"tokens": "integer N", "mask": "bool N"}
COUNTED = torch.ones(7, dtype=torch.bool)
DATA: dict[str, Spec] = {
    "evaluation_batches": Spec(
        lambda t, n: data.evaluation_batches(
            t["tokens"], t["mask"], batch=int(n["batch"]), length=int(n["length"]), limit=int(n["limit"])
        )[0].tokens[:1],
        TEXT,
        ("1 length",),
        {"batch": 1, "length": 3, "limit": 2},
        {"mask": COUNTED},
    ),
    "pool": Spec(
        lambda t, n: data.pool([t["tokens"]], [t["masks"]], length=int(n["length"]))[:2],
        {"tokens": "integer N", "masks": "bool N"},
        ("N", "N"),
        {"length": 3},
        {"masks": COUNTED},
    ),
    "sample_batch": Spec(
        lambda t, n: data.sample_batch(pool_of(t), t["choice"]),
        {**TEXT, "starts": "integer 3", "bounds": "integer 2", "choice": "float C 2"},
        ("C 3", "C 3", "C 3", "C"),
        values={
            "starts": torch.tensor([0, 1, 2]),
            "bounds": torch.tensor([0, 3]),
            "choice": torch.tensor([[0.1, 0.2], [0.9, 1.0]]),
        },
        free=("starts", "bounds"),
    ),
    "windows": Spec(
        lambda t, n: data.windows(t["tokens"], t["mask"], t["starts"], length=int(n["length"])),
        {**TEXT, "starts": "integer C"},
        ("C length", "C length", "C length", "C"),
        {"length": 3},
        {"starts": torch.tensor([0, 2])},
    ),
}
SPECS = {**OPTIM, **DATA}


@pytest.mark.parametrize("name", SPECS)
def test_one_wrong_argument_is_refused_by_name_or_makes_no_difference_to_the_shapes(name: str) -> None:
    assert_all_handled(SPECS[name])


TOKENS = torch.arange(7)
POOL = Pool(TOKENS, COUNTED, torch.tensor([0, 1, 2, 3]), torch.tensor([0, 2, 4]), 3)
"""Two domains of two windows each."""
POOL_ON_META = Pool(TOKENS.to("meta"), COUNTED.to("meta"), POOL.starts.to("meta"), POOL.bounds.to("meta"), length=3)
CHOICE = torch.tensor([[0.1, 0.2], [0.9, 0.9]])


def sampled(pool: Pool) -> object:
    return data.sample_batch(pool, CHOICE)


def corpus(*sides: Tensor) -> Corpus:
    masks = tuple(torch.ones(len(side), dtype=torch.bool) for side in sides)
    return Corpus(("d",), sides[:1], sides[1:], masks[:1], masks[1:], "")


def batch_of(**parts: Tensor) -> Batch:
    text = TOKENS[None]
    return Batch(text, text, COUNTED[None], torch.zeros(1, dtype=torch.int64))._replace(**parts)


def measured(*, tokens: int, dtype: torch.dtype) -> object:
    return calibration.calibrate(num_experts=4, width=2, hidden=8, tokens=tokens, dtype=dtype, repeats=1)


REFUSALS: dict[str, Refusal] = {
    **{
        f"sample_batch, bounds {wrong}": Refusal(
            partial(sampled, POOL._replace(bounds=torch.tensor(wrong))),
            ("sample_batch", "pool.bounds", "from 0 to 4", str(wrong)),
        )
        for wrong in ([0, 2, 5], [0, 2, 3], [1, 2, 4], [0, 4, 2], [0, 0, 4], [0, 5, 4], [-1, 2, 4])
    },
    "sample_batch, starts beyond the text": Refusal(
        partial(sampled, POOL._replace(starts=torch.tensor([0, 1, 2, 4]))), ("starts [4]", "length=3", "7 tokens")
    ),
    "sample_batch, starts before it": Refusal(
        partial(sampled, POOL._replace(starts=torch.tensor([-1, -1, 2, 3]))), ("starts [-1]",)
    ),
    "sample_batch, no start": Refusal(
        partial(sampled, POOL._replace(starts=torch.tensor([], dtype=torch.int64))), ("starts [0]",)
    ),
    "sample_batch, no domain": Refusal(partial(sampled, POOL._replace(bounds=torch.tensor([0]))), ("bounds [1]",)),
    "sample_batch, no text": Refusal(
        partial(sampled, POOL._replace(tokens=TOKENS[:0], mask=COUNTED[:0])), ("tokens [0]", "no window")
    ),
    "sample_batch, a long window": Refusal(partial(sampled, POOL._replace(length=7)), ("length=7", "no window")),
    "sample_batch, no window": Refusal(partial(sampled, POOL._replace(length=0)), ("length=0", "no window")),
    "sample_batch, on meta": Refusal(
        lambda: data.sample_batch(POOL_ON_META, CHOICE.to("meta")),
        ("sample_batch", "values", "meta"),
    ),
    "pool": Refusal(lambda: data.pool([TOKENS], [], length=3), ("1 token sequences and 0 masks",)),
    "pool, too long": Refusal(
        lambda: data.pool([torch.zeros(1).long().expand(2**31)], [COUNTED], length=3), ("at most", str(2**31))
    ),
    "check_vocabulary": Refusal(
        lambda: data.check_vocabulary(corpus(TOKENS, TOKENS), vocab_size=6), ("from 0 to 6", "vocab_size=6")
    ),
    "check_vocabulary, numbers": Refusal(
        lambda: data.check_vocabulary(corpus(TOKENS, TOKENS / 2), vocab_size=8), ("tokens of d", "torch.float32")
    ),
    "check_vocabulary, on meta": Refusal(
        lambda: data.check_vocabulary(corpus(TOKENS.to("meta"), TOKENS), vocab_size=8), ("tokens of d", "meta")
    ),
    "check_vocabulary, one side": Refusal(
        lambda: data.check_vocabulary(corpus(TOKENS), vocab_size=8), ("check_vocabulary", "'held_out': 0")
    ),
    "check_batch": Refusal(lambda: data.check_batch(batch_of(), vocab_size=6), ("tokens from 0 to 6",)),
    "check_batch, on meta": Refusal(
        lambda: data.check_batch(Batch(*(part.to("meta") for part in batch_of())), vocab_size=8), ("no values",)
    ),
    "check_batch, domains": Refusal(
        lambda: data.check_batch(batch_of(domain=torch.zeros(2)), vocab_size=8), ("domain [2]",)
    ),
    **{
        f"tiling_name, {wrong}": Refusal(partial(tiling.tiling_name, wrong), ("tiling_name", "Tiling("))
        for wrong in starmap(F.Tiling, ((-2, 0.5), (-1, -0.5), (1, -0.5), (1, math.inf), (1, math.nan)))
    },
    "backend_of": Refusal(lambda: tiling.backend_of("grouped_mm"), ("backend='grouped_mm'", "did you mean 'grouped'")),
    "backend_of, a tiling itself": Refusal(
        lambda: tiling.backend_of(cast("str", F.Tiling(1, 0.5))), ("backend=Tiling(", "text")
    ),
    "calibrate": Refusal(lambda: measured(tokens=0, dtype=torch.float32), ("calibrate", "T=0")),
    "calibrate, integers": Refusal(
        lambda: measured(tokens=6, dtype=torch.int64), ("calibrate", "dtype", "torch.int64")
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused_with_what_was_wrong(name: str) -> None:
    refused(REFUSALS[name].call, *REFUSALS[name].words)


def test_a_pool_made_by_hand_that_fits_is_sampled() -> None:
    got = data.sample_batch(POOL, CHOICE)
    assert (got.tokens[:, 0].tolist(), got.domain.tolist()) == ([0, 3], [0, 1])


@pytest.mark.parametrize("entry", ['{"entries": -2, "whole_from": 0.5}', '{"entries": 1, "whole_from": -0.5}'])
def test_a_kept_tiling_that_is_none_is_refused(tmp_path: Path, entry: str) -> None:
    path, sizes = (
        tmp_path / "kept.json",
        calibration.Sizes(num_experts=4, width=2, hidden=8, tokens=6, dtype=torch.float32),
    )
    refused(lambda: calibration.kept(path, sizes), "kept.json", "no tiling for E 4, I 2, H 8, T 6")
    path.write_text(f'{{"{calibration._key(sizes)}": {entry}}}')
    refused(lambda: calibration.kept(path, sizes), "kept.json", "neither of them negative")
    refused(lambda: calibration.calibrated(path, **sizes, repeats=1), "kept.json", "neither of them negative")
    refused(lambda: calibration.calibrated(tmp_path, **sizes, repeats=1), str(tmp_path), "expected a file")


class Replace(Protocol):
    """`dataclasses.replace`, which takes no mapping of mixed types."""

    def __call__(self, value: object, **changes: object) -> object: ...


NEITHER = (math.nan, math.inf, -1.0)
"""Numbers that no weight can be."""
OUTSIDE = (math.nan, -0.1, 1.1)
VALUES: dict[str, tuple[object, Mapping[str, tuple[object, ...]]]] = {
    "OptimConfig": (
        SETTINGS.optim,
        {
            "lr": NEITHER,
            "warmup": (-1, 2**63),
            "floor": OUTSIDE,
            "beta1": (math.nan, -0.1, 1.0),
            "beta2": (math.nan, -0.1, 1.0),
            "eps": NEITHER,
            "weight_decay": NEITHER,
            "clip_norm": (math.nan, 0.0, -1.0, 1e39),
        },
    ),
    "ConsolidationConfig": (
        SPARSE.consolidation,
        {"lr": NEITHER, "damping": (*NEITHER, 0.0), "eps": (*NEITHER, 0.0)},
    ),
    "IntegrityConfig": (
        SETTINGS.integrity,
        {"alpha": NEITHER, "gamma": OUTSIDE, "tau_floor": (*NEITHER, 0.0), "delta": NEITHER},
    ),
    "RouterConfig": (
        SPARSE.router,
        {
            "target": ("surprises",),
            "weight": NEITHER,
            "w_ce": NEITHER,
            "w_kl": NEITHER,
            "w_diversity": NEITHER,
            "w_simplicity": NEITHER,
            "temperature": (*NEITHER, 0.0),
            "sensitivity": NEITHER,
            "pi_threshold": (math.nan, math.inf, -math.inf),
        },
    ),
    "DensityConfig": (SPARSE.density, {"target": OUTSIDE, "ramp_steps": (-1, 2**63), "gain": OUTSIDE}),
    "DistillConfig": (SPARSE.distill, {"weight": OUTSIDE, "temperature": (*NEITHER, 0.0)}),
    "MoeTraining": (SPARSE, {"granularity": ("tokens",), "optimizer": ("adam",), "regime": ("router",)}),
    "StepConfig": (SETTINGS, {"total_steps": (-1, 2**63), "engine": ("autograds",)}),
}
"""Of every class: one that is right, and values that its fields refuse."""


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [(name, field, value) for name, (_, fields) in VALUES.items() for field in fields for value in fields[field]],
)
def test_a_value_that_means_nothing_is_refused_when_it_is_set(name: str, field: str, value: object) -> None:
    refused(lambda: cast("Replace", replace)(VALUES[name][0], **{field: value}), name, field, str(value))


def test_every_class_of_settings_and_every_number_in_it_is_tried() -> None:
    classes = [value for value in vars(settings).values() if isinstance(value, type) and is_dataclass(value)]
    own = {value.__name__: value for value in classes if value.__module__ == settings.__name__}
    assert own.keys() == VALUES.keys()
    for name, value in own.items():
        plain = {field for field, kind in value.__annotations__.items() if not is_class(kind)}
        assert plain == VALUES[name][1].keys()


def is_class(kind: object) -> bool:
    """Of another configuration, which has refused what is wrong with it by itself."""
    return any(name in str(kind) for name in ("Config", "MoeTraining"))


@pytest.mark.parametrize("backend", ["grouped", "grouped:5", "loop", "loop:1048576:0.55", "native", "native:0.85"])
def test_a_backend_of_active_pairs_alone_is_refused_with_the_counterfactual_target(backend: str) -> None:
    asked = replace(SPARSE.router, target="counterfactual")
    active_only = replace(SPARSE.moe, backend=backend)
    refused(
        lambda: replace(SPARSE, moe=active_only, router=asked),
        *("MoeTraining", "router.target='counterfactual'", "'dense'", "'auto'", repr(backend)),
    )
    assert replace(SPARSE, moe=active_only).moe.backend == backend
    for fitting in ("dense", "auto", "auto:5"):
        replace(SPARSE, router=asked, moe=replace(SPARSE.moe, backend=fitting))


MODULES = (optim, rounding, data, tiling, calibration)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.__name__))
def test_every_public_function_is_tried_with_wrong_arguments(module: ModuleType) -> None:
    assert_all_tried((*SPECS, *REFUSALS, "kept", "calibrated"), module, MODULES)
