"""Carved models with a top-k router as stock Qwen3-MoE checkpoints of transformers.

On disk every expert has three matrices of its own, in the layout of `torch.nn.Linear`; transformers fuses them as it
loads.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import Tensor
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

from onn import check, qwen3, storage
from onn.hub.convert import checked
from onn.qwen3 import Model, Moe, MoeConfig, Qwen3Config
from onn.weights import CONFIG_FILE, MODEL_FILE

_ARCHITECTURE = "Qwen3MoeForCausalLM"


def export_qwen3_moe(model: Model, folder: Path, *, config: Qwen3Config, moe: MoeConfig) -> None:
    """Write `config.json` and `model.safetensors` that `Qwen3MoeForCausalLM.from_pretrained(folder)` loads.

    It gives the same logits, up to the order in which the experts of a token are summed; of float64 models it rounds
    the combine weights to float32.

    Args:
        model: carved; layers may be dense as well.
        folder: made if it is not there; files of these names are replaced.
        config: architecture.
        moe: routing of the carved layers. What `top_k` does not use is lost.

    Raises:
        ValueError: another route than `top_k`, a model of another architecture, of several dtypes, or on `meta`.
    """
    found, dense_layers = checked("export_qwen3_moe", model, config=config, moe=moe)
    check.require(
        moe.route == "top_k",
        f"export_qwen3_moe: expected route='top_k', got {moe.route!r}; Qwen3-MoE has no thresholds. "
        f"onn.hub.to_module(...).save_pretrained keeps them.",
    )
    meta = [name for name, tensor in found.items() if tensor.is_meta]
    check.require(not meta, f"export_qwen3_moe: {len(meta)} tensors have no values, such as {', '.join(meta[:3])}.")
    tensors = {name: tensor for name, tensor in found.items() if ".mlp.experts." not in name and ".router." not in name}
    for index, layer in enumerate(model.layers):
        if isinstance(layer.mlp, Moe):
            tensors |= {f"model.layers.{index}.mlp.{name}.weight": leaf for name, leaf in _stock(layer.mlp).items()}
    reference = qwen3.transformers_config(config)
    shared = {field.name for field in dataclasses.fields(Qwen3Config)} - {"rope_theta"} | {"rope_parameters"}
    stock = Qwen3MoeConfig(
        **{name: getattr(reference, name) for name in sorted(shared)},
        num_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k,
        norm_topk_prob=moe.normalise,
        moe_intermediate_size=config.intermediate_size // moe.num_experts,
        decoder_sparse_step=1,
        mlp_only_layers=dense_layers,
        architectures=[_ARCHITECTURE],
        dtype=model.embedding.dtype,
    )
    folder.mkdir(parents=True, exist_ok=True)
    storage.write(tensors, folder / MODEL_FILE, {"format": "pt"})
    (folder / CONFIG_FILE).write_text(stock.to_json_string(), encoding="utf-8")


def _stock(moe: Moe) -> dict[str, Tensor]:
    """The tensors of a carved layer under the names of Qwen3-MoE."""
    named = {"gate": moe.router.prototypes}
    for index, (gate, up, down) in enumerate(zip(*(weight.unbind(0) for weight in moe.experts), strict=True)):
        named[f"experts.{index}.gate_proj"] = gate
        named[f"experts.{index}.up_proj"] = up
        named[f"experts.{index}.down_proj"] = down.mT
    return named
