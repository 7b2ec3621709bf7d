"""The likeliest mistakes above `onn.functional`: training, carving, data, weights, transformers and the main job."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from experiments.mutants import Mutation

ABOVE: Mapping[str, Mutation] = MappingProxyType(
    {
        "surprise_of_the_mean": Mutation(
            "a lost normalisation: surprise that shrinks as the batch grows",
            "onn/objective.py",
            "value * (total**2 if name in _SQUARES else total)",
            "value",
            ("numerics_objective", "train"),
        ),
        "neuron_scaled_once": Mutation(
            "squared surprise scaled as if it were not squared",
            "onn/objective.py",
            "(total**2 if name in _SQUARES else total)",
            "total",
            ("numerics_objective",),
        ),
        "masked_targets_count": Mutation(
            "targets that do not count in the loss all the same",
            "onn/objective.py",
            "(values * counted).sum() / counted.sum().clamp_min(1)",
            "values.float().mean()",
            ("train",),
        ),
        "distillation_temperature": Mutation(
            "a divergence whose gradient fades with the temperature",
            "onn/objective.py",
            "return temperature**2 * kl_div(",
            "return kl_div(",
            ("distillation",),
        ),
        "routers_never_taught": Mutation(
            "what the routers shall learn is computed and thrown away",
            "onn/train.py",
            "lambda g, own: g + own / len(seen)",
            "lambda g, own: g",
            ("train",),
        ),
        "masked_experts_step": Mutation(
            "unmasked optimizer state: experts without a gradient take part in the step",
            "onn/grain.py",
            "norm != 0 for norm in mlp.experts",
            "norm >= 0 for norm in mlp.experts",
            ("train",),
        ),
        "poison_learnt": Mutation(
            "a step that is not finite is taken",
            "onn/train.py",
            "finite = torch.isfinite(total) & torch.isfinite(norm)",
            "finite = torch.ones_like(total, dtype=torch.bool)",
            ("train",),
        ),
        "controller_sign": Mutation(
            "thresholds moved away from the target",
            "onn/train.py",
            "thresholds + config.density.gain * shift",
            "thresholds - config.density.gain * shift",
            ("train",),
        ),
        "reborn_remember": Mutation(
            "rebirth without a new start for the optimizer",
            "onn/train.py",
            "F.forget_reborn(leaf, plan) if leaf.ndim else leaf",
            "leaf",
            ("train",),
        ),
        "bias_correction_lost": Mutation(
            "AdamW without the bias correction of the mean",
            "onn/optim.py",
            "lr * (moved_mean / mean_bias) / root",
            "lr * moved_mean / root",
            ("optim",),
        ),
        "masked_momentum": Mutation(
            "entries that are masked gather momentum",
            "onn/optim.py",
            "torch.where(learns, moved_mean, mean)",
            "moved_mean",
            ("optim",),
        ),
        "masked_decay": Mutation(
            "entries that are masked decay",
            "onn/optim.py",
            "torch.where(learns, moved, p)",
            "torch.where(learns, moved, (p * decay).to(p.dtype))",
            ("optim",),
        ),
        "vectors_decay": Mutation(
            "norms and biases decay as well",
            "onn/optim.py",
            "if p.ndim >= 2 else",
            "if p.ndim >= 1 else",
            ("optim",),
        ),
        "importance_of_the_batch_alone": Mutation(
            "consolidation that forgets what a neuron has met",
            "onn/optim.py",
            "met = importance + squares",
            "met = squares",
            ("optim_consolidation",),
        ),
        "hardened_without_learning": Mutation(
            "importance of experts that did not learn grows all the same",
            "onn/train.py",
            "torch.where(may.experts.gate[..., 0], after, before)",
            "torch.where(may.experts.gate[..., 0], after, after)",
            ("train_consolidation",),
        ),
        "rounding_biased": Mutation(
            "stochastic rounding that rounds down too often",
            "onn/rounding.py",
            "bits.to(torch.int32) & 0xFFFF",
            "bits.to(torch.int32) & 0x7FFF",
            ("optim",),
        ),
        "clipping_scales_up": Mutation(
            "small gradients scaled up to the largest norm",
            "onn/optim.py",
            "norm.clamp_min(max_norm)",
            "norm",
            ("optim",),
        ),
        "carve_transposed": Mutation(
            "`down` reshaped where it should be transposed",
            "onn/carve.py",
            "(num_experts, size)) for w in (mlp.gate, mlp.up, mlp.down.mT)",
            "(num_experts, size)) for w in (mlp.gate, mlp.up, mlp.down.reshape(mlp.gate.shape))",
            ("carve",),
        ),
        "targets_off_by_one": Mutation(
            "every token is its own target",
            "onn/data.py",
            "cut[:, 1:].contiguous()",
            "cut[:, :-1].contiguous()",
            ("data",),
        ),
        "mask_off_by_one": Mutation(
            "the mask of the tokens instead of the targets",
            "onn/data.py",
            "places[:, 1:].flatten()",
            "places[:, :-1].flatten()",
            ("data",),
        ),
        "end_not_learnt": Mutation(
            "an assistant that never learns to stop",
            "onn/documents.py",
            "_Piece(END, special=True, learn=learn)",
            "_Piece(END, special=True, learn=False)",
            ("documents",),
        ),
        "checksum_not_verified": Mutation(
            "files of the right size are not read",
            "onn/weights.py",
            "if found != file.sha256:",
            "if found != file.sha256 and file.bytes is None:",
            ("weights_files", "weights"),
        ),
        "checkpoint_not_compared": Mutation(
            "a checkpoint whose files are there, and not compared with their checksums",
            "onn/checkpoint.py",
            "got == expected, ",
            "got is not None, ",
            ("checkpoint",),
        ),
        "resumed_with_other_batches": Mutation(
            "a resumed run that draws the batches of the beginning again",
            "experiments/pipeline.py",
            "draws.set_state(kept.generators.draws)",
            "draws.set_state(draws.get_state())",
            ("resume",),
        ),
        "hub_bias_forgotten": Mutation(
            "surprise of a model of transformers without its biases",
            "onn/hub/surprise.py",
            "torch.hypot(norm(x), one)",
            "norm(x)",
            ("hub_surprise",),
        ),
        "generator_reseeded": Mutation(
            "a generator made anew for every batch: the same windows at every step",
            "experiments/pipeline.py",
            "torch.rand(config.data.batch_size, 2, generator=draws)",
            "torch.rand(config.data.batch_size, 2, generator=noise.generator(config.seed))",
            ("run_batches",),
        ),
    }
)
