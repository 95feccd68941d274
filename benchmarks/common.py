"""What the benchmark scripts share: their options, and how a result is written down.

A result is a JSON file of its name in benchmarks/results: what was claimed, the command, commit, machine and versions,
and flat rows. docs/performance.md is made of these files alone (`python -m benchmarks.report`).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from trainers.runs.checkpoints import whole_file
from trainers.runs.timing import Timing
from vit_adala.benchmark.facts import run_facts
from vit_adala.benchmark.floor import Floor

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# where a smoke run leaves its result: it is no measurement
SMOKE = ROOT / "out" / "benchmarks"


def parser(description: str | None) -> argparse.ArgumentParser:
    """With `--smoke` and `--output`; the first line of a docstring is description enough."""
    found = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    found.add_argument("--smoke", action="store_true", help="a few seconds, tiny shapes: does the script run?")
    found.add_argument("--output", type=Path, help="JSON to write. Default: benchmarks/results, or out/ with --smoke")
    return found


def write_result(
    name: str,
    rows: list[dict[str, Any]],
    *,
    smoke: bool = False,
    output: Path | None = None,
    device: str = "cpu",
    **facts: Any,
) -> Path:
    """Writes `<name>.json`.

    Args:
        name (`str`): Of the benchmark; one measured on a GPU should end in `-cuda`.
        rows (`list[dict]`): Flat rows, all with plain values.
        smoke (`bool`, *optional*, defaults to `False`): Not a measurement, hence not among the results.
        output (`Path`, *optional*): Another place.
        device (`str`, *optional*, defaults to `"cpu"`): Where it ran.
        facts: Whatever else belongs to the result, such as `claim`.

    Returns:
        `Path`: the file.

    Raises:
        CheckpointError: if it cannot be written.
    """
    path = output or (SMOKE if smoke else RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"name": name, "smoke": smoke, **run_facts(device), **facts, "rows": rows}
    whole_file(path, json.dumps(result, indent=1) + "\n")
    print(path)
    return path


def timing_columns(timing: Timing) -> dict[str, Any]:
    """Median and quartiles in milliseconds, and the number of samples."""
    return {
        "milliseconds": 1000 * timing.median,
        "lower_milliseconds": 1000 * timing.lower,
        "upper_milliseconds": 1000 * timing.upper,
        "samples": timing.samples,
    }


def floor_columns(floor: Floor, timing: Timing, flops: float, bytes_moved: float = 0.0) -> dict[str, Any]:
    """The floor in milliseconds, and how much of the measured time it is."""
    seconds = floor.seconds(flops, bytes_moved)
    return {"floor_milliseconds": 1000 * seconds, "floor_share": seconds / timing.median}


def floor_facts(floors: dict[str, Floor]) -> dict[str, Any]:
    """Per dtype."""
    return {
        name: {"bytes_per_second": floor.bandwidth, "flops_per_second": floor.throughput}
        for name, floor in floors.items()
    }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def progress(items: list[Any], description: str) -> tqdm:
    """With the time left; nothing where stderr is no terminal."""
    return tqdm(items, desc=description, disable=None)
