from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from onn import tree
from onn.hub import OnnForCausalLM, to_tree
from onn.qwen3 import Model, MoeConfig
from tests.hub import SELECTIVE, TOP_K, Tiny, make_tiny, prompts
from tests.support import assert_same, relative_error, tolerance
from tests.test_qwen3 import config

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]
ROUTES = pytest.mark.parametrize("moe", [SELECTIVE, TOP_K], ids=["threshold", "top_k"])


class Texts(Dataset[dict[str, Tensor]]):
    """The same text again and again, which is soon learnt."""

    def __init__(self, tiny: Tiny) -> None:
        self.text = prompts(tiny, 12)

    def __len__(self) -> int:
        return 32

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return {"input_ids": self.text, "labels": self.text}


def trained(
    tiny: Tiny, folder: Path, *, steps: int = 2, checkpointing: bool = False, bf16: bool = False
) -> tuple[OnnForCausalLM, list[float]]:
    """By transformers' own trainer; the model and the loss of every step."""
    logging.set_verbosity_error()
    module = tiny.module()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=bf16,
        gradient_checkpointing=checkpointing,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=module, args=arguments, train_dataset=Texts(tiny))
    trainer.train()
    return module, [float(record["loss"]) for record in trainer.state.log_history if "loss" in record]


def copied(tiny: Tiny) -> Tiny:
    """In memory of its own: training changes the tree of a module."""
    return tiny._replace(model=tree.map1(Tensor.clone, tiny.model))


@ROUTES
def test_the_trainer_of_transformers_lowers_the_loss_and_reaches_every_kind_of_parameter(
    moe: MoeConfig, tmp_path: Path
) -> None:
    tiny = make_tiny(config(), moe)
    module, losses = trained(copied(tiny), tmp_path, steps=3)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1
    before, after = (dict(zip(tree.paths(m), tree.leaves(m), strict=True)) for m in (tiny.model, to_tree(module)))
    still = {path for path in before if torch.equal(before[path], after[path])}
    unused = {"layers.0.mlp.router.thresholds", "layers.1.mlp.router.thresholds"}
    assert still == (unused if moe.route == "top_k" else set())


def test_checkpointing_trains_to_the_same_bits(tmp_path: Path) -> None:
    tiny = make_tiny(config(), SELECTIVE)
    results: list[Model] = []
    for checkpointing in (False, True):
        module, _ = trained(copied(tiny), tmp_path / str(checkpointing), checkpointing=checkpointing)
        assert module.is_gradient_checkpointing == checkpointing
        results.append(to_tree(module))
    assert_same(*results)


@ROUTES
def test_mixed_precision_follows_the_losses_of_single_precision(moe: MoeConfig, tmp_path: Path) -> None:
    tiny = make_tiny(config(), moe)
    _, wide = trained(copied(tiny), tmp_path / "wide")
    module, mixed = trained(copied(tiny), tmp_path / "mixed", bf16=True)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert mixed[1] < mixed[0]
    first = torch.tensor(wide[0]), torch.tensor(mixed[0])
    assert relative_error(first[1], first[0]) <= tolerance(torch.bfloat16, terms=20 * 2)


def test_a_training_checkpoint_is_read_again(tmp_path: Path) -> None:
    tiny = make_tiny(config(), SELECTIVE)
    module, _ = trained(copied(tiny), tmp_path / "run")
    module.save_pretrained(tmp_path / "model")
    assert_same(to_tree(OnnForCausalLM.from_pretrained(tmp_path / "model")), to_tree(module))
