"""What a run depends on beside its configuration: versions, threads, machine, code and text."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch
import transformers

from onn.observe import Json

ROOT = Path(__file__).parents[1]
NAMES = ("versions", "threads", "machine", "code", "corpus_fingerprint")


def facts(fingerprint: str) -> dict[str, Json]:
    """Those of this process, with the fingerprint of its text."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": metadata.version("safetensors"),
        },
        "threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors, {_capability()}",
        "code": code_version(),
        "corpus_fingerprint": fingerprint,
    }


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


def code_version() -> str:
    """The version of the package, and the commit where there is one: `0.1.0, commit ab12..., with changes`."""
    version = metadata.version("onn")
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return version
    return f"{version}, commit {commit}{', with changes' if _git('status', '--porcelain', '-uno') else ''}"


def _git(*arguments: str) -> str:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return ""
    command = ["git", "--no-optional-locks", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def differences(before: Mapping[str, Json], now: Mapping[str, Json]) -> list[str]:
    """Each fact that is not what it was, as `torch 2.11.0, now 2.15.0`; what one does not know is not compared."""
    changes = []
    for name in NAMES:
        was, is_ = before.get(name), now.get(name)
        pairs = [(name, was, is_)]
        if isinstance(was, Mapping) and isinstance(is_, Mapping):
            pairs = [(key, value, is_.get(key)) for key, value in was.items()]
        changes += [f"{key.replace('_', ' ')} {a}, now {b}" for key, a, b in pairs if None not in (a, b) and a != b]
    return changes
