"""Provenance of a measurement: machine, versions, threads, backend, commit."""

import functools
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from modeling_adala.kernels import choose_backend
from trainers.runs.facts import describe_machine, software_versions

_ROOT = Path(__file__).parents[2]
# written by the measurement itself, which does not make a tree dirty
_RESULTS = (":!benchmarks/results", ":!docs")


def run_facts(device: str) -> dict[str, Any]:
    """Return the provenance of this run.

    Returns:
        `dict`: `machine`, `device`, `threads`, `versions`, `backend` (name and reason), `commit` (`None` outside a git
        checkout), `dirty` (whether files differ from it), `date` (UTC), `command`.
    """
    backend = choose_backend(device)
    versions = software_versions()
    return {
        "machine": describe_machine(),
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {name: versions[name] for name in ("vit-adala", "torch", "transformers", "python")},
        "backend": {"name": backend.name, "reason": backend.reason},
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "command": _command(),
        **_commit(),
    }


def _command() -> str:
    module = getattr(sys.modules["__main__"], "__spec__", None)
    start = f"python -m {module.name.removesuffix('.__main__')}" if module is not None else Path(sys.argv[0]).name
    return " ".join([start, *sys.argv[1:]])


@functools.cache
def _commit() -> dict[str, Any]:
    if not (_ROOT / ".git").exists():  # installed: a checkout around it would be another project's
        return {"commit": None, "dirty": None}
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True).stdout
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", ".", *_RESULTS))
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit.strip(), "dirty": bool(changes)}
