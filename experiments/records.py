"""The numbers of a step and of a run, by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import onn.functional as F
from experiments.evaluate import Evaluation
from experiments.presets import RunConfig
from onn import objective, observe
from onn.architecture import MoeConfig
from onn.objective import StepConfig
from onn.observe import Json
from onn.train import Metrics


def step_record(metrics: Metrics, settings: StepConfig, *, step: int, phase: str, reborn: int) -> dict[str, Json]:
    """The line of `metrics.jsonl`, without clocks."""
    loss, tau = float(metrics.loss), float(metrics.tau)
    record: dict[str, Json] = {"step": step, "phase": phase, "loss": loss, "tau": tau}
    record["error_over_tau"] = loss / max(tau, settings.integrity.tau_floor)
    record["divergence"] = float(metrics.divergence) if isinstance(metrics.divergence, Tensor) else None
    sparse = dict.fromkeys(
        ("surprise", "pi", "active_per_token", "target_active_per_token", "gate_accuracy", "gate_chance"), None
    )
    record |= sparse | {"dead_experts": None, "reborn": None}
    if isinstance(metrics.sparse, objective.SparseMetrics) and settings.sparse is not None:
        seen, experts = metrics.sparse, settings.sparse.moe.num_experts
        record |= {
            "surprise": float(seen.surprise),
            "pi": float(seen.pi),
            "active_per_token": float(seen.active_share) * experts,
            "target_active_per_token": _target(settings.sparse.moe, float(seen.target_share)) * experts,
            "gate_accuracy": float(seen.gate.accuracy),
            "gate_chance": float(seen.gate.chance),
            "dead_experts": int((seen.usage.active == 0).sum()),
            "reborn": reborn,
            "non_finite_surprise": int(seen.non_finite),
        }
    return record | {
        "accuracy": float(metrics.accuracy),
        "learning_rate": float(metrics.learning_rate),
        "grad_norm": float(metrics.grad_norm),
        "skipped": bool(metrics.skipped),
    }


def _target(moe: MoeConfig, share: float) -> float:
    """The share of experts that a token is to have: the one asked for, or k of E whatever that is."""
    return moe.top_k / moe.num_experts if moe.route == "top_k" else share


def progress_text(record: Mapping[str, Json]) -> str:
    """What stands behind the progress bar."""
    shown = {"loss": ".3f", "pi": ".3f", "active_per_token": ".1f", "tokens_per_second": ".0f"}
    names = {"pi": "PI", "active_per_token": "active", "tokens_per_second": "tok/s"}
    values = {name: observe.number(record, name) for name in shown}
    return ", ".join(
        f"{names.get(name, name)} {value:{shown[name]}}" for name, value in values.items() if value is not None
    )


def figures(
    dense: Evaluation,
    carved: Evaluation,
    final: Evaluation,
    continued: Evaluation | None,
    records: list[dict[str, Json]],
    config: RunConfig,
) -> dict[str, Json]:
    """What `summary.json` says of the models."""
    moe, (before, after) = config.sparse.moe, final.dead()
    if moe.route == "top_k":
        before = after
    series = [value for record in records if (value := observe.number(record, "pi")) is not None]
    integral = F.integrity_integral(torch.tensor(series), delta=config.integrity.delta) if series else None
    return {
        "dense_loss": dense.mean("loss"),
        "carved_loss": carved.mean("loss"),
        "final_loss": final.mean("loss"),
        "dense_continued_loss": None if continued is None else continued.mean("loss"),
        "pi": final.sparse_mean("pi"),
        "pi_integral": None if integral is None else float(integral),
        "tau": final.mean("tau"),
        "surprise": final.sparse_mean("surprise"),
        "active_fraction": final.sparse_mean("active_share"),
        "target_active_fraction": _target(moe, config.sparse.density.target),
        "gate_accuracy": final.sparse_mean("gate_accuracy"),
        "gate_chance": final.sparse_mean("gate_chance"),
        "dead_before_fallback": before,
        "dead_after_fallback": after,
        "expert_domain_information_nats": final.expert_domain_information(),
        "per_domain": final.per_domain(num_experts=config.sparse.moe.num_experts),
        "per_domain_dense_continued": None if continued is None else continued.per_domain(num_experts=1),
    }
