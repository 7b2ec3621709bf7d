"""The library inside transformers: models, experts and surprise under its interfaces; importing it registers them."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from onn.hub.convert import architecture as architecture
from onn.hub.convert import to_module as to_module
from onn.hub.convert import to_tree as to_tree
from onn.hub.experts import (
    IMPLEMENTATION as IMPLEMENTATION,
)
from onn.hub.export import export_qwen3_moe as export_qwen3_moe
from onn.hub.model import OnnConfig as OnnConfig
from onn.hub.model import OnnForCausalLM as OnnForCausalLM
from onn.hub.model import OnnModel as OnnModel
from onn.hub.model import tapped as tapped
from onn.hub.surprise import (
    LayerSurprise as LayerSurprise,
)
from onn.hub.surprise import (
    ModelSurprise as ModelSurprise,
)
from onn.hub.surprise import (
    surprise as surprise,
)

AutoConfig.register(OnnConfig.model_type, OnnConfig, exist_ok=True)
AutoModel.register(OnnConfig, OnnModel, exist_ok=True)
AutoModelForCausalLM.register(OnnConfig, OnnForCausalLM, exist_ok=True)
