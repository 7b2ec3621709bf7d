"""Every public function of `onn.optim` and `onn.rounding`, with arguments that it takes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

import onn.functional as F
from onn import optim, rounding
from onn.region import inline
from onn.tree import Tree
from tests.bad_arguments import Spec, Tensors

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


def consolidated(t: Tensors, n: Numbers) -> Tree:
    return optim.consolidation(
        *(F.Experts(t["gate"], t["up"], t["down"]), t["importance"], t["x"], t["weights"]),
        squares=t["squares"],
        biases=t["biases"],
        damping=n["damping"],
        eps=n["eps"],
    )


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
    "consolidation": Spec(
        consolidated,
        {
            **dict.fromkeys(F.Experts._fields, "float E I H"),
            "importance": "float E I",
            "x": "float T H",
            "weights": "float T E",
            "squares": "float 3 E I",
            "biases": "float 2 E I",
        },
        (*("E I H",) * 3, "E I"),
        {"damping": 1.0, "eps": 1e-8},
    ),
    "consolidation_init": Spec(
        lambda t, n: optim.consolidation_init(F.Experts(*(t[name] for name in F.Experts._fields))),
        dict.fromkeys(F.Experts._fields, "float E I H"),
        ("E I",),
    ),
    "descended": Spec(
        lambda t, n: optim.descended(
            t["param"], t["direction"], t["learns"], (t["noise"],), rate=t["rate"], region=inline
        ),
        {
            "param": "float E H",
            "direction": "float E H",
            "learns": "bool E 1",
            "noise": "integer E H",
            "rate": "float",
        },
        ("E H",),
        values={"param": BRAIN, "noise": BITS, "rate": LR},
    ),
    "global_norm": Spec(lambda t, n: optim.global_norm(t["grads"]), {"grads": "float E H"}, ("",), free=("grads",)),
    "narrow": Spec(
        lambda t, n: rounding.narrow(t["x"], torch.bfloat16, t["bits"]),
        {"x": "float E H", "bits": "integer E H"},
        ("E H",),
        values={"bits": BITS},
    ),
    "stochastic_round": Spec(
        lambda t, n: rounding.stochastic_round(t["x"], t["bits"]),
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
