"""Cases of a benchmark, their check, and their measurement side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modeling_adala.errors import AdaLAError
from trainers.runs.timing import Timing, time_in_turns

from .floor import Floor

LINEAR = "linear"


@dataclass(frozen=True)
class Settings:
    """Settings that all passes of a benchmark share.

    Args:
        dtype (`torch.dtype`): Type of weights and inputs.
        device (`str`, *optional*, defaults to `"cpu"`): `"cpu"` or `"cuda"`.
        backward (`bool`, *optional*, defaults to `False`): Time forward and backward pass, not the forward pass alone.
        compile (`bool`, *optional*, defaults to `False`): Also time compiled passes.
        runtimes (`tuple[str, ...]`, *optional*): Runtimes to time beside PyTorch, of `runtimes.LABELS`.
        seconds (`float`, *optional*, defaults to 2): Time for the samples of a case, see `time_in_turns`.
        max_seconds (`float`, *optional*, defaults to 10): Skip a case whose pass is expected to take longer.
    """

    dtype: torch.dtype
    device: str = "cpu"
    backward: bool = False
    compile: bool = False
    runtimes: tuple[str, ...] = ()
    seconds: float = 2.0
    max_seconds: float = 10.0


@dataclass(frozen=True)
class Size:
    """Batch of images.

    Args:
        batch (`int`): Number of images.
        image_size (`tuple[int, int]`): Height and width in pixels.
        tokens (`int`): Tokens per image, class token and registers included.
    """

    batch: int
    image_size: tuple[int, int]
    tokens: int


@dataclass(frozen=True)
class Case:
    """One thing to measure at a size.

    Args:
        name (`str`): Such as `"linear"`.
        flops (`int`), bytes_moved (`int`): The least work that it has to do; see `floor`.
        run (`Callable`): The pass to time.
        check (`Callable`, *optional*): Returns the relative error of the result; raises an `AdaLAError` if it is too
            large.
        peak (`Callable`, *optional*): Returns the peak memory in bytes.
        compiled (`bool`, *optional*, defaults to `False`): The first call of `run` compiles it.
        skip (`str`, *optional*): Why it is not measured.
    """

    name: str
    flops: int
    bytes_moved: int
    run: Callable[[], Any]
    check: Callable[[], float] | None = None
    peak: Callable[[], int | None] | None = None
    compiled: bool = False
    skip: str | None = None


@dataclass(frozen=True)
class Row:
    """Result of a case, in plain values. Without `milliseconds`, it was skipped for the reason in `skipped`.

    `floor_share` is floor over measured time (1 is as fast as the machine allows), `speedup` is relative to the
    baseline. What is typed `Any` is a `float` where it was measured, else `None`.
    """

    name: str
    image_size: str
    tokens: int
    batch: int
    flops: int
    floor_milliseconds: float
    milliseconds: Any = None
    lower_milliseconds: Any = None
    upper_milliseconds: Any = None
    samples: int | None = None
    images_per_second: Any = None
    floor_share: Any = None
    speedup: Any = None
    peak_bytes: int | None = None
    relative_error: float | None = None
    skipped: str | None = None

    @property
    def size(self) -> str:
        return f"{self.image_size} ({self.tokens:,} tokens), batch {self.batch}"


def measure(
    size: Size, cases: Sequence[Case], baseline: str, settings: Settings, floor: Floor, pace: dict[str, float]
) -> list[Row]:
    """Check the cases of one size, then time them in turns.

    Args:
        size (`Size`): The size.
        cases (`Sequence[Case]`): What to measure.
        baseline (`str`): Name of the case that speed is given relative to.
        settings (`Settings`): How to measure.
        floor (`Floor`): Floor of the machine.
        pace (`dict[str, float]`): Seconds per FLOP that each case took at the size before; updated.

    Returns:
        `list[Row]`: One row per case.

    Raises:
        AdaLAError: If a case gives a wrong result; nothing of this size is then timed.
    """
    found: dict[str, dict[str, Any]] = {case.name: {} for case in cases}
    runs: dict[str, Callable[[], Any]] = {}
    for case in cases:
        forecast = case.flops * pace.get(case.name, 1 / floor.throughput)
        if case.skip is not None:
            found[case.name]["skipped"] = case.skip
        elif forecast > settings.max_seconds:
            limit = f"--max-seconds is {settings.max_seconds:g}"
            found[case.name]["skipped"] = f"a pass would take about {forecast:.0f} s, {limit}"
        else:
            try:
                error = None if case.check is None else case.check()
                peak = None if case.peak is None else case.peak()
                if case.compiled:
                    compile_now(case.name, case.run)
                found[case.name] |= {"relative_error": error, "peak_bytes": peak}
                runs[case.name] = case.run
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                found[case.name]["skipped"] = "out of memory"
    timings = time_in_turns(runs, settings.device, settings.seconds) if runs else {}
    rows = []
    for case in cases:
        least, timing = floor.seconds(case.flops, case.bytes_moved), timings.get(case.name)
        if timing is not None:
            pace[case.name] = timing.median / case.flops
            found[case.name] |= timing_columns(timing) | {
                "images_per_second": size.batch / timing.median,
                "floor_share": least / timing.median,
                "speedup": timings[baseline].median / timing.median if baseline in timings else None,
            }
        image_size = "x".join(map(str, size.image_size))
        rows.append(Row(case.name, image_size, size.tokens, size.batch, case.flops, 1000 * least, **found[case.name]))
    return rows


def timing_columns(timing: Timing) -> dict[str, Any]:
    """Return median and quartiles in milliseconds, and the number of samples."""
    return {
        "milliseconds": 1000 * timing.median,
        "lower_milliseconds": 1000 * timing.lower,
        "upper_milliseconds": 1000 * timing.upper,
        "samples": timing.samples,
    }


def graph_of(run: Callable[[], Any], calls: int = 1) -> Callable[[], Any]:
    """Return a replay of `calls` calls of a pass as one CUDA graph, which spares a GPU the wait for Python.

    It returns the result of the last call, in memory that the next replay writes to again.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles and allocates, which a graph must not record
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def compile_now(name: str, run: Callable[[], Any]) -> Any:
    """Return the result of the first call of a compiled pass, which compiles it.

    Raises:
        AdaLAError: If it does not compile.
    """
    try:
        return run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # the common base class of Dynamo's and Inductor's errors
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise AdaLAError(f"{name} does not compile: {reason} Leave out --compile.") from error
