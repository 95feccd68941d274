"""Options of the benchmark scripts, and their results: JSON files in benchmarks/results.

A result holds its subject, the command, commit, machine and versions, and flat rows. The tables of docs/speed.md are
made of these files alone (`python -m benchmarks.tables`).
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from hub_cards.records import write_text
from modeling_adala.errors import AdaLAError, DataError
from trainers.runs.memory import peak_above, peak_of
from trainers.runs.timing import Timing
from vit_adala.benchmark.facts import run_facts
from vit_adala.benchmark.floor import Floor

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# results of smoke runs, which are not measurements
SMOKE = ROOT / "out" / "benchmarks"

Row = dict[str, Any]
Run = Callable[[], Any]
Case = TypeVar("Case")


def device() -> str:
    """Return the device that the scripts measure: the GPU, if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of all scripts, described by the first line of a docstring."""
    found = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    found.add_argument("--smoke", action="store_true", help="a few seconds, tiny shapes: does the script run?")
    found.add_argument("--output", type=Path, help="JSON to write. Default: benchmarks/results, or out/ with --smoke")
    found.add_argument(
        "--seconds", type=float, default=math.inf, help="no new case is begun after that. Default: all of them are"
    )
    return found


def run_script(main: Callable[[], Any]) -> None:
    """Run the `main` of a script. An error of ours is one line, and the exit status 1."""
    try:
        main()
    except AdaLAError as error:
        raise SystemExit(f"error: {error}") from error


def measure_all(
    name: str,
    cases: Sequence[Case],
    measure: Callable[[Case], list[Row]],
    args: argparse.Namespace,
    *,
    summary: Callable[[list[Row]], dict[str, Any]] = lambda rows: {},
    **facts: Any,
) -> Path:
    """Measure case after case and write the result after each, so that a kill loses no more than one.

    A case that fails, or that `--seconds` leaves no time for, is named under `not_measured`, with the reason; so is
    what `prepare_all` says has failed of a case.

    Args:
        name (`str`): Name of the benchmark.
        cases (`Sequence`): What to measure, the most important first.
        measure (`Callable`): Called with a case; returns its rows.
        args (`argparse.Namespace`): Options of `parser`.
        summary (`Callable`, *optional*): Called with all rows; returns facts that depend on them.
        facts: As for `write_result`.

    Returns:
        `Path`: The result.

    Raises:
        AdaLAError: If a case failed, after all others.
    """
    end = time.monotonic() + args.seconds
    rows: list[Row] = []
    missing: dict[str, str] = {}
    failed: list[str] = []
    path = None
    for case in progress(list(cases), name):
        if time.monotonic() > end:
            missing[str(case)] = "no time left"
        else:
            try:
                for row in measure(case):
                    if "failed" in row:
                        failed.append(f"{case}, {row['name']}")
                        missing[failed[-1]] = row["failed"]
                    else:
                        rows.append(row)
            except Exception as error:  # of compilers and drivers, too: the other cases have their own chance
                missing[str(case)] = one_line(error)
                failed.append(str(case))
        if rows or failed:
            result = {**facts, **summary(rows), "not_measured": missing}
            path = write_result(name, rows, smoke=args.smoke, output=args.output, device=device(), **result)
    if path is None:
        raise AdaLAError(f"{name}: --seconds {args.seconds:g} leaves no time for any case.")
    print(path)
    if failed:
        raise AdaLAError(f"{name}: {len(failed)} measurements failed, the first is {failed[0]}: {missing[failed[0]]}")
    return path


def prepare_all(prepare: dict[str, Callable[[], Run]]) -> tuple[dict[str, Run], list[Row]]:
    """Return what can be run, by name, and a row with the reason for `measure_all` for each that cannot.

    `prepare` compiles, records and checks: what goes wrong there takes one thing out of a comparison, not all of it.
    """
    runs: dict[str, Run] = {}
    failed = []
    for name, make in prepare.items():
        try:
            runs[name] = make()
        except Exception as error:
            failed.append({"name": name, "failed": one_line(error)})
    return runs, failed


def peak_bytes(smoke: bool, prepare: Callable[..., Callable[[], Any]], *args: Any) -> int | None:
    """Return the peak memory of a pass as `peak_of` does; a smoke run goes without a fresh process and its imports."""
    if smoke:
        return peak_above(prepare(*args), torch.device(device()))
    return peak_of(prepare, *args, device=device())


def one_line(error: BaseException) -> str:
    """Return the type and the first line of an error."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')}"


def write_result(
    name: str,
    rows: list[Row],
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
    return path


def load_json(path: Path) -> dict[str, Any]:
    """Return a result, also one of a smoke run."""
    return json.loads(path.read_text())


def load_result(path: Path) -> dict[str, Any]:
    """Return a result.

    Raises:
        DataError: If it is from a smoke run, which is not a measurement.
    """
    result = load_json(path)
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
