"""Options of the benchmark scripts, and their results: JSON files in benchmarks/results.

A result holds its subject, the command, commit, machine and versions, and flat rows. The tables of docs/speed.md are
made of these files alone (`python -m benchmarks.tables`).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hub_cards.records import write_text
from modeling_adala.errors import DataError
from trainers.runs.timing import Timing
from vit_adala.benchmark.facts import run_facts
from vit_adala.benchmark.floor import Floor

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# results of smoke runs, which are not measurements
SMOKE = ROOT / "out" / "benchmarks"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with `--smoke` and `--output`, described by the first line of a docstring."""
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
    """Write `<name>.json`, or `<name>-cuda.json` if it ran on a GPU, and return its path.

    Args:
        name (`str`): Name of the benchmark.
        rows (`list[dict]`): Flat rows of plain values.
        smoke (`bool`, *optional*, defaults to `False`): Keep it out of the results: a smoke run is not a measurement.
        output (`Path`, *optional*): File to write instead.
        device (`str`, *optional*, defaults to `"cpu"`): Device that it ran on.
        facts: Further facts, such as `subject`: what was measured, in a few words.

    Raises:
        CheckpointError: If it cannot be written.
    """
    name += "-cuda" if device == "cuda" else ""
    path = output or (SMOKE if smoke else RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"name": name, "smoke": smoke, **run_facts(device), **facts, "rows": rows}
    write_text(path, json.dumps(result, indent=1) + "\n")
    print(path)
    return path


def load_result(path: Path) -> dict[str, Any]:
    """Return a result.

    Raises:
        DataError: If it is from a smoke run, which is not a measurement.
    """
    result = json.loads(path.read_text())
    if result.get("smoke"):
        raise DataError(f"{path} is from a smoke run; measure it again.")
    return result


def replace_between(page: str, start: str, end: str, text: str) -> str:
    """Return a page with a new text between two markers."""
    before, _, rest = page.partition(start)
    return f"{before}{start}\n\n{text}\n{end}{rest.partition(end)[2]}"


def floor_columns(floor: Floor, timing: Timing, flops: float, bytes_moved: float = 0.0) -> dict[str, Any]:
    """Return the floor in milliseconds, and its share of the measured time."""
    seconds = floor.seconds(flops, bytes_moved)
    return {"floor_milliseconds": 1000 * seconds, "floor_share": seconds / timing.median}


def floor_facts(floors: dict[str, Floor]) -> dict[str, Any]:
    """Return the peak rates of a machine by dtype."""
    return {
        name: {"bytes_per_second": floor.bandwidth, "flops_per_second": floor.throughput}
        for name, floor in floors.items()
    }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def progress(items: list[Any], description: str) -> tqdm:
    """Return a progress bar, silent unless stderr is a terminal."""
    return tqdm(items, desc=description, disable=None)
