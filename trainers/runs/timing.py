"""Timing of several functions in turns, so that other work of the machine slows all of them alike.

`torch.utils.benchmark.Timer` warms up twice before every sample: it cannot take turns where a pass takes seconds.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

MIN_ROUNDS, MAX_ROUNDS = 3, 51
# shorter samples are repeated until they last as long: a clock tick and a call's own overhead then do not count
SAMPLE_SECONDS = 5e-3
# a first call that takes longer than this tells how long the next will take
SLOW_SECONDS = 1.0


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Args:
        median (`float`), lower (`float`), upper (`float`): Median and quartiles over the samples.
        samples (`int`): How many samples, each the mean over enough calls to last `SAMPLE_SECONDS`.
    """

    median: float
    lower: float
    upper: float
    samples: int

    @classmethod
    def of(cls, seconds: list[float]) -> Self:
        lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, lower, upper, len(seconds))

    def share(self, calls: int) -> Self:
        """Return the times of one of the `calls` equal parts of a call."""
        return replace(self, median=self.median / calls, lower=self.lower / calls, upper=self.upper / calls)

    def overlaps(self, other: "Timing") -> bool:
        """Return whether the quartiles overlap: the medians then differ by less than the spread."""
        return self.lower <= other.upper and other.lower <= self.upper


def time_in_turns(
    runs: Mapping[str, Callable[[], Any]], device: torch.device | str = "cpu", seconds: float = 2.0
) -> dict[str, Timing]:
    """Time all `runs` in turns: A, B, C, A, B, C, ...

    Args:
        runs (`dict[str, Callable]`): What to time, without arguments.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where they run; a sample on a GPU ends when
            the device is done.
        seconds (`float`, *optional*, defaults to 2): How long each of them is timed in all, after a warm-up; at least
            `MIN_ROUNDS` and at most `MAX_ROUNDS` samples are taken.

    Returns:
        `dict[str, Timing]`: one per run.
    """
    calls: dict[str, int] = {}
    longest = 0.0
    for name, run in runs.items():
        once = _sample(run, 1, device)  # compiles, allocates, fills caches
        if once < SLOW_SECONDS:
            once = _sample(run, 1, device)
        calls[name] = max(1, math.ceil(SAMPLE_SECONDS / once))
        longest = max(longest, once * calls[name])
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds / longest)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(_sample(run, calls[name], device))
    return {name: Timing.of(values) for name, values in samples.items()}


def _sample(run: Callable[[], Any], calls: int, device: torch.device | str) -> float:
    """Return the seconds per call."""
    wait_for(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    wait_for(device)
    return (time.perf_counter() - start) / calls


def wait_for(device: torch.device | str) -> None:
    """Wait until the device has finished its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
