"""Which code runs linear attention: chosen once per process and kind of device, with the reason.

This file travels with the weights (`trust_remote_code`): torch, transformers and flat siblings only.
"""

import functools
import logging
import os
from dataclasses import dataclass

import torch

from .cpu_backend import unavailable as cpu_unavailable
from .errors import UsageError
from .kernels.triton_backend import unavailable as triton_unavailable

BACKENDS = ("torch", "cpu", "triton", "reference")
VARIABLE = "ADALA_BACKEND"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """What runs linear attention on one kind of device.

    Args:
        name (`str`): One of `BACKENDS`: `"torch"` runs everywhere, `"cpu"` adds compiled passes on a CPU, `"triton"`
            has kernels for a GPU. What a backend does not support goes to `"torch"`, and a warning says so once.
            `"reference"` computes the N x N weights: slow, and what all others are compared with.
        reason (`str`): Why this one, for people.
    """

    name: str
    reason: str


@torch.compiler.assume_constant_result  # compilers take the answer of this process
def choose_backend(device_type: str = "cpu", requested: str | None = None) -> Backend:
    """The backend of a kind of device.

    `requested` takes precedence over the environment variable `ADALA_BACKEND`, which is read once, at its first use,
    and that over the fastest that this machine has. What cannot run here is replaced by `"torch"`, with a warning.

    Args:
        device_type (`str`, *optional*, defaults to `"cpu"`): `"cpu"`, `"cuda"`, `"mps"`, ...
        requested (`str`, *optional*): One of `BACKENDS`: the argument `backend` of `linear_attention`, which a model
            takes from the field of that name in its configuration.

    Raises:
        UsageError: for a name that is not in `BACKENDS`.
    """
    return _choose(device_type, requested)


@functools.cache
def _choose(device_type: str, requested: str | None) -> Backend:
    source, name = "the argument or the configuration", requested
    if name is None and os.environ.get(VARIABLE):
        source, name = VARIABLE, os.environ[VARIABLE]
    check_backend(name, source)
    if name is None:
        fast = "cpu" if device_type == "cpu" else "triton"
        obstacle = _obstacle(fast, device_type)
        if obstacle is None:
            return Backend(fast, f"the fastest on {device_type}")
        return Backend("torch", obstacle)
    obstacle = _obstacle(name, device_type)
    if obstacle is None:
        return Backend(name, f"asked for by {source}")
    logger.warning("backend %r, asked for by %s, cannot run: %s. Using 'torch'.", name, source, obstacle)
    return Backend("torch", f"{name} was asked for by {source}, but {obstacle}")


def check_backend(name: str | None, source: str = "the configuration") -> None:
    """Raises `UsageError` for a name that is not in `BACKENDS`."""
    if name is not None and name not in BACKENDS:
        raise UsageError(f"backend={name!r} (from {source}) is unknown; choose one of {', '.join(BACKENDS)}.")


def _obstacle(name: str, device_type: str) -> str | None:
    if name == "cpu":
        return cpu_unavailable(device_type)
    return triton_unavailable(device_type) if name == "triton" else None


@functools.cache
def warn_unsupported(name: str, obstacle: str) -> None:
    """Says, once per case, that a backend leaves it to PyTorch."""
    logger.warning("backend %r does not support %s; PyTorch runs it.", name, obstacle)
