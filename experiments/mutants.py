"""The likeliest mistakes in `onn.functional`, each as one exact replacement in its source: for `mutations.py`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Mutation(NamedTuple):
    """One mistake: `old` occurs exactly once in `file`."""

    mistake: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    """Names of test files, without `test_` and `.py`, of those that are likeliest to notice; they run first."""


_SURPRISE, _EXPERTS, _ROUTING = ("onn/functional/" + name for name in ("surprise.py", "experts.py", "routing.py"))
_NATIVE, _NATIVE_ACTIVATIONS, _NATIVE_PAIRS = (
    "onn/functional/kernels/" + name for name in ("native.cpp", "activations.h", "pairs.h")
)
_GROUPED = "onn/functional/kernels/grouped.py"
_LOSSES, _INTEGRITY, _LIFECYCLE = ("onn/functional/" + name for name in ("losses.py", "integrity.py", "lifecycle.py"))

FUNCTIONAL: Mapping[str, Mutation] = MappingProxyType(
    {
        "surprise_without_weight": Mutation(
            "a dropped factor: surprise without the combine weight",
            _SURPRISE,
            "counterfactual * weights.abs().to(counterfactual.dtype)",
            "counterfactual",
            ("surprise",),
        ),
        "surprise_squared": Mutation(
            "squared surprise instead of its root",
            _SURPRISE,
            "return torch.hypot(inner * x_norm, outer * dy_norm)",
            "return (inner * x_norm) ** 2 + (outer * dy_norm) ** 2",
            ("surprise",),
        ),
        "surprise_without_down": Mutation(
            "a forgotten term: surprise without the gradient of `down`",
            _SURPRISE,
            "return torch.hypot(inner * x_norm, outer * dy_norm)",
            "return inner * x_norm",
            ("surprise",),
        ),
        "surprise_in_bfloat16": Mutation(
            "norms of bfloat16 summed in bfloat16",
            "onn/functional/kernels/local.py",
            "vector_norm(rows, dim=-1, dtype=reduction_dtype(rows.dtype))",
            "vector_norm(rows, dim=-1).to(reduction_dtype(rows.dtype))",
            ("surprise",),
        ),
        "neuron_without_weight": Mutation(
            "the Fisher information of a neuron without the combine weight",
            _SURPRISE,
            "inner = w * vector_norm(",
            "inner = vector_norm(",
            ("surprise",),
        ),
        "smk_max": Mutation(
            "max for min: SMK keeps the most surprised",
            _SURPRISE,
            "torch.where(active, usable, torch.inf)",
            "torch.where(active, -usable, torch.inf)",
            ("selection", "smk"),
        ),
        "smk_unstable_ties": Mutation(
            "ties in no particular order",
            _SURPRISE,
            "torch.sort(torch.where(active, usable, torch.inf), dim=-1, stable=True).indices[..., :k]",
            "torch.topk(torch.where(active, usable, torch.inf), min(k, active.shape[-1]), largest=False).indices",
            ("selection", "smk"),
        ),
        "smk_of_inactive": Mutation(
            "experts that are not active, whose surprise is 0, win",
            _SURPRISE,
            "torch.where(active, usable, torch.inf)",
            "usable",
            ("selection", "smk"),
        ),
        "smk_prefers_nan": Mutation(
            "a NaN counts as no surprise at all",
            _SURPRISE,
            "nan=largest, posinf=largest",
            "nan=0.0, posinf=largest",
            ("selection", "smk"),
        ),
        "consolidate_without_root": Mutation(
            "consolidation by the importance instead of its root",
            "onn/functional/consolidation.py",
            "torch.rsqrt(rows + eps)",
            "1 / (rows + eps)",
            ("selection",),
        ),
        "centre_added": Mutation(
            "what an expert's tokens share is added to its gradient instead of taken off",
            "onn/functional/consolidation.py",
            "g - part.to(g.dtype)",
            "g + part.to(g.dtype)",
            ("consolidation",),
        ),
        "whitened_by_half": Mutation(
            "a whitened gradient without its scale",
            "onn/functional/consolidation.py",
            "(1 + damping) * torch.cholesky_inverse",
            "torch.cholesky_inverse",
            ("consolidation",),
        ),
        "silu_derivative": Mutation(
            "the derivative of SiLU without the term `1 + h (1 - sigmoid)`",
            "onn/functional/kernels/local.py",
            "torch.ops.aten.silu_backward(u * h3, h1)",
            "u * h3 * torch.sigmoid(h1)",
            ("bank", "surprise"),
        ),
        "filled_with_another_token": Mutation(
            "rows that only fill up a batch of experts hold a token of another expert, times 0: a NaN spreads",
            "onn/functional/kernels/cutting.py",
            "tokens=pairs.token.index_select(0, own)",
            "tokens=pairs.token.index_select(0, own.clamp(max=start))",
            ("backends", "parts"),
        ),
        "nobodys_rows_kept": Mutation(
            "rows that fill up a batch of experts are put where all read: a NaN spreads",
            "onn/functional/kernels/parts.py",
            "            into[-1] = 0\n",
            "",
            ("parts", "backends"),
        ),
        "unguarded_rows": Mutation(
            "an expert that is not finite reaches tokens that did not choose it, 0 times NaN, where it computes all",
            "onn/functional/kernels/parts.py",
            "rows if bool(rows.sum().isfinite()) else torch.where(weight != 0, rows, 0)",
            "rows",
            ("parts", "backends"),
        ),
        "surprise_of_pairs_without_weight": Mutation(
            "a dropped factor where only active pairs are computed",
            "onn/functional/kernels/ragged.py",
            "weight_surprise(torch.hypot(*(norms * sources).split(1, dim=1)), pairs.weight)",
            "torch.hypot(*(norms * sources).split(1, dim=1))",
            ("numerics",),
        ),
        "masked_pairs_learn": Mutation(
            "SMK that is computed and ignored where only active pairs are computed",
            "onn/functional/kernels/ragged.py",
            "filled, min_k=min(min_k, columns.shape[1]))[place]",
            "filled, min_k=columns.shape[1])[place]",
            ("numerics",),
        ),
        "rows_of_nobody": Mutation(
            "rows that nobody owns are multiplied by 0, whatever they hold",
            _GROUPED,
            "torch.where(self.weight != 0, rows * self.weight, 0)",
            "rows * self.weight",
            ("bounded",),
        ),
        "silent_without_room": Mutation(
            "active pairs for which there is no room are dropped in silence",
            _GROUPED,
            "torch.where(rows.fits, sum_by_token(sent, rows.places), torch.nan)",
            "sum_by_token(sent, rows.places)",
            ("bounded",),
        ),
        "room_of_experts": Mutation(
            "the rows of a token counted over the tokens of an expert",
            _GROUPED,
            "torch.where(active, active.cumsum(dim=1) - 1, per_token)",
            "torch.where(active, active.cumsum(dim=0) - 1, per_token)",
            ("bounded",),
        ),
        "native_tail_dropped": Mutation(
            "a dot product of native code without the numbers that fill no vector",
            _NATIVE,
            "for (int64_t h = done; h < H; ++h) dot +=",
            "for (int64_t h = H; h < H; ++h) dot +=",
            ("native",),
        ),
        "native_rows_forgotten": Mutation(
            "a weight gradient of native code of the last rows of an expert alone",
            _NATIVE,
            "if (r > start) {",
            "if (r < start) {",
            ("native",),
        ),
        "native_sums_replaced": Mutation(
            "the last expert of a token instead of their sum in native code",
            _NATIVE,
            "store(sum + c * L, load(sum + c * L) + block[m][c])",
            "store(sum + c * L, block[m][c])",
            ("native",),
        ),
        "native_slope": Mutation(
            "the derivative of SiLU without its second term in native code",
            _NATIVE_ACTIVATIONS,
            "by * up * (open + gated * (1 - open))",
            "by * up * open",
            ("native_activations",),
        ),
        "native_surprise_without_weight": Mutation(
            "surprise without the combine weight in native code",
            _NATIVE_ACTIVATIONS,
            "std::hypot(inner, outer) * std::abs(weight[r])",
            "std::hypot(inner, outer)",
            ("native_activations",),
        ),
        "native_squares_of_all_lengths_alike": Mutation(
            "squared surprise by neuron without the lengths of the tokens in native code",
            _NATIVE_ACTIVATIONS,
            "scale ? row * scale[token[r]] : row",
            "row",
            ("native_activations",),
        ),
        "native_pairs_of_a_block_of_tokens": Mutation(
            "the pairs of all blocks of tokens begin where those of the first do in native code",
            _NATIVE_PAIRS,
            "number += std::exchange(starts[b * E + e], number)",
            "number += std::exchange(starts[b * E + e], e ? ends[e - 1] : 0)",
            ("native",),
        ),
        "native_nan_learns_first": Mutation(
            "SMK of native code does not keep what is not finite last",
            _NATIVE_PAIRS,
            "std::isfinite(surprise[r]) ? surprise[r] : std::numeric_limits<A>::infinity()",
            "std::isfinite(surprise[r]) ? surprise[r] : -std::numeric_limits<A>::infinity()",
            ("native",),
        ),
        "kept_pairs_counted_over_all": Mutation(
            "pairs that learn under SMK take the activations of others",
            "onn/functional/kernels/parts.py",
            "values.index_select(0, among[pairs])",
            "values[: len(among)][pairs]",
            ("smk", "backends"),
        ),
        "masked_pairs_in_biases": Mutation(
            "the gradient of biases over all pairs instead of those that learn",
            "onn/functional/kernels/dense.py",
            "torch.where(torch.zeros_like(weights, dtype=torch.bool).scatter(-1, *kept), weights, 0)",
            "weights",
            ("smk",),
        ),
        "nan_rows_multiplied": Mutation(
            "rows that are not kept multiplied by zero instead of dropped",
            _EXPERTS,
            "torch.where(kept, part, 0).mT @ torch.where(kept, source, 0)",
            "(part * kept).mT @ (source * kept)",
            ("smk",),
        ),
        "threshold_sign": Mutation(
            "a threshold of the wrong sign",
            _ROUTING,
            "squashed - torch.sigmoid(thresholds",
            "squashed - torch.sigmoid(-thresholds",
            ("routing",),
        ),
        "straight_through_dropped": Mutation(
            "no gradient passes the step from margin to gate",
            _ROUTING,
            "torch.where(margin.isnan(), 0, margin - margin.detach())",
            "torch.zeros_like(margin)",
            ("routing",),
        ),
        "softmax_over_all": Mutation(
            "softmax over all experts instead of the active ones",
            _ROUTING,
            "torch.softmax(margin.masked_fill(~active, -torch.inf), dim=-1)",
            "torch.where(active, torch.softmax(margin, dim=-1), 0)",
            ("routing",),
        ),
        "fallback_forgotten": Mutation(
            "a token that passes no threshold has no expert",
            _ROUTING,
            "active = torch.where(passed.any(dim=-1, keepdim=True), passed, fallback)",
            "active = passed",
            ("routing",),
        ),
        "top_k_not_normalised": Mutation(
            "weights of top-k that do not sum to 1",
            _ROUTING,
            "    if normalise:\n        top = ",
            "    if normalise and k == 0:\n        top = ",
            ("routing",),
        ),
        "balance_sign": Mutation(
            "loss-free balancing that feeds the overloaded",
            _ROUTING,
            "torch.sign(load.mean() - load)",
            "torch.sign(load - load.mean())",
            ("routing",),
        ),
        "share_of_the_rest": Mutation(
            "a controller that opens the share it should close",
            _ROUTING,
            "rank = ((1 - target.to(reduction_dtype(target.dtype))) * distance.numel())",
            "rank = (target * distance.numel())",
            ("routing",),
        ),
        "integrity_weights_swapped": Mutation(
            "the share of surprise given to the error in PI",
            _INTEGRITY,
            "_times(1 - gamma, error) / tau.clamp_min(tau_floor)",
            "_times(gamma, error) / tau.clamp_min(tau_floor)",
            ("integrity",),
        ),
        "tau_floor_dropped": Mutation(
            "no floor under tau",
            _INTEGRITY,
            "tau.clamp_min(tau_floor)",
            "tau",
            ("integrity",),
        ),
        "entropy_in_bits": Mutation(
            "entropy in bits",
            _INTEGRITY,
            "p * torch.where(possible, log_p, 0)",
            "p * torch.where(possible, p.log2(), 0)",
            ("integrity",),
        ),
        "sample_variance": Mutation(
            "the variance of a sample instead of the population in the integral of PI",
            _INTEGRITY,
            "pi.var(correction=0)",
            "pi.var()",
            ("integrity",),
        ),
        "mix_reversed": Mutation(
            "balance wins while the model is healthy",
            _INTEGRITY,
            "sensitivity * (threshold - pi)",
            "sensitivity * (pi - threshold)",
            ("integrity",),
        ),
        "router_learns_the_worst": Mutation(
            "cross-entropy with the most surprised expert",
            _LOSSES,
            "torch.where(counted, target, torch.inf).argmin(dim=-1, keepdim=True)",
            "torch.where(counted, target, -torch.inf).argmax(dim=-1, keepdim=True)",
            ("losses",),
        ),
        "router_likes_surprise": Mutation(
            "a router taught towards softmax(S) instead of softmax(-S)",
            _LOSSES,
            "_masked_softmax(-target, counted)",
            "_masked_softmax(target, counted)",
            ("losses",),
        ),
        "router_loss_summed": Mutation(
            "a lost normalisation: router losses summed over tokens",
            _LOSSES,
            ".sum() / tokens.sum().clamp_min(1)",
            ".sum()",
            ("losses",),
        ),
        "surprise_learns": Mutation(
            "a target that is not detached",
            _LOSSES,
            "torch.where(finite, surprise, 0).detach()",
            "torch.where(finite, surprise, 0)",
            ("losses",),
        ),
        "reborn_forget_all": Mutation(
            "rebirth that clears the optimizer state of those who live on",
            _LIFECYCLE,
            "torch.where(plan.reborn.view(-1, *(1,) * (state.ndim - 1)), 0, state)",
            "torch.zeros_like(state)",
            ("lifecycle", "train"),
        ),
        "donor_keeps_all": Mutation(
            "donor and reborn both write all of what the donor wrote",
            _LIFECYCLE,
            "moved.down * share",
            "moved.down",
            ("lifecycle",),
        ),
        "prune_the_used": Mutation(
            "pruning keeps the experts that were used least",
            _LIFECYCLE,
            "torch.sort(lifetime, descending=True, stable=True)",
            "torch.sort(lifetime, descending=False, stable=True)",
            ("lifecycle",),
        ),
    }
)
