from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from experiments import records
from experiments.evaluate import DomainFigures, Evaluation, evaluate
from experiments.presets import TINY
from onn import tree
from onn.data import Batch
from tests.support import assert_close, tolerance
from tests.test_train import SETTINGS, batch, carved_state

BOUND = tolerance(torch.float32, terms=4)
"""Of a float64 model: counts and shares are float32."""


def rows(whole: Batch, sizes: tuple[int, ...]) -> list[Batch]:
    """The same windows in batches of these sizes."""
    parts = zip(*(leaf.split(sizes) for leaf in tree.leaves(whole)), strict=True)
    return [tree.unflatten(whole, part) for part in parts]


def numbers(figures: DomainFigures) -> dict[str, Tensor]:
    assert figures.sparse is not None
    found = {**dataclasses.asdict(figures.sparse), "loss": figures.loss, "accuracy": figures.accuracy}
    return {name: torch.as_tensor(value).double() for name, value in found.items() if name != "batches"}


def test_held_out_figures_do_not_depend_on_how_windows_are_cut_into_batches() -> None:
    model, found = carved_state(dtype=torch.float64).model, [batch(seed) for seed in range(3)]
    whole = tree.unflatten(found[0], [torch.cat(parts) for parts in zip(*map(tree.leaves, found), strict=True)])
    count = len(whole.tokens)
    cuts = [(count,), (1,) * count, (count - 1, 1)]
    got = [numbers(evaluate(model, {"text": rows(whole, cut)}, config=SETTINGS).figures[0]) for cut in cuts]
    for other in got[1:]:
        for name, value in got[0].items():
            assert_close(other[name], value, bound=BOUND)


@pytest.mark.parametrize(("route", "share"), [("threshold", TINY.sparse.density.target), ("top_k", 3 / 32)])
def test_under_top_k_the_target_is_k_of_all_and_there_is_no_fallback(
    route: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evaluation, "dead", lambda self: (4, 1))
    moe = replace(TINY.sparse.moe, route="top_k" if route == "top_k" else "threshold", top_k=3)
    config = replace(TINY, sparse=replace(TINY.sparse, moe=moe))
    figures = evaluate(carved_state(dtype=torch.float32).model, {"text": [batch(0)]}, config=SETTINGS)
    told = records.figures(figures, figures, figures, None, [], config)
    assert told["target_active_fraction"] == share
    dead = (told["dead_before_fallback"], told["dead_after_fallback"])
    assert dead == ((1, 1) if route == "top_k" else (4, 1))
