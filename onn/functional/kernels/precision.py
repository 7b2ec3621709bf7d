"""In which dtype something is computed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on there."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def as_given(device: torch.device) -> AbstractContextManager[object]:
    """Without autocast: what is inside computes in the dtypes of what it is given."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()
