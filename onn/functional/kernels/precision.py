"""In which dtype something is computed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def as_given(device: torch.device) -> AbstractContextManager[object]:
    """Without autocast: what is inside computes in the dtypes of what it is given."""
    kind = device.type
    automatic = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if automatic else nullcontext()
