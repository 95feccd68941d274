"""Writes the tables of docs/speed.md from the files in benchmarks/results.

python -m benchmarks.tables
"""

from collections import Counter
from pathlib import Path
from typing import Any

from hub_cards.card import code, plain, table
from hub_cards.records import write_text
from vit_adala.benchmark.output import three_digits

from .acceptance import CPU, GPU, judge
from .common import RESULTS, ROOT, Row, load_result, replace_between
from .operator import GRAPH

PAGE = ROOT / "docs" / "speed.md"
START, END = "<!-- benchmarks.tables: do not edit by hand -->", "<!-- end of benchmarks.tables -->"
CUDA = "-cuda"
MIB = 2**20
REMOVED = ("cpu",)  # compiled passes, worth 3 to 4 percent of a whole model (docs/experiments.md)


def main() -> None:
    text = PAGE.read_text()
    write_text(PAGE, replace_tables(text, render(load_results(RESULTS))))
    print(PAGE)


def load_results(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the results of `SECTIONS` by name, as `load_result` reads them; other files are not for this page."""
    paths = {name: directory / f"{name}.json" for name in SECTIONS}
    return {name: load_result(path) for name, path in paths.items() if path.exists()}


def replace_tables(page: str, tables: str) -> str:
    """Return a page with new tables between its markers."""
    return replace_between(page, START, END, tables)


def render(results: dict[str, dict[str, Any]]) -> str:
    """Return the tables in Markdown, a section per result; what was not measured is named as that."""
    parts, without = [], []
    for name, (title, rows_of) in SECTIONS.items():
        if name in results:
            missing = "; ".join(f"{case}: {why}" for case, why in results[name].get("not_measured", {}).items())
            origin = _origin(results[name]) + (f" Not measured: {plain(missing)}." if missing else "")
            parts += [f"### {title}", origin, table(rows_of(results[name]))]
        elif name.endswith(CUDA):
            without.append(name.removesuffix(CUDA))
        else:
            parts += [f"### {title}", f"Not measured: `python -m benchmarks.{name}`."]
    on_cpu: dict[str, list[Row]] = {}
    on_gpu: dict[str, list[Row]] = {}
    for name, result in results.items():
        (on_gpu if name.endswith(CUDA) else on_cpu)[name.removesuffix(CUDA)] = result["rows"]
    for rows, device, promises in ((on_cpu, "CPU", CPU), (on_gpu, "GPU", GPU)):
        if rows:
            heading = f"### {device}: asked and reached", f"From the {device} results below."
            parts[:0] = [*heading, table(judge(rows, promises))]
    if without:
        parts += ["### Not measured on a GPU", f"`python -m benchmarks.gpu` measures {', '.join(without)}."]
    return "\n\n".join(parts) + "\n"


def model_rows(result: dict[str, Any]) -> list[list[str]]:
    lines = [
        ["model", "image", "batch", "", "ms", "quartiles", "images/s", "share of the floor", "speed, softmax = 1"]
    ]
    for row in sorted(result["rows"], key=lambda row: (row["model"], row["batch"], row["side"])):
        variant = row["name"].partition(",")
        baseline = f"softmax{variant[1]}{variant[2]}"  # compiled beside compiled, a CUDA graph beside a CUDA graph
        rate, share = three_digits(row["images_per_second"]), f"{row['floor_share']:.0%}"
        cells = [row["model"], f"{row['side']:,} px", str(row["batch"]), row["name"], *_times(row), rate, share]
        lines.append([*cells, _speedup(row, result["rows"], baseline, ("model", "batch", "side"))])
    return lines


def operator_rows(result: dict[str, Any]) -> list[list[str]]:
    shape = ["dtype", "pass", "batch", "head dim", "tokens", "feature map", ""]
    lines = [[*shape, "ms", "quartiles", "time / floor", "speed, SDPA = 1"]]
    keys = ("dtype", "pass", "batch", "heads", "head_dim", "tokens")
    for row in sorted(result["rows"], key=lambda row: [row[key] for key in keys]):
        sizes = [f"{row[key]:,}" for key in ("batch", "head_dim", "tokens")]
        cells = [row["dtype"], row["pass"], *sizes, row["feature_map"], row["name"]]
        baseline = "SDPA" + GRAPH * row["name"].endswith(GRAPH)
        speedup = _speedup(row, result["rows"], baseline, (*keys, "feature_map"))
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


def distillation_rows(result: dict[str, Any]) -> list[list[str]]:
    figures = ("cls_cosine", "patches_cosine", "student_knn_accuracy", "head_accuracy")
    lines = [["teacher", "", "s", "images", "cosine CLS", "cosine patches", "k-NN (teacher)", "head (teacher)"]]
    for row in result["rows"]:
        shares = {name: f"{row[name]:.1%}" if name in row else "" for name in figures}
        for name, other in (
            ("student_knn_accuracy", "teacher_knn_accuracy"),
            ("head_accuracy", "teacher_head_accuracy"),
        ):
            shares[name] += f" ({row[other]:.1%})" if other in row else ""
        cosines = [f"{row[name]:.3f}" for name in figures[:2]]
        lines.append(
            [
                row["teacher"],
                row["row"],
                f"{row['seconds']:.0f}",
                f"{row['images']:,}",
                *cosines,
                *(shares[name] for name in figures[2:]),
            ]
        )
    return lines


def tests_rows(result: dict[str, Any]) -> list[list[str]]:
    counts = Counter(row["outcome"] for row in result["rows"])
    lines = [["outcome", "tests", ""]]
    for outcome, count in counts.items():
        names = [row["name"].rpartition("::")[2] for row in result["rows"] if row["outcome"] == outcome == "failed"]
        lines.append([outcome, str(count), ", ".join(names)])
    return lines


def parts_rows(result: dict[str, Any]) -> list[list[str]]:
    lines = [["part", "outcome", "s", "at most"]]
    return lines + [[r["part"], r["outcome"], f"{r['seconds']:.0f}", f"{r['most']:.0f}"] for r in result["rows"]]


# by result: its title, and the rows of its table
SECTIONS = {
    "model": ("Whole model", model_rows),
    "model-cuda": ("Whole model, GPU", model_rows),
    "operator": ("The operator alone", operator_rows),
    "operator-cuda": ("The operator alone, GPU", operator_rows),
    "scaling": ("The operator over tokens", scaling_rows),
    "scaling-cuda": ("The operator over tokens, GPU", scaling_rows),
    "training": ("Training steps", training_rows),
    "training-cuda": ("Training steps, GPU", training_rows),
    "distillation-cuda": ("Distillation, GPU", distillation_rows),
    "tests-cuda": ("Tests, GPU", tests_rows),
    "gpu-cuda": ("Parts of the GPU run", parts_rows),
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
