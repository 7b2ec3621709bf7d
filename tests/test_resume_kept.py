"""Weights and checkpoints as every version so far has written them. Never change `tests/kept`; add the next to it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from experiments import noise, presets
from experiments.keeping import Generators, Keeper, Position
from experiments.memory import Meter
from onn import carve, checkpoint, data, qwen3, train, tree, weights
from tests.checkpoints import assert_same_bits

KEPT = Path(__file__).parent / "kept"


@pytest.mark.parametrize("name", sorted(path.name for path in KEPT.glob("run-v*")))
def test_a_run_kept_by_an_earlier_version_still_loads_and_goes_on(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(KEPT / name, tmp_path / name)
    config = presets.load(presets.read(folder / "config.json"), where=name)
    abstract = qwen3.abstract(config.model)
    like = carve.carve(
        tree.map1(lambda leaf: leaf.to(torch.bfloat16), abstract), num_experts=config.sparse.moe.num_experts
    )
    model = weights.restore(folder / "moe.safetensors", like=like)
    sources = [noise.generator(seed) for seed in (0, 0)]
    generators = Generators(*(source.get_state() for source in sources))
    kept = Keeper(folder, config, {"corpus_fingerprint": "kept"}, Meter()).state("moe", like, generators)
    assert kept is not None
    assert_same_bits(kept.state.model, model)
    assert kept.position == Position(step=2, records=2, skipped=0)
    assert int(kept.state.step) == 2
    assert int(kept.state.lifetime[0].sum()) == int(kept.state.usage[0].active.sum()) > 0
    for source, state in zip(sources, kept.generators, strict=True):
        source.set_state(state)
    tokens = torch.randint(config.model.vocab_size, (2, 9), generator=sources[0])
    batch = data.Batch(
        tokens[:, :-1], tokens[:, 1:], torch.ones(2, 8, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    )
    bits = noise.rounding_bits(model, sources[0])
    after, metrics = train.step(kept.state, batch, bits, presets.step_config(config, phase="moe"))
    assert not bool(metrics.skipped)
    assert int(after.step) == 3


def test_this_version_has_kept_a_run() -> None:
    """Fails when `VERSION` or the format of checkpoints is raised: keep a run of the new one."""
    folder = KEPT / f"run-v{presets.VERSION}"
    found = checkpoint.verify(folder / "checkpoints" / "moe-000002")
    assert presets.save(presets.load(presets.read(folder / "config.json"), where="kept")) == found.facts["config"]
