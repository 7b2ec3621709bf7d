"""A carved Qwen3 as a model of transformers: its own Qwen3, with the expert bank in the place of the MLP.

Shape letters: B batch, S sequence, T = B S tokens, H hidden, E experts, I expert intermediate size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, Protocol, Self, cast

import torch
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers import initialization as init
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3Model, Qwen3PreTrainedModel

import onn.functional as F
from onn import check, qwen3, tree
from onn.config import Value, from_dict
from onn.functional.kernels.precision import as_given, autocasts
from onn.functional.transform import Taps
from onn.qwen3 import MAX_EXPERT_SIZE, MoeConfig

VERSION = 1
"""Of `config.json`, as far as it is this library's."""


def _plan_without_mlp(plan: Mapping[str, str]) -> dict[str, str]:
    return {name: how for name, how in plan.items() if ".mlp." not in name}


class OnnConfig(Qwen3Config):
    """transformers' configuration of Qwen3, and how the experts are cut, routed and taught."""

    model_type: ClassVar[str] = "onn"
    base_model_tp_plan: ClassVar[dict[str, str]] = _plan_without_mlp(Qwen3Config.base_model_tp_plan)

    moe: dict[str, Value] | None = None
    """Every value of `onn.qwen3.MoeConfig`, by name."""
    dense_layers: list[int] | None = None
    """Layers that keep their MLP; none by default."""
    onn_version: int = VERSION

    def __post_init__(self, **kwargs: object) -> None:
        """Refuse what is no Hyper-SMoE; without `moe`, as transformers makes some, that waits for a use."""
        super().__post_init__(**kwargs)
        self.dense_layers = sorted(self.dense_layers or [])
        check.require(
            self.onn_version == VERSION, f"OnnConfig: expected onn_version={VERSION}, got {self.onn_version!r}."
        )
        check.require(
            self.hidden_act == "silu", f"OnnConfig: only hidden_act='silu' is supported, found {self.hidden_act!r}."
        )
        for layer in self.dense_layers:
            check.between("OnnConfig", "dense_layers", layer, 0, self.num_hidden_layers - 1)
        if self.moe is None:
            return
        experts = self.moe_config().num_experts
        size, rest = divmod(self.intermediate_size, experts)
        check.require(
            rest == 0 and size <= MAX_EXPERT_SIZE,
            f"OnnConfig: intermediate_size={self.intermediate_size} does not divide into num_experts={experts} of at "
            f"most {MAX_EXPERT_SIZE} neurons.",
        )

    def moe_config(self) -> MoeConfig:
        """The values of `moe`, checked.

        Raises:
            ValueError: there are none, or one is unknown, missing or of another type.
        """
        if self.moe is None:
            raise ValueError(
                "OnnConfig: expected moe={...} with the values of onn.qwen3.MoeConfig, got none. A dense Qwen3 is no "
                "Onn model before it is carved: onn.hub.to_tree, onn.carve.carve, onn.hub.to_module."
            )
        return from_dict(MoeConfig, self.moe, where="OnnConfig: moe")


class OnnExperts(nn.Module):
    """The parameters of a bank; a call gives them, so that hooks which fetch the parameters of a module can do so."""

    def __init__(self, config: OnnConfig) -> None:
        """Uninitialised."""
        super().__init__()
        E = config.moe_config().num_experts
        shape = (E, config.intermediate_size // E, config.hidden_size)
        self.gate, self.up, self.down = (nn.Parameter(torch.empty(shape)) for _ in range(3))

    def forward(self) -> F.Experts:
        """[E, I, H] each."""
        return F.Experts(gate=self.gate, up=self.up, down=self.down)


class OnnRouter(nn.Module):
    """The parameters of a router, as `OnnExperts`."""

    def __init__(self, config: OnnConfig) -> None:
        """Uninitialised."""
        super().__init__()
        E = config.moe_config().num_experts
        self.prototypes = nn.Parameter(torch.empty(E, config.hidden_size))
        self.thresholds = nn.Parameter(torch.empty(E, dtype=F.reduction_dtype(torch.get_default_dtype())))

    def forward(self) -> F.Router:
        """[E, H], and [E] in float32 (float64 for float64 models)."""
        return F.Router(prototypes=self.prototypes, thresholds=self.thresholds)


class OnnMoe(nn.Module):
    """What stands in the place of an MLP: `onn.qwen3.moe_forward` on parameters of its own."""

    def __init__(self, config: OnnConfig) -> None:
        """Uninitialised."""
        super().__init__()
        self.config = config.moe_config()
        self.experts = OnnExperts(config)
        self.router = OnnRouter(config)
        self.taps: Mapping[str, Tensor] = {}

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, S, H] to [B, S, H]; under autocast in its dtype, as the linear layers beside it."""
        moe = qwen3.Moe(experts=self.experts(), router=self.router())
        x, device = hidden_states.flatten(0, 1), hidden_states.device
        if autocasts(device):
            dtype = torch.get_autocast_dtype(device.type)
            narrow = tree.map1(lambda leaf: leaf.to(dtype), (*moe.experts, moe.router.prototypes))
            moe = qwen3.Moe(F.Experts(*narrow[:3]), moe.router._replace(prototypes=narrow[3]))
            x = x.to(dtype)
        with as_given(device):
            y, _ = qwen3.moe_forward(moe, x, self.taps, config=self.config)
        return y.view_as(hidden_states)


class _Load(Protocol):
    def __call__(self, *args: object, **kwargs: object) -> object: ...


class _OnnPreTrainedModel(Qwen3PreTrainedModel):
    config: OnnConfig
    config_class = OnnConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OnnExperts):
            for weight in module.parameters():
                init.normal_(weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, OnnRouter):
            init.normal_(module.prototypes, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.thresholds)

    @classmethod
    def from_pretrained(cls, *args: object, output_loading_info: bool = False, **kwargs: object) -> Self:
        """As in transformers, except that a checkpoint which is not whole is an error.

        Raises:
            ValueError: a tensor is missing, or not expected.
        """
        loaded = cast("_Load", super().from_pretrained)(*args, output_loading_info=True, **kwargs)
        model, info = cast("tuple[Self, Mapping[str, object]]", loaded)
        for kind in ("missing", "unexpected"):
            names = sorted(cast("set[str]", info[f"{kind}_keys"]))
            check.require(
                not names,
                f"{cls.__name__}.from_pretrained: {len(names)} {kind} of the tensors in {model.name_or_path}, "
                f"such as {', '.join(names[:3])}.",
            )
        return cast("Self", loaded) if output_loading_info else model


class OnnModel(_OnnPreTrainedModel, Qwen3Model):
    """transformers' Qwen3 without its head, carved."""

    def __init__(self, config: OnnConfig) -> None:
        """Random parameters; every threshold at 0, where about half of the experts are open."""
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            if index not in (config.dense_layers or ()):
                layer.mlp = OnnMoe(config)
        self.post_init()


class OnnForCausalLM(_OnnPreTrainedModel, Qwen3ForCausalLM):
    """transformers' Qwen3 language model, carved: everything else, `generate` included, is inherited."""

    def __init__(self, config: OnnConfig) -> None:
        """Random parameters; every threshold at 0, where about half of the experts are open."""
        super(Qwen3ForCausalLM, self).__init__(config)
        self.model = OnnModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


@contextmanager
def tapped(model: nn.Module, *, names: tuple[F.TapName, ...], tokens: int) -> Iterator[Taps]:
    """Measure within the block: after a backward pass the `grad` of each tap is what its name says.

    Args:
        model: with `OnnMoe` layers.
        names: see `onn.functional.zero_taps`.
        tokens: T = B S of the one forward pass in the block.

    Yields:
        One mapping for each carved layer, in order, of leaves that require a gradient.

    Raises:
        ValueError: the model has no such layer, or is being measured already; or as of `onn.functional.zero_taps`.
    """
    check.require(isinstance(model, nn.Module), f"tapped: expected a module as the model, got {type(model).__name__}.")
    layers = [module for module in model.modules() if isinstance(module, OnnMoe)]
    check.require(bool(layers), f"tapped: the model, {type(model).__name__}, has no OnnMoe layer to measure.")
    check.require(not any(layer.taps for layer in layers), "tapped: the model is being measured already.")
    taps: list[Mapping[str, Tensor]] = []
    for layer in layers:
        zeros = F.zero_taps(names, tokens=tokens, experts=layer.experts())
        taps.append({name: zero.requires_grad_() for name, zero in zeros.items()})
    try:
        for layer, tap in zip(layers, taps, strict=True):
            layer.taps = tap
        yield tuple(taps)
    finally:
        for layer in layers:
            layer.taps = {}
