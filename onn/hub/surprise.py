"""Exact surprise of every stock mixture-of-experts model, whatever computes its experts.

Shape letters: B batch, S sequence, T = B S tokens, K experts of a token, H hidden, E experts, I expert intermediate
size, P pre-activations of an expert (2I with a gate, I without).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import linear

import onn.functional as F
from onn import check
from onn.hub.experts import StockExperts, dense_weights, is_stock


class LayerSurprise(NamedTuple):
    """What one layer's experts were surprised by, each [T, E]; token `t` is position `t % S` of row `t // S`."""

    surprise: Tensor
    """0 where not active; float32 (float64 for float64 experts)."""
    active: Tensor
    """bool: routed and of non-zero weight."""
    weights: Tensor
    """Combine weights, in the dtype of the experts."""


class ModelSurprise(NamedTuple):
    """What one forward and backward pass of a model tells of its experts."""

    loss: Tensor
    """The loss that the model returned, detached."""
    layers: dict[str, LayerSurprise]
    """By the name of the experts' module, such as `model.layers.0.mlp.experts`, in the order in which they ran."""


class _Matrices(NamedTuple):
    """The parameters of a layer's experts as they were in the forward pass."""

    inner: Tensor
    """[E, P, H]"""
    inner_bias: Tensor | None
    """[E, P]"""
    outer: Tensor
    """[E, H, I]"""


class _Call(NamedTuple):
    """One call of a layer's experts."""

    x: Tensor
    """[T, H]"""
    chosen: Tensor
    """[T, K]"""
    weights: Tensor
    """[T, K]"""
    matrices: _Matrices
    y: Tensor
    """[T, H], in the graph of the loss."""


def surprise(model: nn.Module, batch: Mapping[str, object]) -> ModelSurprise:
    """The parameter surprise of every (token, expert) pair of every layer, from one forward and one backward pass.

    Args:
        model: any model whose experts stand under transformers' experts interface, with whatever implementation.
        batch: what the model takes, by name, `labels` included.

    Returns:
        `ModelSurprise`: of the loss that the model returns. transformers' language models return the mean over counted
        targets; times their number it is the surprise of the summed loss, which `onn.train` measures. Layers that the
        pass did not run are left out.

    Guarantees:
        Exact: each entry is the norm of the gradient that this token position would give an untied copy of this
        expert's parameters (biases included), with everything between the layer and the loss taken into account.

        Nothing stays on the model, even after an error: no hook, gradient, mode or setting changes; what requires no
        gradient is measured all the same, and what is compiled runs eagerly. Gradients of parameters are not computed,
        except inside implementations that always do (`onn`). A model in training mode draws its dropout as ever.

    Raises:
        ValueError: no such experts; experts that are sharded, offloaded, quantised, normed (`has_post_expert_norm`) or
            called twice; reentrant gradient checkpointing; a model that returned no scalar loss; tokens that are no
            integers [B, S], or on a CPU ids that the model does not know. What else a model raises passes through.
    """
    _check_given(model, batch)
    banks = {name: module for name, module in model.named_modules() if is_stock(module)}
    check.require(
        bool(banks),
        f"surprise: {type(model).__name__} has no mixture-of-experts layer under transformers' experts interface.",
    )
    recorder = _Recorder()
    with (
        recorder.listening(banks),
        torch.compiler.set_stance("force_eager"),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        loss = _loss_of(model, batch)
        recorder.closed = True
        calls = recorder.calls
        check.require(bool(calls), f"surprise: {type(model).__name__} ran none of its experts: {', '.join(banks)}.")
        grads = torch.autograd.grad(loss, [call.y for call in calls.values()], materialize_grads=True)
        layers = {name: _layer_surprise(banks[name], calls[name], dy) for name, dy in zip(calls, grads, strict=True)}
    return ModelSurprise(loss=loss.detach(), layers=layers)


def _check_given(model: nn.Module, batch: Mapping[str, object]) -> None:
    found = f"model {type(model).__name__} and batch {type(batch).__name__}"
    kinds = isinstance(model, nn.Module) and isinstance(batch, Mapping)
    check.require(kinds, f"surprise: expected a module and a mapping of its arguments, got {found}.")
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        check.require(not value.is_meta, f"surprise: {name} of the batch is on meta: expected values.")
    ids, labels = (tensors.get(name) for name in ("input_ids", "labels"))
    if ids is None:
        return
    check.shapes("surprise", ("input_ids", ids, "integer B S"))
    check.require(ids.numel() > 0, f"surprise: input_ids {list(ids.shape)} are none.")
    if labels is not None and labels.shape == ids.shape:
        check.holds("surprise", "labels", labels, "integer")


def _loss_of(model: nn.Module, batch: Mapping[str, object]) -> Tensor:
    try:
        loss = getattr(model(**batch), "loss", None)
    except IndexError as error:  # on a CPU, which looks before it reads
        raise ValueError(
            f"surprise: an id in the batch ({', '.join(batch)}) is unknown to the model: {error}."
        ) from error
    if not isinstance(loss, Tensor) or loss.ndim:
        raise ValueError(
            f"surprise: {type(model).__name__} returned no scalar loss for a batch of {', '.join(batch)}; "
            "give it labels, and leave return_dict on."
        )
    return loss


class _Recorder:
    """Notes one call of every layer's experts, and makes its output a tensor to differentiate with respect to."""

    def __init__(self) -> None:
        self.calls: dict[str, _Call] = {}
        self.closed = False

    @contextmanager
    def listening(self, banks: Mapping[str, StockExperts]) -> Iterator[None]:
        """Hooks on the experts, removed at the end."""
        handles = [
            module.register_forward_hook(partial(self._hear, name), with_kwargs=True) for name, module in banks.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hear(
        self, name: str, module: StockExperts, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], y: Tensor
    ) -> Tensor:
        """Gradient checkpointing runs a layer once more in the backward pass: the same happens to it, unnoted."""
        check.require(
            torch.is_grad_enabled(),
            f"surprise: {name} ran without gradients; gradient checkpointing needs use_reentrant=False.",
        )
        y = y if y.requires_grad else y.detach().requires_grad_()
        if not self.closed:
            check.require(name not in self.calls, f"surprise: {name} ran twice; its surprise would be a mixture.")
            given = {**dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)), **kwargs}
            x, chosen, weights = (given[key].detach() for key in ("hidden_states", "top_k_index", "top_k_weights"))
            check.shapes("surprise", ("hidden_states", x, "T H"), ("top_k_index", chosen, "T K"), ("output", y, "T H"))
            matrices = _matrices(name, module)
            self.calls[name] = _Call(x=x, chosen=chosen, weights=weights, matrices=matrices, y=y)
        return y.clone()


def _matrices(name: str, module: StockExperts) -> _Matrices:
    """The experts' parameters as [E, out, in], whatever the layout: views."""
    for setting in ("has_post_expert_norm", "_is_expert_parallel"):
        check.require(
            not getattr(module, setting, False), f"surprise: {name} has {setting}=True, which is not covered."
        )
    stem = "gate_up_proj" if module.has_gate else "up_proj"
    inner, outer = getattr(module, stem).detach(), module.down_proj.detach()
    check.require(not inner.is_meta, f"surprise: {name} is offloaded; its parameters are on meta.")
    known = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    check.require(inner.dtype in known and inner.ndim == 3, f"surprise: {name} is quantised: {stem} is {inner.dtype}.")
    if module.is_transposed:
        inner, outer = inner.mT, outer.mT
    bias = getattr(module, f"{stem}_bias").detach() if module.has_bias else None
    return _Matrices(inner=inner, inner_bias=bias, outer=outer)


@torch.no_grad()
def _layer_surprise(module: StockExperts, call: _Call, dy: Tensor) -> LayerSurprise:
    """The pairs of each expert in turn: what the forward pass computed of them, once more."""
    inner, bias, outer = call.matrices
    E, dtype = len(inner), inner.dtype
    weights = dense_weights(call.chosen, call.weights, num_experts=E, dtype=dtype)
    active = weights != 0
    expert, token = active.mT.nonzero(as_tuple=True)
    counts = torch.bincount(expert, minlength=E).tolist()
    with torch.autocast(dy.device.type, enabled=False):
        x, dy = call.x.to(dtype), dy.to(dtype)
        units = [
            _unit_surprise(module, x[rows], dy[rows], inner[e], None if bias is None else bias[e], outer[e])
            for e, rows in enumerate(token.split(counts))
        ]
    pairs = torch.cat(units)
    surprise = pairs.new_zeros(weights.shape)
    surprise[token, expert] = pairs * weights[token, expert].abs().to(pairs.dtype)
    return LayerSurprise(surprise=surprise, active=active, weights=weights)


def _unit_surprise(
    module: StockExperts, x: Tensor, dy: Tensor, inner: Tensor, bias: Tensor | None, outer: Tensor
) -> Tensor:
    """The surprise of one expert at combine weight 1 [N], through whatever activation and gate the model has.

    `S^2 = ||c||^2 ||x||^2 + ||a||^2 ||g||^2` with `c` the gradient of the pre-activations and `a` the activation, as in
    `onn.functional.counterfactual_surprise`; a bias is a weight whose input is 1.
    """
    with torch.enable_grad():
        h = linear(x, inner, bias).requires_grad_()
        a = module._apply_gate(h) if module.has_gate else module.act_fn(h)
    (c,) = torch.autograd.grad(a, h, dy @ outer)
    norm = partial(vector_norm, dim=-1, dtype=F.reduction_dtype(x.dtype))
    one = torch.tensor(0.0 if bias is None else 1.0, device=x.device, dtype=F.reduction_dtype(x.dtype))
    return torch.hypot(norm(c) * torch.hypot(norm(x), one), norm(dy) * torch.hypot(norm(a), one))
