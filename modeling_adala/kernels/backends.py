"""Choice of the code that runs linear attention: once per process and kind of device, with the reason."""

import functools
import logging
import os
from dataclasses import dataclass

import torch

from ..configuration_adala import check_backend
from .triton_backend import unavailable

VARIABLE = "ADALA_BACKEND"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """Code that runs linear attention on one kind of device.

    Args:
        name (`str`): One of `BACKENDS`: `"torch"` runs everywhere, `"triton"` has kernels for a GPU and leaves what
            they do not support to `"torch"`, with a warning. `"reference"` computes the N x N weights: slow, and the
            standard that the others are compared with.
        reason (`str`): Why this one, for people.
    """

    name: str
    reason: str


@torch.compiler.assume_constant_result  # compilers take the answer of this process
def choose_backend(device_type: str = "cpu", requested: str | None = None) -> Backend:
    """Return the backend of a kind of device.

    `requested` takes precedence over the environment variable `ADALA_BACKEND`, which is read once, at its first use,
    and that over the fastest that this machine has. `"torch"` replaces one that cannot run here, with a warning.

    Args:
        device_type (`str`, *optional*, defaults to `"cpu"`): `"cpu"`, `"cuda"`, `"mps"`, ...
        requested (`str`, *optional*): One of `BACKENDS`: the argument `backend` of `linear_attention`, which a model
            takes from the field of that name in its configuration.

    Raises:
        UsageError: For a name that is not in `BACKENDS`.
    """
    return _choose(device_type, requested)


@functools.cache
def _choose(device_type: str, requested: str | None) -> Backend:
    source, name = "the argument or the configuration", requested
    if name is None and os.environ.get(VARIABLE):
        source, name = VARIABLE, os.environ[VARIABLE]
    check_backend(name, source)
    if name is None:
        obstacle = "PyTorch is the fastest on a CPU" if device_type == "cpu" else unavailable(device_type)
        return Backend("triton", f"the fastest on {device_type}") if obstacle is None else Backend("torch", obstacle)
    obstacle = unavailable(device_type) if name == "triton" else None
    if obstacle is None:
        return Backend(name, f"asked for by {source}")
    logger.warning("backend %r, asked for by %s, cannot run: %s. Using 'torch'.", name, source, obstacle)
    return Backend("torch", f"{name} was asked for by {source}, but {obstacle}")
