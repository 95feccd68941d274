"""Writes docs/performance.md and its pictures from the files in benchmarks/results, and from nothing else.

python -m benchmarks.report
"""

import json
from pathlib import Path
from typing import Any

from hub_cards.card import Markdown, code, plain, table
from modeling_adala.errors import DataError
from trainers.runs.checkpoints import whole_file
from vit_adala.benchmark.floor import DEFINITION
from vit_adala.benchmark.models import TOLERANCES
from vit_adala.benchmark.operators import BOUNDS
from vit_adala.benchmark.output import three_digits
from vit_adala.commands.bench import MEMORY, TIME

from .claims import OPERATOR_KEYS, Claim, Results, Row, claims, is_slower, select, speedups
from .common import RESULTS, ROOT
from .curves import draw_model, draw_operator, draw_scaling, draw_sweep

PAGE = ROOT / "docs" / "performance.md"
PICTURES = ROOT / "docs" / "images" / "performance"
SCRIPTS = {
    "operator": "python -m benchmarks.operator",
    "model": "python -m benchmarks.model",
    "scaling": "python -m benchmarks.scaling",
    "training": "python -m benchmarks.training",
}
WORST = 10


def main() -> None:
    results = load_results(RESULTS)
    for path in draw(results, PICTURES):
        print(path)
    whole_file(PAGE, render(results))
    print(PAGE)


def load_results(directory: Path) -> Results:
    """The results by name.

    Raises:
        DataError: for a smoke run among them, which is no measurement.
    """
    results = {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))}
    for name, result in results.items():
        if result.get("smoke"):
            raise DataError(f"{directory / name}.json is from a smoke run; run {SCRIPTS.get(name, name)} again.")
    return results


def draw(results: Results, directory: Path) -> list[Path]:
    """The pictures that the page shows, one or two per result that is there."""
    paths = []
    for name in ("operator", "operator-cuda"):
        if name in results:
            rows = results[name]["rows"]
            shown = select(rows, section="headline") or select(rows, section="gpu", batch=1, head_dim=64)
            draw_operator(directory / f"{name}.png", shown)
            paths.append(directory / f"{name}.png")
    if select(results.get("operator", {}).get("rows", []), section="sweep"):
        draw_sweep(directory / "sweep.png", select(results["operator"]["rows"], section="sweep"))
        paths.append(directory / "sweep.png")
    for name in ("model", "model-cuda"):
        if name in results:
            draw_model(directory / f"{name}.png", results[name]["rows"])
            paths.append(directory / f"{name}.png")
    if "scaling" in results:
        found = results["scaling"]
        draw_scaling(directory / "scaling.png", found["rows"], found["time_exponent"], found["memory_exponent"])
        paths.append(directory / "scaling.png")
    return paths


def render(results: Results) -> str:
    """The page, in Markdown."""
    sections = [
        _head(),
        _claims(claims(results)),
        _operator(results),
        _sweep(results),
        _model(results, "model", "Whole model"),
        _scaling(results),
        _training(results),
        _gpu(results),
        _method(),
        _reproduce(),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head() -> str:
    return "\n\n".join(
        [
            "# Performance",
            "<!-- Written by `python -m benchmarks.report` from benchmarks/results. Do not edit. -->",
            "Every figure on this page comes from a file in `benchmarks/results`. Times are medians; everything that"
            " is compared ran in turns in one process. `vit-adala bench MODEL` measures the same on your machine.",
        ]
    )


def _claims(found: list[Claim]) -> str:
    rows = [["what", "asked", "measured", "", "by"]]
    rows += [[c.what, c.asked, c.measured, Markdown(c.verdict), code(c.source)] for c in found]
    return "## Asked and measured\n\n" + table(rows)


def _operator(results: Results) -> str:
    rows = select(results.get("operator", {}).get("rows", []), section="headline")
    if not rows:
        return _missing("Operator", "operator")
    text = [
        "## Operator",
        "Attention of one ViT-B layer, 12 heads of 64, elu + 1, without its projections. `plain PyTorch` is what a"
        " user would write, in float32 as the formula asks or all in the dtype of the input; the error is relative,"
        " against the quadratic form in float64.",
        _origin(results["operator"]),
        "![time over tokens](images/performance/operator.png)",
    ]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for which in dict.fromkeys(row["pass"] for row in rows):
            chosen = select(rows, dtype=dtype, **{"pass": which})
            if chosen:
                text += [f"{dtype}, {which}:", _operator_table(chosen)]
    maps = select(results["operator"]["rows"], section="maps")
    if maps:
        text += ["### Other feature maps", _maps_table(maps)]
    return "\n\n".join(text)


def _operator_table(rows: list[Row]) -> str:
    lines = [["tokens", "", "ms", "quartiles", "floor ms", "time / floor", "speed, SDPA = 1", "relative error"]]
    for row in sorted(rows, key=lambda row: row["tokens"]):
        sdpa = select(rows, name="SDPA", tokens=row["tokens"])
        lines.append(
            [
                f"{row['tokens']:,}",
                row["name"],
                three_digits(row["milliseconds"]),
                f"{three_digits(row['lower_milliseconds'])} to {three_digits(row['upper_milliseconds'])}",
                three_digits(row["floor_milliseconds"]),
                three_digits(1 / row["floor_share"]),
                f"{sdpa[0]['milliseconds'] / row['milliseconds']:.2f}x" if sdpa else "",
                "" if row["relative_error"] is None else f"{row['relative_error']:.0e}",
            ]
        )
    return table(lines)


def _maps_table(rows: list[Row]) -> str:
    others = ("plain PyTorch", "plain PyTorch, input dtype", "SDPA")
    lines = [
        ["feature map", "pass", "tokens", "linear ms", "time / floor", *(f"speed, {name} = 1" for name in others)]
    ]
    for row in select(rows, name="linear"):
        same = {key: row[key] for key in OPERATOR_KEYS}
        times = [
            other["milliseconds"] / row["milliseconds"]
            for name in others
            # SDPA has no feature map, but ran beside this one
            for other in select(_beside(rows, row), name=name, **same)[:1]
        ]
        cells = [row["feature_map"], row["pass"], f"{row['tokens']:,}", three_digits(row["milliseconds"])]
        lines.append([*cells, three_digits(1 / row["floor_share"]), *(f"{ratio:.2f}x" for ratio in times)])
    return table(lines)


def _beside(rows: list[Row], row: Row) -> list[Row]:
    """The rows that were measured in turns with a linear one: those up to the next linear row."""
    start = rows.index(row)
    stop = next((i for i in range(start + 1, len(rows)) if rows[i]["name"] == "linear"), len(rows))
    return rows[start:stop]


def _sweep(results: Results) -> str:
    rows = select(results.get("operator", {}).get("rows", []), section="sweep")
    if not rows:
        return ""
    lines = [["pass", "dtype", "head dim", "against", "shapes", "slowest", "median", "fastest", "slower"]]
    slowest = []
    for which in dict.fromkeys(row["pass"] for row in rows):
        for dtype, dim in dict.fromkeys((row["dtype"], row["head_dim"]) for row in rows):
            chosen = select(rows, dtype=dtype, head_dim=dim, **{"pass": which})
            for name in ("plain PyTorch", "plain PyTorch, input dtype"):
                found = speedups(chosen, "linear", name, OPERATOR_KEYS)
                ratios = sorted(ratio for _, _, ratio in found)
                slower = [pair for pair in found if is_slower(*pair[:2])]
                slowest += slower
                shown = [f"{ratios[i]:.2f}x" for i in (0, len(ratios) // 2, -1)] if ratios else ["", "", ""]
                lines.append([which, dtype, str(dim), name, str(len(found)), *shown, str(len(slower))])
    batches = sorted({row["batch"] for row in rows})
    tokens = sorted({row["tokens"] for row in rows})
    text = [
        "### A sweep of shapes",
        f"Batch {batches[0]} to {batches[-1]}, {tokens[0]} to {tokens[-1]:,} tokens, how many times as fast as plain"
        " PyTorch. A shape counts as slower where the quartiles do not overlap.",
        "![ratio at every shape](images/performance/sweep.png)",
        table(lines),
    ]
    if slowest:
        slowest.sort(key=lambda pair: pair[2])
        worst = [["pass", "dtype", "batch", "tokens", "head dim", "against", "linear ms", "its ms", "ratio"]]
        for row, other, ratio in slowest[:WORST]:
            cells = [row["pass"], row["dtype"], *(f"{row[key]:,}" for key in ("batch", "tokens", "head_dim"))]
            times = [three_digits(each["milliseconds"]) for each in (row, other)]
            worst.append([*cells, other["name"], *times, f"{ratio:.2f}x"])
        text += [f"Where linear attention is slower, the worst {min(WORST, len(slowest))}:", table(worst)]
    return "\n\n".join(text)


def _model(results: Results, name: str, title: str) -> str:
    if name not in results:
        return _missing(title, name)
    result = results[name]
    lines = [["image", "batch", "", "ms", "quartiles", "images/s", "share of the floor", "speed, softmax = 1"]]
    for row in sorted(result["rows"], key=lambda row: (row["batch"], row["side"])):
        compiled = ", compiled" if row["name"].endswith(", compiled") else ""
        softmax = select(result["rows"], name="softmax" + compiled, batch=row["batch"], side=row["side"])
        lines.append(
            [
                f"{row['side']:,} px",
                str(row["batch"]),
                row["name"],
                three_digits(row["milliseconds"]),
                f"{three_digits(row['lower_milliseconds'])} to {three_digits(row['upper_milliseconds'])}",
                three_digits(row["images_per_second"]),
                f"{row['floor_share']:.0%}",
                f"{softmax[0]['milliseconds'] / row['milliseconds']:.2f}x" if softmax else "",
            ]
        )
    slower = [
        f"{row['name']} is slower than softmax at {row['side']:,} px, batch {row['batch']} ({ratio:.2f}x)."
        for linear in dict.fromkeys(row["name"] for row in result["rows"] if row["name"].startswith("linear"))
        for row, _, ratio in speedups(
            result["rows"], linear, "softmax" + ", compiled" * linear.endswith(", compiled"), ("batch", "side")
        )
        if ratio < 1
    ]
    return "\n\n".join(
        [
            f"## {title}",
            f"{plain(result['model'])}; random weights, which cost what trained ones do. Softmax is PyTorch's SDPA in"
            " the same dtype; a compiled model is compared with the compiled softmax model.",
            _origin(result),
            f"![time over resolution](images/performance/{name}.png)",
            table(lines),
            " ".join(map(plain, slower)) or "Linear is slower at none of these sizes.",
        ]
    )


def _scaling(results: Results) -> str:
    if "scaling" not in results:
        return _missing("Scaling", "scaling")
    result = results["scaling"]
    lines = [["tokens", "ms", "quartiles", "ns per token", "peak memory above the inputs, MiB", "inputs, MiB"]]
    for row in result["rows"]:
        lines.append(
            [
                f"{row['tokens']:,}",
                three_digits(row["milliseconds"]),
                f"{three_digits(row['lower_milliseconds'])} to {three_digits(row['upper_milliseconds'])}",
                three_digits(row["nanoseconds_per_token"]),
                "" if row["peak_bytes"] is None else three_digits(row["peak_bytes"] / 2**20),
                three_digits(row["input_bytes"] / 2**20),
            ]
        )
    return "\n\n".join(
        [
            "## Scaling",
            f"The operator: {plain(result['shape'])}.",
            _origin(result),
            "![time and memory over tokens](images/performance/scaling.png)",
            table(lines),
        ]
    )


def _training(results: Results) -> str:
    if "training" not in results:
        return _missing("Training", "training")
    result = results["training"]
    lines = [["feature map", "", "ms", "quartiles", "images/s", "peak memory, MiB"]]
    for row in result["rows"]:
        lines.append(
            [
                row["feature_map"],
                row["name"],
                three_digits(row["milliseconds"]),
                f"{three_digits(row['lower_milliseconds'])} to {three_digits(row['upper_milliseconds'])}",
                three_digits(row["images_per_second"]),
                "" if row["peak_bytes"] is None else three_digits(row["peak_bytes"] / 2**20),
            ]
        )
    by_map = result["by_feature_map"]
    names = list(dict.fromkeys(name for found in by_map.values() for name in found))
    shares = [["", *by_map]]
    shares += [
        [name.replace("_", " "), *(three_digits(found.get(name)) for found in by_map.values())] for name in names
    ]
    return "\n\n".join(
        [
            "## Training stages",
            f"{plain(result['setting'])}. By its FLOPs alone, stage 1 would reach"
            f" {result['stage_1_share_by_flops']:.0%} of the rate of the teacher's forward pass.",
            _origin(result),
            table(lines),
            "Shares of the bounds, gain over hooks on everything, and share of the time spent waiting for images:",
            table(shares),
        ]
    )


def _gpu(results: Results) -> str:
    if not {"operator-cuda", "model-cuda"} & results.keys():
        return (
            "## GPU\n\nUnmeasured: no run on a GPU is among the results. The scripts are ready: on a machine with one,"
            " the same commands measure the shapes of a GPU and write `operator-cuda.json` and `model-cuda.json`."
        )
    text = []
    if "operator-cuda" in results:
        result = results["operator-cuda"]
        text += ["## GPU: operator", f"Peer library flash-bidirectional-linear-attention: {plain(result['peer'])}."]
        text += [_origin(result), "![time over tokens](images/performance/operator-cuda.png)"]
        for batch, dim, which in dict.fromkeys((r["batch"], r["head_dim"], r["pass"]) for r in result["rows"]):
            chosen = select(result["rows"], batch=batch, head_dim=dim, **{"pass": which})
            text += [f"Batch {batch}, 16 heads of {dim}, {which}:", _operator_table(chosen)]
    if "model-cuda" in results:
        text.append(_model(results, "model-cuda", "GPU: whole model"))
    return "\n\n".join(text)


def _method() -> str:
    bounds = ", ".join(f"{str(dtype).removeprefix('torch.')} {bound:.0e}" for dtype, bound in BOUNDS.items())
    limits = ", ".join(f"{str(dtype).removeprefix('torch.')} {limit:.0e}" for dtype, limit in TOLERANCES.items())
    return "\n\n".join(
        [
            "## How it is measured",
            f"{TIME} {MEMORY}",
            f"The floor: {DEFINITION}",
            "No speed is given for a wrong result: the operator is first compared with the quadratic form in float64"
            f" (relative error at most {bounds}; gradients, too, where the backward pass is timed), a model's features"
            f" with the same weights in float32 on PyTorch operators (at most {limits}).",
        ]
    )


def _reproduce() -> str:
    commands = "\n".join([*SCRIPTS.values(), "python -m benchmarks.report"])
    return "\n\n".join(
        [
            "## Reproduce",
            f"```bash\n{commands}\n```",
            "On an otherwise idle machine; each takes less than ten minutes. `--smoke` runs one in seconds and leaves"
            " no result. A single model: `vit-adala bench MODEL`.",
        ]
    )


def _origin(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    commit = f"commit {result['commit'][:12]}" if result["commit"] else "no commit"
    floors = [
        f"{dtype} {floor['flops_per_second'] / 1e9:,.0f} GFLOP/s" for dtype, floor in result.get("floors", {}).items()
    ]
    copies = [floor["bytes_per_second"] / 1e9 for floor in result.get("floors", {}).values()]
    measured = f" Floor: copies {max(copies):.1f} GB/s, products {', '.join(floors)}." if copies else ""
    return (
        f"{plain(result['machine'])}, {result['threads']} threads, backend {plain(result['backend']['name'])}"
        f" ({plain(result['backend']['reason'])}); {versions}; {commit}{' with changes' if result['dirty'] else ''},"
        f" {result['date']} UTC, {code(result['command'])}.{measured}"
    )


def _missing(title: str, name: str) -> str:
    return f"## {title}\n\nUnmeasured: `{SCRIPTS[name]}` has not been run for the record."


if __name__ == "__main__":
    main()
