"""Pictures of docs/quality.md: quality over speed, and quality over the time of training."""

from pathlib import Path
from statistics import fmean
from typing import Any

from trainers.report.pictures import new_figure, save_figure

from .methods import KINDS, METHODS
from .students import STAGES

Cell = dict[str, Any]


def draw_speed(figures: dict[str, float], latency: dict[str, dict[int, float]], path: Path) -> None:
    """Draw quality, as a share of the teacher's, over the speed of the whole model for each number of tokens."""
    tokens = sorted(latency["softmax"])
    figure = new_figure(7.2 * len(tokens), 6.4, layout="constrained")
    axes = figure.subplots(1, len(tokens), sharey=True, squeeze=False)[0]
    for axis, count in zip(axes, tokens, strict=True):
        for color, kind in enumerate(KINDS):
            names = [name for name in METHODS if METHODS[name].kind == kind and name in figures and name in latency]
            places = [(latency[name][count], 100 * figures[name]) for name in names]
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
    save_figure(figure, path, dpi=130)


def curve_of(cells: list[Cell]) -> list[dict[str, float]]:
    """Return minutes of training, images seen, and the share of the teacher's figure after each stage, by budget."""
    points = []
    for scale in sorted({cell.get("scale", 1.0) for cell in cells}):
        found = [cell for cell in cells if cell.get("scale", 1.0) == scale]
        metric = found[0]["metric"]
        teacher = f"teacher_{metric.removeprefix('student_')}"
        stages = [found[0]["budget"][stage] for stage in ("stage_1", "stage_2")]
        point = {
            "minutes": fmean(cell["rows"][-1]["seconds"] for cell in found) / 60,
            "images": sum(stage["max_steps"] * stage["per_device_train_batch_size"] for stage in stages),
            "seeds": len(found),
        }
        for index, stage in enumerate(STAGES):
            point[stage] = fmean(cell["rows"][index][metric] / cell["rows"][index][teacher] for cell in found)
        points.append(point)
    return points


def draw_curve(points: list[dict[str, float]], path: Path) -> None:
    """Draw the share of the teacher's figure over the minutes of training."""
    figure = new_figure(6.4, 4.0, layout="constrained")
    axis = figure.subplots()
    for stage in STAGES[1:]:
        axis.plot([p["minutes"] for p in points], [100 * p[stage] for p in points], marker="o", label=stage)
    axis.axhline(100, color="gray", linewidth=0.8, label="the teacher")
    axis.set(xscale="log", xlabel="minutes of training, both stages", ylabel="mean IoU of the frozen probe, %")
    minutes = [p["minutes"] for p in points]
    axis.set_xticks(minutes, [f"{count:.0f}" for count in minutes], minor=False)
    axis.minorticks_off()
    axis.legend(fontsize=8)
    save_figure(figure, path, dpi=130)
