"""Time and memory of both models at one resolution."""

import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling_adala.inspection.towers import forward_features
from trainers.base_config import evaluation_autocast
from trainers.runs.timing import time_in_turns, wait_for

from .upstream import TorchDispatchMode, tree_leaves

# a pass that takes longer is timed once; shorter ones several times, for so many seconds
SLOW_SECONDS, SECONDS = 0.4, 0.3


@dataclass(frozen=True)
class Cost:
    """Cost of one image in a vision tower.

    Args:
        milliseconds (`float`): Time of a forward pass.
        megabytes (`float`): Most memory of tensors at a time in a pass, weights and inputs aside.
    """

    milliseconds: float
    megabytes: float


def measure(models: Mapping[str, PreTrainedModel], pixels: Tensor) -> dict[str, Cost]:
    """Return what the forward pass of each model costs, under the autocast of evaluations.

    Args:
        models (`Mapping[str, PreTrainedModel]`): Models by name.
        pixels (`Tensor`): `(1, channels, height, width)` on their device.
    """
    runs = {name: partial(_forward, model, pixels) for name, model in models.items()}
    peaks, seconds = {name: tensor_peak(run) for name, run in runs.items()}, {}
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        wait_for(pixels.device)
        seconds[name] = time.perf_counter() - start
    if max(seconds.values()) < SLOW_SECONDS:
        timings = time_in_turns(runs, pixels.device, SECONDS)
        seconds = {name: timing.median for name, timing in timings.items()}
    return {name: Cost(1000 * seconds[name], peaks[name] / 1e6) for name in runs}


def tensor_peak(run: Callable[[], Any]) -> int:
    """Return the most bytes that tensors made by `run` take at a time.

    Unlike resident memory, which a heap with gaps doubles at these sizes, it is the same every time, and needs no
    process of its own. What an operation uses inside of itself is not seen.
    """
    with _LiveTensors() as live:
        run()
    return live.peak


class _LiveTensors(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result) - _storages((args, kwargs)):
            if storage not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, nbytes: int) -> None:
        self.now -= nbytes


def _storages(values: Any) -> set[Any]:
    return {leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


@torch.no_grad()
def _forward(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    with evaluation_autocast(pixels.device.type):
        return forward_features(model, pixels)
