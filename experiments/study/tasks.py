"""What is learnt in sequence: handwritten digits, permuted or turned (here), and text (`text`).

Digits are the 1,797 images of 8 x 8 pixels that scikit-learn brings.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.ndimage import rotate  # type: ignore[attr-defined]
from sklearn.datasets import load_digits
from torch import Tensor

import onn.functional as F
from experiments import noise
from experiments.study.net import Net

Family = Literal["digits-permuted", "digits-rotated", "text"]
FAMILIES: tuple[Family, ...] = ("digits-permuted", "digits-rotated", "text")

HIDDEN = 64
DIGIT_TASKS, TRAIN, HELD_OUT = 5, 1200, 320


class Bank(NamedTuple):
    """The size of the bank."""

    experts: int
    width: int
    """Neurons of each expert."""


class Tasks(NamedTuple):
    """The tasks of one seed, and the model before the first. Lanes of several seeds stack them."""

    inputs: Tensor
    """[tasks, n, P]"""
    residual: Tensor
    """[tasks, n, H], or [tasks, n, 0]"""
    labels: Tensor
    """[tasks, n] int64"""
    held_inputs: Tensor
    held_residual: Tensor
    held_labels: Tensor
    held_tokens: Tensor
    """[tasks, n] int64: the characters that are read; [tasks, 0] where the inputs are none."""
    net: Net


class Schedule(NamedTuple):
    """How long and how much at a time."""

    tokens: int
    """Examples a step."""
    steps: int
    """Of each task."""


SCHEDULES: dict[Family, Schedule] = {
    "digits-permuted": Schedule(tokens=32, steps=100),
    "digits-rotated": Schedule(tokens=32, steps=100),
    "text": Schedule(tokens=64, steps=100),
}


def digits(seed: int, *, turned: bool, bank: Bank) -> Tasks:
    """Five tasks of one seed: pixels permuted, or images turned in steps of 36 degrees; a split of its own.

    All but prototypes, experts and read-out is the same for every bank.
    """
    draws = noise.generator(seed)
    found = load_digits()
    images, labels = torch.tensor(np.asarray(found.images)).float() / 16, torch.tensor(np.asarray(found.target)).long()
    order = torch.randperm(len(images), generator=draws)[: TRAIN + HELD_OUT]
    if turned:
        angles = [task * 180 / DIGIT_TASKS for task in range(DIGIT_TASKS)]
        shown = [
            torch.from_numpy(rotate(images.numpy(), angle, axes=(1, 2), reshape=False, order=1)) for angle in angles
        ]
    else:
        places = [torch.randperm(64, generator=draws) for _ in range(DIGIT_TASKS)]
        shown = [images.flatten(1)[:, place] for place in places]
    pixels = torch.stack([image.flatten(1) for image in shown])[:, order].float()
    pixels = (pixels - pixels[:, :TRAIN].mean()) / pixels[:, :TRAIN].std()
    targets = labels[order].expand(DIGIT_TASKS, -1)
    nothing = pixels.new_zeros(DIGIT_TASKS, len(order), 0)
    return Tasks(
        inputs=pixels[:, :TRAIN],
        residual=nothing[:, :TRAIN],
        labels=targets[:, :TRAIN].contiguous(),
        held_inputs=pixels[:, TRAIN:],
        held_residual=nothing[:, TRAIN:],
        held_labels=targets[:, TRAIN:].contiguous(),
        held_tokens=targets[:, :0],
        net=_random_net(draws, bank, inputs=pixels.shape[-1], classes=10),
    )


def _random_net(draws: torch.Generator, bank: Bank, *, inputs: int, classes: int) -> Net:
    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(shape, generator=draws) * scale

    features = torch.linalg.qr(normal(max(inputs, HIDDEN), max(inputs, HIDDEN), scale=1.0)).Q[:HIDDEN, :inputs]
    return Net(
        features=features.contiguous(),
        prototypes=normal(bank.experts, HIDDEN, scale=1.0),
        experts=F.Experts(
            gate=normal(*bank, HIDDEN, scale=HIDDEN**-0.5),
            up=normal(*bank, HIDDEN, scale=HIDDEN**-0.5),
            down=normal(*bank, HIDDEN, scale=bank.width**-0.5),
        ),
        readout=normal(classes, HIDDEN, scale=HIDDEN**-0.5),
    )
