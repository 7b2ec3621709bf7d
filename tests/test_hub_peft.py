from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from onn import tree
from onn.hub import to_tree
from onn.qwen3 import MoeConfig
from tests.hub import SELECTIVE, TOP_K, Tiny, generated, make_tiny, prompts
from tests.support import assert_close, assert_same
from tests.test_qwen3 import config

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
ROUTES = pytest.mark.parametrize("moe", [SELECTIVE, TOP_K], ids=["threshold", "top_k"])


def adapted(tiny: Tiny) -> PeftModel:
    """LoRA on the attention; the second matrices start at zero, as in the paper."""
    settings = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(tiny.module(), settings)


def taught(model: PeftModel, tokens: Tensor, *, steps: int = 3) -> list[float]:
    """Plain gradient descent on the adapters; the losses before each step."""
    losses = []
    model.train()
    for _ in range(steps):
        model.zero_grad()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.3)
    model.eval()
    return losses


@ROUTES
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_adapters_learn(moe: MoeConfig, checkpointing: bool) -> None:
    tiny = make_tiny(config(), moe, dtype=torch.float64)
    before, tokens = tree.map1(Tensor.clone, tiny.model), prompts(tiny, 2, 6)
    model = adapted(tiny)
    with torch.no_grad():
        assert_close(model(input_ids=tokens).logits, tiny.logits(tokens), bound=1e-10)
    if checkpointing:
        model.gradient_checkpointing_enable()
    losses = taught(model, tokens)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}
    assert_same(tiny.model, before)


@ROUTES
def test_a_merged_model_is_a_tree_that_computes_what_the_adapted_one_did(moe: MoeConfig) -> None:
    tiny = make_tiny(config(), moe, dtype=torch.float64)
    model, tokens = adapted(tiny), prompts(tiny, 2, 6)
    taught(model, tokens)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    assert not torch.allclose(expected, tiny.logits(tokens))
    with pytest.raises(ValueError, match=r"got PeftModelForCausalLM; adapters have to be merged first"):
        to_tree(model)
    with pytest.raises(ValueError, match=r"to_tree: model\.layers\.0\.self_attn\.q_proj\.weight .* is missing"):
        to_tree(model.get_base_model())
    merged = model.merge_and_unload()
    assert_close(tiny._replace(model=to_tree(merged)).logits(tokens), expected, bound=1e-10)


def test_adapters_are_saved_without_the_model_and_read_onto_it_again(tmp_path: Path) -> None:
    tiny = make_tiny(config(), SELECTIVE)
    model, tokens = adapted(tiny), prompts(tiny, 2, 6)
    taught(model, tokens)
    model.save_pretrained(str(tmp_path))
    assert not (tmp_path / "model.safetensors").exists()
    again = PeftModel.from_pretrained(tiny.module(), tmp_path)
    with torch.no_grad():
        assert_same(again(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert generated(again, tokens, length=4).shape == (2, 10)
