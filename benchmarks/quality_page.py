"""Writes the tables and pictures of docs/quality.md from the files in benchmarks/results.

python -m benchmarks.quality_page
"""

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hub_cards.card import Markdown, table
from hub_cards.records import write_text

from .common import RESULTS, ROOT, load_result, replace_between
from .methods import KINDS, METHODS, timed_as
from .quality_pictures import curve_of, draw_curve, draw_speed
from .students import ALONE, STAGES

PAGE, PICTURES = ROOT / "docs" / "quality.md", ROOT / "docs" / "images"
START, END = "<!-- benchmarks.quality_page: do not edit by hand -->", "<!-- end of benchmarks.quality_page -->"
TITLES = {
    "digits": "Digits: accuracy of the teacher's own head, 28 px (196 patches)",
    "dense": "CamVid, 168x224 (192 patches): mean IoU of the frozen segmentation probe",
    "dense-1e-4": "CamVid, 168x224, with stage 2 at 1e-4: mean IoU of the frozen segmentation probe",
    "dense-large": "CamVid, 336x448 (768 patches): mean IoU of the frozen segmentation probe",
    "images": "CIFAR-10, 112 px (64 patches): accuracy of k-NN",
}
DEFAULT = "power + mixing"
Cell = dict[str, Any]


def main() -> None:
    """Write the page and its pictures."""
    cells, latency = load_cells(RESULTS / "quality"), load_latency(RESULTS / "latency.json")
    tuned = load_cells(RESULTS / "finetuning")
    write_text(PAGE, replace_between(PAGE.read_text(), START, END, render(cells, latency, tuned)))
    dense = of_protocol(cells, "dense")
    if latency:
        plain = of_full_budget(dense)
        teacher, metric = teacher_figure(plain), plain[0]["metric"]
        figures = {name: final(plain, name, metric) / teacher for name in {cell["method"] for cell in plain}}
        draw_speed({name: share for name, share in figures.items() if share}, latency, PICTURES / "quality.png")
    if len(points := curve_of(of_default(dense))) > 1:
        draw_curve(points, PICTURES / "training-time.png")
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


def render(cells: list[Cell], latency: dict[str, dict[int, float]], tuned: list[Cell]) -> str:
    """Return the tables of each protocol in Markdown: the methods by kind, best one first, and what comes of them."""
    parts = []
    for protocol, title in TITLES.items():
        found, points = of_protocol(cells, protocol), curve_of(of_default(of_protocol(cells, protocol)))
        if plain := of_full_budget(found):
            parts += [f"### {title}", origin(plain), table(rows_of(plain, latency))]
        if len(points) > 1:
            parts += [f"### {title.partition(':')[0]}: how much training is needed", table(rows_of_curve(points))]
        if of_protocol(tuned, protocol):
            subject, heading = title.partition(":")[0], "fine-tuned at equal steps"
            parts += [f"### {subject}: {heading}", table(rows_of_tuned(of_protocol(tuned, protocol)))]
    return "\n\n".join(parts) + "\n"


def of_protocol(cells: list[Cell], protocol: str) -> list[Cell]:
    """Return the cells of a protocol."""
    return [cell for cell in cells if cell["protocol"] == protocol]


def of_full_budget(cells: list[Cell]) -> list[Cell]:
    """Return the cells with the steps of the protocol."""
    return [cell for cell in cells if "scale" not in cell]


def of_default(cells: list[Cell]) -> list[Cell]:
    """Return the cells of the default method, with both stages."""
    return [cell for cell in cells if cell["method"] == DEFAULT and len(cell["rows"]) == len(STAGES)]


def rows_of_curve(points: list[dict[str, float]]) -> list[list[str]]:
    """Return a heading, and a row for each budget of training."""
    lines = [["minutes", "images seen", *STAGES, "seeds"]]
    for point in points:
        shares = [f"{point[stage]:.1%}" for stage in STAGES]
        lines.append([f"{point['minutes']:.0f}", f"{point['images']:,}", *shares, f"{point['seeds']}"])
    return lines


def rows_of_tuned(cells: list[Cell]) -> list[list[str]]:
    """Return a heading, and a row for each method and stage: labels alone, and with the teacher beside them."""
    metric = cells[0]["metric"]

    def figures(method: str, stage: str, with_teacher: bool) -> list[float]:
        wanted = method, stage, with_teacher
        return [c["rows"][0][metric] for c in cells if (c["method"], c["stage"], c["with_teacher"]) == wanted]

    softmax = figures("softmax", STAGES[-1], False)
    lines = [["method", "fine-tuned after", "labels alone", "of the teacher", "with teacher term", "of the teacher"]]
    for method, stage in sorted({(cell["method"], cell["stage"]) for cell in cells}, key=order_of_tuned):
        line = [method, "" if method == "softmax" else stage]
        for with_teacher in (False, True):
            found = figures(method, stage, with_teacher)
            line += [spread(found), f"{fmean(found) / fmean(softmax):.1%}" if found and softmax else ""]
        lines.append(line)
    return lines


def order_of_tuned(row: tuple[str, str]) -> tuple[int, int]:
    """Return the place of a method and stage in the table."""
    method, stage = row
    stages = [STAGES[0], STAGES[1], ALONE, STAGES[2]]
    return ["softmax", *METHODS].index(method), stages.index(stage)


def rows_of(cells: list[Cell], latency: dict[str, dict[int, float]]) -> list[list[str]]:
    """Return a heading, and a row for each method: its rank over all kinds, and means over its seeds."""
    metric, teacher = cells[0]["metric"], teacher_figure(cells)
    tokens = sorted({count for speeds in latency.values() for count in speeds})
    stages = [*STAGES, *[ALONE] * bool(row_figures(cells, ALONE, metric))]
    end = ["of the teacher", "cos CLS", "cos patches", "seeds", *(f"speed, {count:,} tokens" for count in tokens)]
    lines = [["", "", "", *stages, *end]]
    own = [f"{teacher:.1%}" if stage == STAGES[-1] else "" for stage in stages]
    lines.append(["", "softmax", "the teacher", *own, "100.0%", "", "", "", *("1.00" for _ in tokens)])
    methods = sorted({cell["method"] for cell in cells}, key=lambda name: (-final(cells, name, metric), name))
    for kind in KINDS:
        members = [name for name in methods if METHODS[name].kind == kind]
        if members:
            lines.append(["", Markdown(f"**{kind}**"), *[""] * (len(lines[0]) - 2)])
        for name in members:
            found = [cell for cell in cells if cell["method"] == name]
            figures = [spread(row_figures(found, row, metric)) for row in stages]
            cosines = [row_figures(found, STAGES[-1], key) for key in ("cls_cosine", "patches_cosine")]
            rank = retained = ""
            if row_figures(found, STAGES[-1], metric):
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
    figures = row_figures([cell for cell in cells if cell["method"] == method], STAGES[-1], metric)
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


if __name__ == "__main__":
    main()
