"""Who serves which task: measures of single experts on trained models. Shape letters as in `net`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from experiments import noise
from experiments.study import measures
from experiments.study.lanes import Job, lanes, needs
from experiments.study.net import EPS, forward
from experiments.study.records import Specialisation, Symbols, Vocabulary
from experiments.study.runs import Trained
from experiments.study.step import activate
from experiments.study.tasks import Tasks
from onn import tree

PERMUTATIONS = 500


def specialisations(
    jobs: Sequence[Job], lanes_of_interest: Sequence[int], trained: Trained, tasks: Mapping[int, Tasks]
) -> list[Specialisation]:
    """Of these lanes of a chunk."""
    return [_of_lane(jobs[n], n, trained, tasks[jobs[n].key.seed]) for n in lanes_of_interest]


def _of_lane(job: Job, n: int, trained: Trained, data: Tasks) -> Specialisation:
    net = tree.map1(lambda leaf: leaf[n], trained.net)
    lane, kind = tree.map1(lambda number: number[0], lanes([job])), needs(job)
    inputs, residual, labels = (part.flatten(0, 1) for part in (data.held_inputs, data.held_residual, data.held_labels))
    count, size = data.held_labels.shape
    task = torch.arange(count).repeat_interleave(size)
    with torch.no_grad():
        seen = forward(net, inputs, residual, lambda affinity: activate(affinity, trained.thresholds[n], lane, kind))
        contribution = torch.einsum(
            "tei,eih->teh", silu(seen.residuals.h1) * seen.residuals.h3 * seen.weights[..., None], net.experts.down
        )

    def head(y: Tensor) -> Tensor:
        return (rms_norm(y, y.shape[-1:], eps=EPS) if residual.shape[-1] else y) @ net.readout.mT

    draws = noise.generator(job.key.seed)
    order = torch.stack([torch.randperm(len(task), generator=draws) for _ in range(PERMUTATIONS)])
    used = measures.usage(seen.active, task, tasks=count)
    ablated = measures.ablation(seen.mixed, contribution, head, labels, task, tasks=count)
    return Specialisation(
        key=job.key,
        usage=tuple(tuple(map(int, row)) for row in used.tolist()),
        information=measures.information(used),
        permuted=tuple(measures.permutation_information(seen.active, task, order=order).tolist()),
        ablation=tuple(tuple(row) for row in ablated.tolist()),
        saturation=tuple(measures.saturation(active[n], seen.active) for active in trained.active),
        coactivation=measures.coactivation(seen.active),
        vocabulary=tuple(_vocabulary(seen.active, *named, order) for named in _symbols(data).items()),
        course=tuple(measures.information(measures.usage(was[n], task, tasks=count)) for was in trained.active),
    )


def _symbols(data: Tasks) -> dict[Symbols, Tensor]:
    """What plays the part of a vocabulary, of every held-out token."""
    labels, tokens = data.held_labels.flatten(), data.held_tokens.flatten()
    return {"input": tokens, "target": labels} if len(tokens) else {"class": labels}


def _vocabulary(active: Tensor, symbols: Symbols, symbol: Tensor, order: Tensor) -> Vocabulary:
    found = torch.stack([measures.vocabulary(active, symbol[row]) for row in (slice(None), *order)])
    mean, *permuted = found.nanmean(dim=1).tolist()
    chance = found[1:].mean(dim=0)
    return Vocabulary(symbols, mean, tuple(found[0].tolist()), chance=tuple(chance.tolist()), permuted=tuple(permuted))
