"""Writes the tables and the picture of docs/quality.md from the files in benchmarks/results/quality.

python -m benchmarks.quality_page
"""

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hub_cards.card import Markdown, table
from hub_cards.records import write_text
from trainers.report.pictures import new_figure, save_figure

from .common import RESULTS, ROOT, load_result, replace_between
from .methods import KINDS, METHODS, timed_as

PAGE, PICTURE = ROOT / "docs" / "quality.md", ROOT / "docs" / "images" / "quality.png"
START, END = "<!-- benchmarks.quality_page: do not edit by hand -->", "<!-- end of benchmarks.quality_page -->"
ROWS, ALONE = ("converted", "stage 1", "stages 1+2"), "stage 2 alone"
TITLES = {
    "digits": "Digits: accuracy of the teacher's own head, 28 px (196 patches)",
    "dense": "CamVid, 168x224 (192 patches): mean IoU of the frozen segmentation probe",
    "dense-large": "CamVid, 336x448 (768 patches): mean IoU of the frozen segmentation probe",
    "images": "CIFAR-10, 112 px (64 patches): accuracy of k-NN",
}
Cell = dict[str, Any]


def main() -> None:
    """Write the page and its picture."""
    cells, latency = load_cells(RESULTS / "quality"), load_latency(RESULTS / "latency.json")
    write_text(PAGE, replace_between(PAGE.read_text(), START, END, render(cells, latency)))
    if latency and any(cell["protocol"] == "dense" for cell in cells):
        draw(cells, latency)
    print(PAGE)


def load_cells(directory: Path) -> list[Cell]:
    """Return the results of all cells, as `load_result` reads them."""
    return [load_result(path) for path in sorted(directory.glob("*/*.json"))]


def load_latency(path: Path) -> dict[str, dict[int, float]]:
    """Return the speed over the softmax teacher, by method and tokens."""
    speeds: dict[str, dict[int, float]] = {}
    for row in json.loads(path.read_text())["rows"] if path.is_file() else []:
        speeds.setdefault(row["name"], {})[row["tokens"]] = row["speedup"]
    same = {name: speeds[timed] for name in METHODS if (timed := timed_as(name)) in speeds}
    return {"softmax": speeds["softmax"], **same} if speeds else {}


def render(cells: list[Cell], latency: dict[str, dict[int, float]]) -> str:
    """Return a table for each protocol in Markdown, by kind of method, the best one first."""
    parts = []
    for protocol, title in TITLES.items():
        found = [cell for cell in cells if cell["protocol"] == protocol]
        if found:
            parts += [f"### {title}", origin(found), table(rows_of(found, latency))]
    return "\n\n".join(parts) + "\n"


def rows_of(cells: list[Cell], latency: dict[str, dict[int, float]]) -> list[list[str]]:
    """Return a heading, and a row for each method: its rank over all kinds, and means over its seeds."""
    metric, teacher = cells[0]["metric"], teacher_figure(cells)
    tokens = sorted({count for speeds in latency.values() for count in speeds})
    stages = [*ROWS, *[ALONE] * bool(row_figures(cells, ALONE, metric))]
    end = ["of the teacher", "cos CLS", "cos patches", "seeds", *(f"speed, {count:,} tokens" for count in tokens)]
    lines = [["", "", "", *stages, *end]]
    own = [f"{teacher:.1%}" if stage == ROWS[-1] else "" for stage in stages]
    lines.append(["", "softmax", "the teacher", *own, "100.0%", "", "", "", *("1.00" for _ in tokens)])
    methods = sorted({cell["method"] for cell in cells}, key=lambda name: -final(cells, name, metric))
    for kind in KINDS:
        members = [name for name in methods if METHODS[name].kind == kind]
        if members:
            lines.append(["", Markdown(f"**{kind}**"), *[""] * (len(lines[0]) - 2)])
        for name in members:
            found = [cell for cell in cells if cell["method"] == name]
            figures = [spread(row_figures(found, row, metric)) for row in stages]
            cosines = [row_figures(found, ROWS[-1], key) for key in ("cls_cosine", "patches_cosine")]
            rank = retained = ""
            if row_figures(found, ROWS[-1], metric):
                rank, retained = str(1 + methods.index(name)), f"{final(cells, name, metric) / teacher:.1%}"
            shown = [f"{fmean(values):.3f}" if values else "" for values in cosines]
            speeds = [f"{latency[name][count]:.2f}" if name in latency else "" for count in tokens]
            seeds = str(len({cell["seed"] for cell in found}))
            lines.append([rank, name, METHODS[name].about, *figures, retained, *shown, seeds, *speeds])
    return lines


def teacher_figure(cells: list[Cell]) -> float:
    """Return the teacher's own figure, the mean over cells: it is measured in each."""
    metric = cells[0]["metric"].removeprefix("student_")
    return fmean(cell["rows"][-1][f"teacher_{metric}"] for cell in cells)


def final(cells: list[Cell], method: str, metric: str) -> float:
    """Return a method's figure after stages 1 and 2, the mean over its seeds; 0 where only stage 2 alone has run."""
    figures = row_figures([cell for cell in cells if cell["method"] == method], ROWS[-1], metric)
    return fmean(figures) if figures else 0.0


def row_figures(cells: Iterable[Cell], row: str, key: str) -> list[float]:
    """Return one figure of one row of each cell."""
    return [found[key] for cell in cells for found in cell["rows"] if found["row"] == row]


def spread(values: list[float]) -> str:
    """Return the mean in percent, and the standard deviation where there are several seeds."""
    text = f"{fmean(values):.1%}" if values else ""
    return f"{text} ± {100 * stdev(values):.1f}" if len(values) > 1 else text


def origin(cells: list[Cell]) -> str:
    """Return where the figures come from, and the budget."""
    one, two = (cells[0]["budget"][stage] for stage in ("stage_1", "stage_2"))
    budget = f"{one['max_steps']} and {two['max_steps']} steps of {one['per_device_train_batch_size']} images"
    machines = sorted({cell["machine"] for cell in cells})
    commits = sorted({(cell["commit"] or "")[:7] for cell in cells})
    precision = "bf16" if cells[0]["bf16"] else "float32"
    dates = sorted({cell["date"].partition(" ")[0] for cell in cells})
    return f"{budget}; {precision}; {', '.join(machines)}; commits {', '.join(commits)}; {', '.join(dates)}."


def draw(cells: list[Cell], latency: dict[str, dict[int, float]]) -> None:
    """Draw quality over speed, for the protocol with masks and both numbers of tokens."""
    found = [cell for cell in cells if cell["protocol"] == "dense"]
    tokens = sorted(latency["softmax"])
    figure = new_figure(7.2 * len(tokens), 6.4, layout="constrained")
    axes = figure.subplots(1, len(tokens), sharey=True, squeeze=False)[0]
    teacher = teacher_figure(found)
    figures = {name: final(found, name, found[0]["metric"]) for name in {cell["method"] for cell in found}}
    for axis, count in zip(axes, tokens, strict=True):
        for color, kind in enumerate(KINDS):
            names = [name for name in METHODS if METHODS[name].kind == kind and figures.get(name) and name in latency]
            places = [(latency[name][count], 100 * figures[name] / teacher) for name in names]
            horizontal, vertical = ([place[index] for place in places] for index in (0, 1))
            axis.scatter(horizontal, vertical, s=22, color=f"C{color}", label=kind)
            for name, place in zip(names, places, strict=True):
                axis.annotate(name, place, fontsize=6.5, xytext=(4, 3), textcoords="offset points")
        axis.axhline(100, color="gray", linewidth=0.8)
        axis.axvline(1, color="gray", linewidth=0.8)
        axis.set(title=f"{count:,} tokens", xlabel="speed, softmax = 1")
        axis.margins(x=0.25)
    axes[0].set(ylabel="mean IoU of the frozen probe, % of the teacher")
    axes[0].legend(fontsize=7, loc="lower left")
    save_figure(figure, PICTURE, dpi=130)


if __name__ == "__main__":
    main()
