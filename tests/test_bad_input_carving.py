"""Wrong shapes, dtypes, devices and numbers, to every public function of `onn.carve` and `onn.partition`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import onn.functional as F
from onn import carve, partition
from onn.qwen3 import Mlp, Model
from onn.tree import Tree
from tests.bad_arguments import Spec, Tensors
from tests.bad_calls import assert_all_handled, functions_of, refused
from tests.test_bad_input_functions import BANK, ROUTER, experts, router
from tests.test_qwen3 import config, parameters

DENSE = {"gate": "float M H", "up": "float M H", "down": "float H M"}
X = {"x": "float T H"}
CHOSEN = {"chosen": "bool T E"}
PARTITION = torch.arange(30).flip(0).reshape(10, 3)
PLACES = {"partition": PARTITION}
BANKS, ROUTED = ("E I H", "E I H", "E I H"), ("E H", "E")


def mlp(t: Tensors) -> Mlp:
    return Mlp(t["gate"], t["up"], t["down"])


def split(t: Tensors, num_experts: float) -> Tree:
    return carve.split_mlp(mlp(t), num_experts=int(num_experts))


def of_check(given: Tensor) -> Tree:
    partition.check_partition("check_partition", given)
    return given


CARVE: dict[str, Spec] = {
    "analytic_router": Spec(
        lambda t, n: carve.analytic_router(
            experts(t), t["x"], t["chosen"], eps=n["eps"], shared=int(n["shared"]), ridge=n["ridge"]
        ),
        {**BANK, **X, **CHOSEN},
        ROUTED,
        {"eps": 1e-6, "shared": 1, "ridge": 0.1},
    ),
    "best_experts": Spec(
        lambda t, n: carve.best_experts(experts(t), t["x"], k=int(n["k"]), shared=int(n["shared"])),
        {**BANK, **X},
        ("T E",),
        {"k": 3, "shared": 1},
    ),
    "calibrated": Spec(
        lambda t, n: carve.calibrated(router(t), t["x"], share=n["share"], eps=n["eps"]),
        {**ROUTER, **X},
        ROUTED,
        {"share": 0.5, "eps": 1e-6},
    ),
    "choose": Spec(
        lambda t, n: carve.choose(t["scores"], k=int(n["k"]), shared=int(n["shared"])),
        {"scores": "float T E"},
        ("T E",),
        {"k": 3, "shared": 1},
    ),
    "contributions": Spec(lambda t, n: carve.contributions(experts(t), t["x"]), {**BANK, **X}, ("T E",)),
    "gate_prototypes": Spec(lambda t, n: carve.gate_prototypes(experts(t)), BANK, ("E H",)),
    "matched_thresholds": Spec(
        lambda t, n: carve.matched_thresholds(t["affinity"], t["chosen"]),
        {"affinity": "float T E", **CHOSEN},
        ("E",),
    ),
    "merge_experts": Spec(lambda t, n: carve.merge_experts(experts(t)), BANK, ("30 5", "30 5", "5 30"), free=("gate",)),
    "neuron_norms": Spec(lambda t, n: carve.neuron_norms(mlp(t), t["x"]), {**DENSE, **X}, ("T M",)),
    "open_router": Spec(
        lambda t, n: carve.open_router(experts(t), shared=int(n["shared"])), BANK, ROUTED, {"shared": 1}
    ),
    "representative_scores": Spec(
        lambda t, n: carve.representative_scores(mlp(t), t["neurons"], t["x"]),
        {**DENSE, "neurons": "integer E", **X},
        ("T E",),
    ),
    "split_by": Spec(
        lambda t, n: carve.split_by(mlp(t), t["partition"]),
        {**DENSE, "partition": "integer E I"},
        BANKS,
        values=PLACES,
    ),
    "split_mlp": Spec(lambda t, n: split(t, n["num_experts"]), DENSE, ("num_experts 3 H",) * 3, {"num_experts": 10}),
    "token_prototypes": Spec(
        lambda t, n: carve.token_prototypes(t["x"], t["chosen"], ridge=n["ridge"]),
        {**X, **CHOSEN},
        ("E H",),
        {"ridge": 0.1},
    ),
    "with_shared": Spec(
        lambda t, n: carve.with_shared(t["thresholds"], shared=int(n["shared"])),
        {"thresholds": "float E"},
        ("E",),
        {"shared": 1},
    ),
}
PARTITIONS: dict[str, Spec] = {
    "balanced_assignment": Spec(
        lambda t, n: partition.balanced_assignment(t["benefit"], tolerance=n["tolerance"]),
        {"benefit": "float M C"},
        ("M",),
        {"tolerance": 1e-3},
    ),
    "balanced_kmeans": Spec(
        lambda t, n: partition.balanced_kmeans(t["points"], t["centres"], steps=int(n["steps"])),
        {"points": "float M H", "centres": "float E H"},
        ("E 3",),
        {"steps": 3},
    ),
    "by_coactivation": Spec(
        lambda t, n: partition.by_coactivation(t["active"], t["uniform"]),
        {"active": "bool T M", "uniform": "float E"},
        ("E 3",),
    ),
    "by_contribution": Spec(
        lambda t, n: partition.by_contribution(t["norms"], t["uniform"]),
        {"norms": "float T M", "uniform": "float E"},
        ("E 3",),
    ),
    "by_gate_rows": Spec(
        lambda t, n: partition.by_gate_rows(t["gate"], t["uniform"]),
        {"gate": "float M H", "uniform": "float E"},
        ("E 3",),
    ),
    "check_partition": Spec(
        lambda t, n: of_check(t["partition"]), {"partition": "integer E I"}, ("E I",), values=PLACES
    ),
    "cut": Spec(
        lambda t, n: partition.cut(t["order"], num_experts=int(n["num_experts"])),
        {"order": "integer M"},
        ("num_experts 3",),
        {"num_experts": 10},
        {"order": torch.arange(30)},
    ),
    "groups": Spec(
        lambda t, n: partition.groups(t["labels"], num_groups=int(n["num_groups"])),
        {"labels": "integer M"},
        ("num_groups 3",),
        {"num_groups": 10},
        {"labels": torch.arange(30) % 10},
    ),
    "most_active": Spec(
        lambda t, n: partition.most_active(t["strength"], k=int(n["k"])), {"strength": "float T M"}, ("T M",), {"k": 4}
    ),
    "representatives": Spec(
        lambda t, n: partition.representatives(t["points"], t["partition"]),
        {"points": "M H", "partition": "integer E I"},
        ("E",),
        values=PLACES,
    ),
    "shared_and_routed": Spec(
        lambda t, n: partition.shared_and_routed(
            t["active"], num_experts=int(n["num_experts"]), shared=int(n["shared"]), steps=int(n["steps"])
        ),
        {"active": "bool T M"},
        ("num_experts 3",),
        {"num_experts": 10, "shared": 2, "steps": 3},
    ),
    "spread_centres": Spec(
        lambda t, n: partition.spread_centres(t["points"], t["uniform"]),
        {"points": "float M H", "uniform": "float E"},
        ("E H",),
    ),
}
SPECS = {**CARVE, **PARTITIONS}


def test_every_public_function_is_tried() -> None:
    assert functions_of(carve) == CARVE.keys() | {"carve", "carve_by"}
    assert functions_of(partition) == PARTITIONS.keys()


@pytest.mark.parametrize("name", SPECS)
def test_one_wrong_argument_is_refused_by_name_or_makes_no_difference_to_the_shapes(name: str) -> None:
    assert_all_handled(SPECS[name])


ARCHITECTURE = replace(config(), num_hidden_layers=2)
WHOLE: Model = parameters(ARCHITECTURE)


@pytest.mark.parametrize("num_experts", [-1, 0, 9, 11, 10**6])
def test_a_model_is_not_carved_into_a_number_that_does_not_fit(num_experts: int) -> None:
    refused(lambda: carve.carve(WHOLE, num_experts=num_experts), "split_mlp", f"num_experts={num_experts}")


def test_a_model_is_carved_once() -> None:
    carved = carve.carve(WHOLE, num_experts=10)
    refused(lambda: carve.carve(carved, num_experts=10), "carve", "carved already")
    pieces = [torch.arange(ARCHITECTURE.intermediate_size).reshape(10, -1)] * 2
    refused(lambda: carve.carve_by(carved, pieces), "carve_by", "carved already")
    refused(lambda: carve.carve_by(WHOLE, pieces[:1]), "carve_by", "got 1")
    refused(lambda: carve.carve_by(WHOLE, pieces, shared=11), "shared=11")
    refused(lambda: carve.carve_by(WHOLE, [pieces[0], pieces[1].mT.contiguous()]), "split_by", "num_experts=")
    refused(lambda: carve.carve_by(WHOLE, [pieces[0], pieces[1].clamp_min(1)]), "split_by", "missing [0]")


@pytest.mark.parametrize("place", [-1, 30, 10**6])
def test_a_neuron_that_is_not_there_is_refused(place: int) -> None:
    dense = Mlp(*(torch.ones(shape) for shape in ((30, 5), (30, 5), (5, 30))))
    chosen, pieces = torch.tensor([0, place]), torch.tensor([[0, 1], [2, place]])
    refused(
        lambda: carve.representative_scores(dense, chosen, torch.ones(4, 5)),
        "representative_scores",
        "neurons",
        str(place),
    )
    refused(lambda: partition.representatives(torch.ones(4, 2), pieces), "representatives", "partition", str(place))


def test_a_partition_of_other_points_is_refused() -> None:
    refused(lambda: partition.representatives(torch.ones(9, 2), PARTITION), "representatives", "[10, 3]", "9 points")


def test_experts_of_one_shared_dtype_are_asked_for() -> None:
    bank = F.Experts(*(torch.ones(10, 3, 5) for _ in range(3)))
    x = torch.ones(4, 5, dtype=torch.float64)
    refused(lambda: carve.contributions(bank, x), "contributions", "one dtype", "x of torch.float64")
