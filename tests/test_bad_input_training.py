"""Wrong shapes, dtypes, devices and numbers, to every public function of `onn.optim` and `onn.data`."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from onn import data, optim
from onn.data import Pool
from onn.region import inline
from onn.tree import Tree
from tests.bad_arguments import Spec, Tensors
from tests.bad_calls import assert_all_handled, assert_valid, functions_of

Numbers = Mapping[str, float]
RATES = {"beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.1}
LR = torch.tensor(0.01)
ADAMW = {
    "params": "float E H",
    "grads": "float E H",
    "steps": "integer E 1",
    "mean": "float E H",
    "square": "float E H",
    "learns": "bool E 1",
}


def rates(n: Numbers) -> optim.Rates:
    return optim.Rates(beta1=n["beta1"], beta2=n["beta2"], eps=n["eps"], weight_decay=n["weight_decay"])


def stepped(t: Tensors, n: Numbers) -> Tree:
    state = optim.AdamWState(t["steps"], t["mean"], t["square"])
    values = rates(n)
    return optim.adamw(
        *(t["params"], t["grads"], state, t["learns"], t.get("noise", ())),
        lr=t["lr"],
        beta1=values.beta1,
        beta2=values.beta2,
        eps=values.eps,
        weight_decay=values.weight_decay,
    )


def stepped_leaf(t: Tensors, n: Numbers) -> Tree:
    params, grads, steps, mean, square, learns = (t[name] for name in ADAMW)
    entry = optim.Entry(params, grads, steps, mean, square, learns, (t["noise"],))
    return optim.adamw_leaf(entry, lr=t["lr"], scale=t["scale"], rates=rates(n), region=inline)


def pool_of(t: Tensors) -> Pool:
    return Pool(t["tokens"], t["mask"], t["starts"], t["bounds"], 3)


STEPS, LEARNS = torch.ones(10, 1, dtype=torch.int64), torch.ones(10, 1, dtype=torch.bool)
BRAIN = torch.ones(10, 5, dtype=torch.bfloat16)
BITS = torch.zeros(10, 5, dtype=torch.int16)
OPTIM: dict[str, Spec] = {
    "adamw": Spec(
        stepped,
        {**ADAMW, "lr": "float"},
        ("E H", "E 1", "E H", "E H"),
        RATES,
        {"steps": STEPS, "square": BITS.float(), "lr": LR},
    ),
    "adamw_init": Spec(
        lambda t, n: optim.adamw_init(t["params"], t["learns"]),
        {"params": "float E H", "learns": "E 1"},
        ("E 1", "E H", "E H"),
        free=("params", "learns"),
    ),
    "adamw_leaf": Spec(
        stepped_leaf,
        {**ADAMW, "noise": "integer E H", "lr": "float", "scale": "float"},
        ("E H", "E 1", "E H", "E H"),
        RATES,
        {"params": BRAIN, "grads": BRAIN, "steps": STEPS, "square": BITS.float(), "noise": BITS, "lr": LR},
    ),
    "clip_by_global_norm": Spec(
        lambda t, n: optim.clip_by_global_norm(t["grads"], max_norm=n["max_norm"]),
        {"grads": "float E H"},
        ("E H", ""),
        {"max_norm": 1.0},
        free=("grads",),
    ),
    "clip_scale": Spec(
        lambda t, n: optim.clip_scale(t["norm"], max_norm=n["max_norm"]),
        {"norm": "float"},
        ("",),
        {"max_norm": 1.0},
        free=("norm",),
    ),
    "global_norm": Spec(lambda t, n: optim.global_norm(t["grads"]), {"grads": "float E H"}, ("",), free=("grads",)),
    "narrow": Spec(
        lambda t, n: optim.narrow(t["x"], torch.bfloat16, t["bits"]),
        {"x": "float E H", "bits": "integer E H"},
        ("E H",),
        values={"bits": BITS},
    ),
    "stochastic_round": Spec(
        lambda t, n: optim.stochastic_round(t["x"], t["bits"]),
        {"x": "float E H", "bits": "integer E H"},
        ("E H",),
        values={"bits": BITS},
    ),
    "warmup_cosine": Spec(
        lambda t, n: optim.warmup_cosine(
            t["step"], peak=n["peak"], warmup=int(n["warmup"]), total=int(n["total"]), floor=n["floor"]
        ),
        {"step": "real"},
        ("",),
        {"peak": 0.1, "warmup": 2, "total": 40, "floor": 0.1},
        free=("step",),
    ),
}
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


def test_every_public_function_is_tried() -> None:
    assert functions_of(optim) == OPTIM.keys()
    assert functions_of(data) == DATA.keys() | {"check_vocabulary", "check_batch"}


@pytest.mark.parametrize("name", SPECS)
def test_a_valid_call_has_results_of_the_shapes_said(name: str) -> None:
    assert_valid(SPECS[name])


@pytest.mark.parametrize("name", SPECS)
def test_one_wrong_argument_is_refused_by_name_or_makes_no_difference_to_the_shapes(name: str) -> None:
    assert_all_handled(SPECS[name])
