"""One case of a benchmark: what runs, whether it is right, what it costs; measured beside the others of its size."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from modeling_adala.errors import AdaLAError
from trainers.runs.timing import Timing, time_in_turns

from .floor import Floor


@dataclass(frozen=True)
class Size:
    """A batch of images, and their tokens.

    Args:
        batch (`int`): Images.
        image_size (`tuple[int, int]`): Height and width in pixels.
        tokens (`int`): Per image, class token and registers included.
    """

    batch: int
    image_size: tuple[int, int]
    tokens: int

    def __str__(self) -> str:
        return f"{self.image_size[0]}x{self.image_size[1]} ({self.tokens:,} tokens), batch {self.batch}"


@dataclass(frozen=True)
class Case:
    """Something to be measured at a size.

    Args:
        name (`str`): Such as `"linear"`.
        flops (`int`), bytes_moved (`int`): What it has to do at least; see `floor`.
        open (`Callable`): Returns the pass to time. May compile.
        check (`Callable`, *optional*): Relative error of the result; raises an `AdaLAError` where it is too large.
        peak (`Callable`, *optional*): Peak memory in bytes.
        refused (`str`, *optional*): Why it cannot be run at this size.
    """

    name: str
    flops: int
    bytes_moved: int
    open: Callable[[], Callable[[], Any]]
    check: Callable[[], float] | None = None
    peak: Callable[[], int | None] | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Row:
    """What came out for a case. Without `timing` it was skipped, for the reason that `skipped` says."""

    name: str
    size: Size
    flops: int
    floor_seconds: float
    timing: Timing | None = None
    peak_bytes: int | None = None
    relative_error: float | None = None
    skipped: str | None = None

    @property
    def images_per_second(self) -> float | None:
        return None if self.timing is None else self.size.batch / self.timing.median

    @property
    def floor_share(self) -> float | None:
        """Floor over measured time: 1 is as fast as the machine allows."""
        return None if self.timing is None else self.floor_seconds / self.timing.median


@dataclass
class Meter:
    """Measures the cases of one size after those of another, smallest first.

    Args:
        floor (`Floor`): Of the machine.
        device (`str`): Where the cases run.
        seconds (`float`): See `time_in_turns`.
        max_seconds (`float`): A case whose pass is forecast to take longer is left out.
    """

    floor: Floor
    device: str
    seconds: float = 2.0
    max_seconds: float = 10.0
    # seconds per FLOP that a case of this name took at the size before
    _pace: dict[str, float] = field(default_factory=dict)

    def __call__(self, size: Size, cases: list[Case]) -> list[Row]:
        """One row per case.

        Raises:
            AdaLAError: if a case gives a wrong result; nothing of this size is then timed.
        """
        skipped = {case.name: reason for case in cases if (reason := self._reason_to_skip(case)) is not None}
        runs, errors, peaks = {}, {}, {}
        for case in cases:
            if case.name in skipped:
                continue
            try:
                errors[case.name] = None if case.check is None else case.check()
                runs[case.name] = case.open()
                peaks[case.name] = None if case.peak is None else case.peak()
            except torch.OutOfMemoryError:
                runs.pop(case.name, None)
                torch.cuda.empty_cache()
                skipped[case.name] = "out of memory"
        timings = time_in_turns(runs, self.device, self.seconds) if runs else {}
        for case in cases:
            if case.name in timings:
                self._pace[case.name] = timings[case.name].median / case.flops
        return [
            Row(
                case.name,
                size,
                case.flops,
                self.floor.seconds(case.flops, case.bytes_moved),
                timings.get(case.name),
                peaks.get(case.name),
                errors.get(case.name),
                skipped.get(case.name),
            )
            for case in cases
        ]

    def _reason_to_skip(self, case: Case) -> str | None:
        if case.refused is not None:
            return case.refused
        forecast = case.flops * self._pace.get(case.name, 1 / self.floor.throughput)
        if forecast > self.max_seconds:
            return f"a pass would take about {forecast:.0f} s, --max-seconds is {self.max_seconds:g}"
        return None


def compiled_or_error(name: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` after its first call, which compiles it.

    Raises:
        AdaLAError: if it does not compile.
    """
    try:
        run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # what Dynamo's and Inductor's errors have in common
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise AdaLAError(f"{name} does not compile: {reason} Leave out --compile.") from error
    return run


@dataclass(frozen=True)
class BreakEven:
    """Where a linear case begins to be faster than a softmax case, on a log scale between two measured sizes.

    Args:
        tokens (`float`), side (`float`): Tokens, and the side in pixels of a square image; of the smallest measured
            size where linear is faster at all of them.
        between (`tuple[Size, Size]` or `None`): The measured sizes around it.
    """

    tokens: float
    side: float
    between: tuple[Size, Size] | None


def break_even(rows: list[Row], name: str, baseline: str, batch: int) -> BreakEven | None:
    """The size from which on `name` is faster than `baseline` at all measured sizes; `None` if there is none."""
    points = [(size, ratio) for size, ratio in ratios(rows, name, baseline) if size.batch == batch]
    points.sort(key=lambda point: point[0].tokens)
    slower = [index for index, (_, ratio) in enumerate(points) if ratio < 1]
    if not points or (slower and slower[-1] == len(points) - 1):
        return None
    if not slower:
        size = points[0][0]
        return BreakEven(size.tokens, math.sqrt(math.prod(size.image_size)), None)
    (below, low), (above, high) = points[slower[-1]], points[slower[-1] + 1]
    share = math.log(low) / (math.log(low) - math.log(high))

    def between(a: float, b: float) -> float:
        return math.exp((1 - share) * math.log(a) + share * math.log(b))

    sides = [math.sqrt(math.prod(size.image_size)) for size in (below, above)]
    return BreakEven(between(below.tokens, above.tokens), between(*sides), (below, above))


def ratios(rows: list[Row], name: str, baseline: str) -> list[tuple[Size, float]]:
    """How many times as fast as `baseline` a case is, wherever both were measured."""
    found = []
    for size in dict.fromkeys(row.size for row in rows):
        ours, theirs = (find(rows, size, wanted) for wanted in (name, baseline))
        if ours is not None and theirs is not None:
            found.append((size, theirs.median / ours.median))
    return found


def find(rows: list[Row], size: Size, name: str) -> Timing | None:
    """The timing of a case at a size, if it was measured."""
    return next((row.timing for row in rows if row.size == size and row.name == name), None)
