"""Writes the tables of docs/speed.md from the files in benchmarks/results.

python -m benchmarks.tables
"""

from pathlib import Path
from typing import Any

from hub_cards.card import code, plain, table
from hub_cards.records import write_text
from vit_adala.benchmark.output import three_digits

from .common import RESULTS, ROOT, load_result, replace_between

PAGE = ROOT / "docs" / "speed.md"
START, END = "<!-- benchmarks.tables: do not edit by hand -->", "<!-- end of benchmarks.tables -->"
MIB = 2**20
REMOVED = ("cpu",)  # compiled passes, worth 3 to 4 percent of a whole model (docs/experiments.md)
Row = dict[str, Any]


def main() -> None:
    text = PAGE.read_text()
    write_text(PAGE, replace_tables(text, render(load_results(RESULTS))))
    print(PAGE)


def load_results(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the results by name, as `load_result` reads them."""
    return {path.stem: load_result(path) for path in sorted(directory.glob("*.json"))}


def replace_tables(page: str, tables: str) -> str:
    """Return a page with new tables between its markers."""
    return replace_between(page, START, END, tables)


def render(results: dict[str, dict[str, Any]]) -> str:
    """Return the tables in Markdown, a section per script; scripts without a result are named as unmeasured."""
    parts = []
    for script, (title, rows_of) in SECTIONS.items():
        for name, suffix in ((script, ""), (f"{script}-cuda", ", GPU")):
            if name not in results:
                parts += [f"### {title}{suffix}", f"Not measured: `python -m benchmarks.{script}` on such a machine."]
                continue
            result = results[name]
            parts += [f"### {title}{suffix}", _origin(result), table(rows_of(result))]
    return "\n\n".join(parts) + "\n"


def model_rows(result: dict[str, Any]) -> list[list[str]]:
    lines = [["image", "batch", "", "ms", "quartiles", "images/s", "share of the floor", "speed, softmax = 1"]]
    for row in sorted(result["rows"], key=lambda row: (row["batch"], row["side"])):
        baseline = "softmax, compiled" if row["name"].endswith(", compiled") else "softmax"
        rate, share = three_digits(row["images_per_second"]), f"{row['floor_share']:.0%}"
        cells = [f"{row['side']:,} px", str(row["batch"]), row["name"], *_times(row), rate, share]
        lines.append([*cells, _speedup(row, result["rows"], baseline, ("batch", "side"))])
    return lines


def operator_rows(result: dict[str, Any]) -> list[list[str]]:
    shape = ["dtype", "pass", "batch", "head dim", "tokens", "feature map", ""]
    lines = [[*shape, "ms", "quartiles", "time / floor", "speed, SDPA = 1"]]
    keys = ("dtype", "pass", "batch", "heads", "head_dim", "tokens")
    for row in sorted(result["rows"], key=lambda row: [row[key] for key in keys]):
        sizes = [f"{row[key]:,}" for key in ("batch", "head_dim", "tokens")]
        cells = [row["dtype"], row["pass"], *sizes, row["feature_map"], row["name"]]
        speedup = _speedup(row, result["rows"], "SDPA", (*keys, "feature_map"))
        lines.append([*cells, *_times(row), three_digits(1 / row["floor_share"]), speedup])
    return lines


def scaling_rows(result: dict[str, Any]) -> list[list[str]]:
    lines = [["tokens", "ms", "quartiles", "ns per token", "peak memory above the inputs, MiB", "inputs, MiB"]]
    for row in result["rows"]:
        peak = three_digits(row["peak_bytes"] and row["peak_bytes"] / MIB)
        inputs = three_digits(row["input_bytes"] / MIB)
        lines.append([f"{row['tokens']:,}", *_times(row), three_digits(row["nanoseconds_per_token"]), peak, inputs])
    return lines


def training_rows(result: dict[str, Any]) -> list[list[str]]:
    lines = [["feature map", "", "ms", "quartiles", "images/s", "peak memory, MiB"]]
    for row in result["rows"]:
        rate, peak = (
            three_digits(row["images_per_second"]),
            three_digits(row["peak_bytes"] and row["peak_bytes"] / MIB),
        )
        lines.append([row["feature_map"], row["name"], *_times(row), rate, peak])
    return lines


# by script: what it measures, and the rows of its table
SECTIONS = {
    "model": ("Whole model", model_rows),
    "operator": ("The operator alone", operator_rows),
    "scaling": ("The operator over tokens", scaling_rows),
    "training": ("Training steps", training_rows),
}


def _times(row: Row) -> list[str]:
    lower, upper = (three_digits(row[f"{side}_milliseconds"]) for side in ("lower", "upper"))
    return [three_digits(row["milliseconds"]), f"{lower} to {upper}"]


def _speedup(row: Row, rows: list[Row], baseline: str, keys: tuple[str, ...]) -> str:
    for other in rows:
        if other["name"] == baseline and all(other[key] == row[key] for key in keys):
            return f"{other['milliseconds'] / row['milliseconds']:.2f}x"
    return ""


def _origin(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    commit = f"commit {result['commit'][:12]}" if result["commit"] else "no commit"
    removed = " That backend has since been removed." if result["backend"]["name"] in REMOVED else ""
    return (
        f"{plain(result['subject'])}. {plain(result['machine'])}, {result['threads']} threads, backend"
        f" {code(result['backend']['name'])}; {versions}; {commit}{' with changes' if result['dirty'] else ''},"
        f" {result['date']} UTC, {code(result['command'])}.{removed}"
    )


if __name__ == "__main__":
    main()
