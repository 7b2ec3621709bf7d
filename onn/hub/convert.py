"""Parameter trees of `onn.qwen3` as models of transformers and back, in the same memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import Qwen3Config as TransformersConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3RotaryEmbedding

import onn.functional as F
from onn import carve, check, qwen3, storage, tree, weights
from onn.config import to_dict
from onn.hub.model import OnnConfig, OnnForCausalLM
from onn.qwen3 import Layer, Mlp, Model, MoeConfig, Qwen3Config

_COMPUTED = ("attention_bias", "attention_dropout", "hidden_act", "layer_types", "rope_parameters")
"""Values of a transformers configuration that `onn.qwen3` computes one kind of."""


def architecture(config: PreTrainedConfig) -> Qwen3Config:
    """What a configuration of transformers says about a Qwen3, or one of its carved ones.

    Raises:
        ValueError: another architecture, or a value that `onn.qwen3` does not compute; the message names it.
    """
    if not isinstance(config, TransformersConfig):
        found = getattr(config, "model_type", type(config).__name__)
        raise ValueError(f"architecture: expected a configuration of Qwen3, got model_type={found!r}.")
    rope = (config.rope_parameters or {}).get("rope_theta")
    if not isinstance(rope, int | float):
        raise ValueError(
            f"architecture: expected rope_parameters with a number as rope_theta, got {config.rope_parameters!r}."
        )
    found = Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_theta=float(rope),
        rms_norm_eps=config.rms_norm_eps,
        initializer_range=config.initializer_range,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    computed = qwen3.transformers_config(found)
    for name in _COMPUTED:
        expected, value = getattr(computed, name), getattr(config, name)
        check.require(value == expected, f"architecture: only {name}={expected!r} is supported, found {value!r}.")
    return found


def to_module(model: Model, *, config: Qwen3Config, moe: MoeConfig) -> OnnForCausalLM:
    """A parameter tree as a model of transformers.

    Args:
        model: carved; layers may be dense as well.
        config: architecture.
        moe: routing of the carved layers.

    Returns:
        A model in evaluation mode whose parameters lie in the memory of the tree's leaves: what changes the one changes
        the other. Its logits are those of `onn.qwen3.forward`, bit for bit.

    Raises:
        ValueError: a layer is missing or of other shapes than the configuration says, or leaves differ in dtype or
            device.
    """
    tensors, dense_layers = checked("to_module", model, config=config, moe=moe)
    devices = sorted({str(leaf.device) for leaf in tensors.values()})
    check.require(len(devices) == 1, f"to_module: expected one device, got leaves on {', '.join(devices)}.")
    values = qwen3.transformers_config(config).to_dict()
    del values["model_type"]
    with torch.device("meta"):
        module: OnnForCausalLM = OnnForCausalLM(
            OnnConfig(**values | {"dtype": model.embedding.dtype}, moe=to_dict(moe), dense_layers=dense_layers)
        )
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = model.embedding
    module.load_state_dict(tensors, assign=True)
    module.tie_weights()
    module.model.rotary_emb = Qwen3RotaryEmbedding(module.config).to(model.embedding.device)
    module.eval()
    return module


def to_tree(module: nn.Module) -> Model:
    """The parameters of transformers' Qwen3, dense or carved, as a tree in the same memory.

    `architecture(module.config)` and, of a carved one, `module.config.moe_config()` are what `onn.qwen3.forward` needs
    beside it.

    Raises:
        ValueError: another kind of module, one whose layers are not those of its configuration, as with an adapter in
            them, or parameters of several dtypes.
    """
    if not isinstance(module, Qwen3ForCausalLM):
        raise ValueError(
            f"to_tree: expected a Qwen3ForCausalLM or OnnForCausalLM, got {type(module).__name__}; "
            f"adapters have to be merged first."
        )
    config, hub = architecture(module.config), module.config
    if isinstance(hub, OnnConfig):
        template = abstract(config, hub.moe_config(), dense_layers=hub.dense_layers or [])
    else:
        template = qwen3.abstract(config)
    parameters: Mapping[str, Tensor] = dict(module.named_parameters())
    check_leaves("to_tree", parameters, template)
    return tree.unflatten(template, [parameters[name].detach() for name in names(template)])


def abstract(config: Qwen3Config, moe: MoeConfig, *, dense_layers: list[int]) -> Model:
    """`onn.qwen3.abstract` of a model that is carved in all layers but some.

    Raises:
        ValueError: there is no such layer, or the MLP does not divide into so many experts.
    """
    for layer in dense_layers:
        check.between("abstract", "dense_layers", layer, 0, config.num_hidden_layers - 1)
    dense = qwen3.abstract(config)
    carved = carve.carve(dense, num_experts=moe.num_experts)
    layers = [(dense if index in dense_layers else carved).layers[index] for index in range(len(dense.layers))]
    return carved._replace(layers=tuple(layers))


def checked(where: str, model: Model, *, config: Qwen3Config, moe: MoeConfig) -> tuple[dict[str, Tensor], list[int]]:
    """The leaves of a carved model by their names in the module, and the layers that are dense.

    Raises:
        ValueError: the model is not what the configurations say.
    """
    qwen3.check_structure(where, model)
    for name, value, kind in (("config", config, Qwen3Config), ("moe", moe, MoeConfig)):
        found = f"{type(value).__module__}.{type(value).__name__}"
        check.require(isinstance(value, kind), f"{where}: expected {name} of onn.qwen3.{kind.__name__}, got {found}.")
    dense_layers = [index for index, layer in enumerate(model.layers) if isinstance(layer.mlp, Mlp)]
    check.require(
        len(model.layers) <= config.num_hidden_layers,
        f"{where}: the model has {len(model.layers)} layers, the configuration {config.num_hidden_layers}.",
    )
    tensors = dict(zip(names(model), tree.leaves(model), strict=True))
    check_leaves(where, tensors, abstract(config, moe, dense_layers=dense_layers))
    return tensors, dense_layers


def names(model: Model) -> list[str]:
    """The name in the module of every leaf of a tree: transformers' own, and the path in the tree for experts and
    routers.

    Raises:
        ValueError: it is no model.
    """
    qwen3.check_structure("names", model)

    def dense(layer: Layer) -> Layer:
        return layer._replace(mlp=Mlp(gate=layer.input_norm, up=layer.input_norm, down=layer.input_norm))

    skeleton = model._replace(layers=tuple(map(dense, model.layers)))
    stock = dict(zip(tree.paths(skeleton), weights.hub_names(skeleton), strict=True))
    return [stock.get(path, f"model.{path}") for path in tree.paths(model)]


def check_leaves(where: str, found: Mapping[str, Tensor], template: Model) -> None:
    """Raise `ValueError` unless named tensors are those of a template, all of one dtype; thresholds may be wider."""
    expected = dict(zip(names(template), tree.leaves(template), strict=True))
    storage.check_shapes(
        where,
        {name: tensor.shape for name, tensor in found.items()},
        {name: tensor.shape for name, tensor in expected.items()},
    )
    dtypes = {tensor.dtype: f"{tensor.dtype} ({name})" for name, tensor in found.items() if "thresholds" not in name}
    check.require(len(dtypes) == 1, f"{where}: expected one dtype, found {', '.join(dtypes.values())}.")
    (dtype,) = dtypes
    for name, tensor in found.items():
        check.holds(where, name, tensor, "float")
        check.require(
            tensor.dtype in (dtype, F.reduction_dtype(dtype)),
            f"{where}: {name}: expected {F.reduction_dtype(dtype)}, found {tensor.dtype}.",
        )
