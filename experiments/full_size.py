"""Does the real size fit? Verify, load, carve, train, save, restore, generate: seconds and peak memory of each part.

`uv run experiments/make_checkpoint.py DIR` (or the real checkpoint in DIR), then
`uv run experiments/full_size.py --checkpoint DIR --manifest DIR/weights_manifest.toml --out RUN`: minutes on two CPU
cores, and 5 GB on the disk. Expected: a peak below 12 GiB, and a load below 1.3 times the size of the file.
`experiments/LOG.md` has the figures of the last measurement.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import tyro

from experiments import noise, presets
from experiments.command import exit_status
from experiments.evaluate import generate
from experiments.memory import Meter, peak_gib, return_large_blocks
from experiments.pipeline import run
from experiments.presets import QWEN3_06B, RunConfig
from onn import carve, check, qwen3, weights


def small_share(config: RunConfig, *, steps: int, length: int) -> RunConfig:
    """The same model and method for a few steps on little text."""
    return replace(
        config,
        data=replace(config.data, batch_size=1, sequence_length=length, eval_windows=1, bytes_per_domain=100_000),
        train=replace(config.train, steps=steps),
        sample=replace(config.sample, prompt_tokens=8, new_tokens=4),
    )


def measure(config: RunConfig, out: Path) -> Mapping[str, Meter]:
    """Load the checkpoint by itself, carry out the run in `out`, and write text with the model that it saved.

    Returns:
        What each of the three cost; peaks are those of the process so far.

    Raises:
        ValueError: the model restored is not a model, or whatever the run refuses.
    """
    return_large_blocks()
    meters = {name: Meter() for name in ("load", "run", "again")}
    with meters["load"].part("start"):
        manifest = weights.read_manifest(config.checkpoint.manifest, config.checkpoint.name)
        folder = weights.find(config.checkpoint.folder, manifest)
    with meters["load"].part("verify"):
        weights.verify(folder, manifest)
    with meters["load"].part("load"):
        weights.load(folder, config=config.model)
    summary = run(config, out)
    for name, costs in (("seconds", meters["run"].seconds), ("peak_memory_gib", meters["run"].peak_gib)):
        found = summary[name]
        assert isinstance(found, Mapping)
        costs.update({part: float(str(value)) for part, value in found.items()})
    with meters["again"].part("restore"):
        template = carve.carve(qwen3.abstract(config.model), num_experts=config.sparse.moe.num_experts)
        model = weights.restore(out / "moe.safetensors", like=template)
    with meters["again"].part("generate"):
        uniform = torch.rand(config.sample.new_tokens, config.model.vocab_size, generator=noise.generator(config.seed))
        settings = presets.step_config(config, phase="moe")
        prompt = torch.arange(config.sample.prompt_tokens)
        written = generate(model, prompt, uniform, temperature=config.sample.temperature, config=settings)
    check.require(
        len(written) == len(prompt) + len(uniform), f"full_size: expected {len(uniform)} new tokens, got {written}."
    )
    return meters


def table(meters: Mapping[str, Meter]) -> str:
    """One line for each part: its seconds, and the peak in GiB when it ended."""
    rows = [("part", "seconds", "peak GiB")]
    for name, meter in meters.items():
        rows += [
            (f"{name}: {part}", f"{seconds:.1f}", f"{meter.peak_gib[part]:.2f}" if part in meter.peak_gib else "")
            for part, seconds in meter.seconds.items()
        ]
    return "\n".join(f"{part:<20} {seconds:>9} {peak:>9}" for part, seconds, peak in rows)


def main(checkpoint: Path, manifest: Path, out: Path, steps: int = 2, length: int = 128) -> None:
    """Try the full size with a checkpoint on disk, and say what it took."""
    config = replace(QWEN3_06B, checkpoint=replace(QWEN3_06B.checkpoint, folder=checkpoint, manifest=manifest))
    meters = measure(small_share(config, steps=steps, length=length), out)
    folder = weights.find(checkpoint, weights.read_manifest(manifest, QWEN3_06B.preset))
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    load = meters["load"].peak_gib
    print(table(meters))
    print(f"load: {load['load'] - load['start']:.2f} GiB more than before, the file has {stored / 2**30:.2f} GiB")
    print(f"peak: {peak_gib():.2f} GiB")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: tyro.cli(main)))
