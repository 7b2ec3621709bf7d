"""lm-evaluation-harness for the models of `onn.hub`: its own command line, after they are registered with transformers.

`uv run --group eval experiments/harness.py run --model hf --model_args pretrained=DIR --tasks onn_choice,onn_repeat
--include_path experiments/lm_eval_task`, in the folder of the repository, with a model of `save_pretrained` and its
tokenizer in DIR. Whatever else the harness takes it takes here; `experiments/lm_eval_task/README.md` says more.
"""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec


def main() -> int:
    """Hand the command line over; the exit status where that cannot be done."""
    if find_spec("lm_eval") is None:
        print("error: lm-evaluation-harness is not installed; `uv sync --group eval` installs it.", file=sys.stderr)
        return 2
    import onn.hub  # noqa: F401  # registers its models

    runpy.run_module("lm_eval", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
