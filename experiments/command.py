"""Command lines that end in one line where something was wrong with what they were given."""

from __future__ import annotations

import sys
from collections.abc import Callable


def exit_status(main: Callable[[], object]) -> int:
    """Carry `main` out: 0, or 2 after one line that says what was wrong with the input or the disk."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
