"""How a bank is cut into parts; numbers that only speed depends on."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch


class Tiling(NamedTuple):
    """Sizes of the parts."""

    entries: int
    """Of the gathered rows [G, N, H] of a part, at most: what stays in a cache; half as many as of the activations
    [T, G, I] where nothing is gathered. 0 takes all experts at once in grouped products, `NATIVE` too, by native code.
    """
    whole_from: float
    """Share of the tokens from which an expert computes all of them, which saves the gather; about that share its
    neighbours decide. Native code gathers nothing: there it is the share of all pairs from which all are computed.
    """

    def computes_all(self, active: int, *, of: int) -> bool:
        """Whether a bank leaves so many active pairs of so many to the dense computation."""
        return self.entries == NATIVE and active >= self.whole_from * of


NATIVE: Final = -1
"""For `entries`: the active pairs by native code."""

NATIVE_TILING: Final = Tiling(NATIVE, whole_from=0.9)
"""Where there is native code: it was ahead with half of all pairs active, and a plain product with all of them."""

GATHERING: Final = Tiling(entries=2**21, whole_from=torch.inf)
"""What was fastest on CPUs of 2 cores with 1 or 2 MiB of second-level cache each, where all rows are gathered."""
_capabilities: Final = getattr(torch.cpu, "get_capabilities", None)
_AMX: Final = _capabilities is not None and bool(_capabilities().get("amx_bf16", False))
"""This CPU multiplies tiles of bfloat16; torch of before 2.15 does not tell."""


def default_tiling(*, width: int, hidden: int, dtype: torch.dtype) -> Tiling:
    """What was fastest there for experts [width, hidden].

    Gathering moves rows of `hidden`; computing all tokens spends products of `width * hidden` and element-wise work of
    `width`. So the share from which the latter is faster falls with the speed of products and rises with `width`, and
    where products are as fast as with AMX it rises for small `hidden`.
    """
    narrow = dtype.itemsize <= 2
    if _AMX and dtype == torch.bfloat16:
        share = (0.03 + width / 400) * (1 + 350 / hidden)
    elif narrow:
        share = 0.15 + width / 120
    else:
        share = min(0.02 + width / 80, 0.55)
    entries = GATHERING.entries if narrow or width > 32 else 2**20
    return Tiling(entries, whole_from=min(share, 0.66))
