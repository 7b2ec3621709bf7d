"""Held-out figures of a model by domain, and text that it writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import onn.functional as F
from onn import objective, qwen3, tree
from onn.data import Batch
from onn.objective import IntegrityConfig, SparseMetrics, StepConfig
from onn.observe import Json, mutual_information
from onn.qwen3 import Model


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainFigures:
    """Means over the targets of one domain; the expert figures are those of a carved model."""

    targets: int
    loss: float
    accuracy: float
    tau: float
    sparse: SparseFigures | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseFigures:
    """Of one domain, however it is cut into batches: means over tokens, the surprise over active pairs; and sums."""

    batches: int
    surprise: float
    pi: float
    active_share: float
    gate_accuracy: float
    gate_chance: float
    routed: Tensor
    """[L, E]: tokens that passed the threshold."""
    active: Tensor
    """[L, E]: tokens after the fallback."""
    surprise_sum: Tensor
    """[L, E]: surprise of all active pairs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Held-out figures of one model."""

    domains: tuple[str, ...]
    figures: tuple[DomainFigures, ...]

    def mean(self, name: str) -> float:
        """A figure over all domains, weighted by their targets."""
        total = sum(domain.targets for domain in self.figures)
        return sum(domain.targets * float(getattr(domain, name)) for domain in self.figures) / total

    def sparse_mean(self, name: str) -> float | None:
        """An expert figure over all domains, or `None` for a dense model."""
        rows = [(domain.targets, domain.sparse) for domain in self.figures]
        values = [(targets, float(getattr(sparse, name))) for targets, sparse in rows if sparse is not None]
        return sum(n * value for n, value in values) / sum(n for n, _ in values) if values else None

    def usage(self) -> Tensor:
        """[L, D, E]: tokens of each domain that each expert was active on."""
        return torch.stack([domain.sparse.active for domain in self.figures if domain.sparse is not None], dim=1)

    def surprise_by_expert(self) -> Tensor:
        """[L, E]: mean surprise of the tokens that each expert was active on; NaN without any."""
        sums = torch.stack([domain.sparse.surprise_sum for domain in self.figures if domain.sparse is not None])
        counts = self.usage().sum(dim=1)
        return sums.sum(dim=0) / torch.where(counts > 0, counts, torch.nan)

    def dead(self) -> tuple[int, int]:
        """Experts, over all layers, that no token routed to, before and after the fallback."""
        routed = torch.stack([domain.sparse.routed for domain in self.figures if domain.sparse is not None])
        return int((routed.sum(dim=0) == 0).sum()), int((self.usage().sum(dim=1) == 0).sum())

    def expert_domain_information(self) -> float:
        """Mutual information of expert and domain in nats, the mean over layers."""
        tables = self.usage().unbind(0)
        return sum(mutual_information(table) for table in tables) / len(tables)

    def per_domain(self, *, num_experts: int) -> dict[str, Json]:
        """The table of the report."""
        return {
            name: _domain_record(figures, num_experts) for name, figures in zip(self.domains, self.figures, strict=True)
        }


def _domain_record(figures: DomainFigures, num_experts: int) -> Mapping[str, Json]:
    record: dict[str, Json] = {"loss": figures.loss, "accuracy": figures.accuracy}
    if figures.sparse is not None:
        record |= {
            "active_per_token": figures.sparse.active_share * num_experts,
            "gate_accuracy": figures.sparse.gate_accuracy,
            "gate_chance": figures.sparse.gate_chance,
            "surprise": figures.sparse.surprise,
            "pi": figures.sparse.pi,
        }
    return record


def evaluate(model: Model, batches: Mapping[str, Iterable[Batch]], *, config: StepConfig) -> Evaluation:
    """Measure a model, surprise included, on held-out batches of every domain."""
    figures = tuple(_domain(model, own, config=config) for own in batches.values())
    return Evaluation(domains=tuple(batches), figures=figures)


def _domain(model: Model, batches: Iterable[Batch], *, config: StepConfig) -> DomainFigures:
    targets, sums = 0, torch.zeros(3, dtype=torch.float64)
    rows: list[tuple[int, SparseMetrics]] = []
    for batch in batches:
        count = int(batch.mask.sum())
        loss, seen, surprise = objective.measure(model, batch, config=config)
        targets += count
        sums += count * torch.stack([loss, seen.accuracy, seen.tau]).double()
        if seen.carved:
            share = torch.stack([c.routing.active.float().mean() for c in seen.carved]).mean()
            metrics = objective.sparse_metrics(loss, seen, surprise, share, config=config)
            rows.append((batch.tokens.numel(), metrics))
    means = sums / max(targets, 1)
    sparse = _sparse(rows, means[0], means[2], config=config.integrity) if rows else None
    loss, accuracy, tau = means.tolist()
    return DomainFigures(targets=targets, loss=loss, accuracy=accuracy, tau=tau, sparse=sparse)


def _sparse(
    rows: list[tuple[int, SparseMetrics]], loss: Tensor, tau: Tensor, *, config: IntegrityConfig
) -> SparseFigures:
    columns = [row for _, row in rows]
    tokens = torch.tensor([size for size, _ in rows], dtype=torch.float64)
    pairs = torch.stack([row.usage.active.sum() for row in columns]).double()

    def mean(values: Iterable[Tensor], weights: Tensor) -> Tensor:
        return (torch.stack(list(values)).double() * weights).sum() / weights.sum()

    def total(values: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(values)).sum(dim=0)

    surprise = mean((row.surprise for row in columns), pairs)
    return SparseFigures(
        batches=len(rows),
        surprise=float(surprise),
        pi=float(
            F.predictive_integrity(
                loss, tau, surprise, alpha=config.alpha, gamma=config.gamma, tau_floor=config.tau_floor
            )
        ),
        active_share=float(mean((row.active_share for row in columns), tokens)),
        gate_accuracy=float(mean((row.gate.accuracy for row in columns), tokens)),
        gate_chance=float(mean((row.gate.chance for row in columns), tokens)),
        routed=total(row.usage.routed for row in columns),
        active=total(row.usage.active for row in columns),
        surprise_sum=total(row.surprise_by_expert.nan_to_num() * row.usage.active for row in columns),
    )


@torch.no_grad()
def generate(model: Model, prompt: Tensor, noise: Tensor, *, temperature: float, config: StepConfig) -> Tensor:
    """Continue `prompt` [S] by one token for each row of uniform `noise` [N, V] (Gumbel sampling): [S + N].

    Each token recomputes the whole sequence: fit for a sample in a report, not for serving.
    """
    moe = None if config.sparse is None else config.sparse.moe
    taps = objective.zero_taps(model, 0, names=())
    tokens = prompt
    for uniform in noise:
        logits = qwen3.forward(model, tokens[None], taps, config=config.model, moe=moe).logits[0, -1]
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-7)))
        choice = (logits.to(F.reduction_dtype(logits.dtype)) / max(temperature, 1e-6) + gumbel).argmax()
        tokens = torch.cat([tokens, choice[None]])
    return tokens


def parameter_count(model: Model) -> int:
    """Numbers in a model."""
    return sum(leaf.numel() for leaf in tree.leaves(model))
