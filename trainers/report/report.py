"""Report of a run: `report.md`, its tables and its pictures."""

import json
import time
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from hub_cards.card import code, plain
from hub_cards.records import EVALUATIONS as ROWS
from hub_cards.records import FIGURES, IMAGES, read_json, read_metrics, write_json, write_text
from modeling_adala.configuration_adala import in_words, vision_config
from modeling_adala.conversion.convert import convert
from modeling_adala.conversion.loading import load_student
from modeling_adala.inspection.flops import count_tokens
from modeling_adala.inspection.towers import forward_features, patch_size

from ..base_config import evaluation_autocast, evaluation_dtype
from ..evaluation.comparison import Comparison
from ..evaluation.softmax_layers import in_softmax
from ..runs.callbacks import cost_in_words
from ..runs.facts import describe_machine
from ..runs.memory import peak_above
from ..runs.recipe_config import RecipeConfig
from ..runs.stages import STAGES
from ..runs.timing import time_in_turns
from .pictures import ColorBasis, draw_colors, new_figure, patch_features, save_figure


def write_report(out: Path, comparison: Comparison, config: RecipeConfig) -> Path:
    """Draw the plots, write `report.md` from the recorded figures, and print its table.

    Args:
        out (`Path`): The run's folder, with `manifest.json`; the curves are drawn from `metrics.jsonl`.
        comparison (`Comparison`): The teacher and the evaluation images.
        config (`RecipeConfig`): The run's settings.

    Returns:
        `Path`: the report.
    """
    manifest = json.loads((out / "manifest.json").read_text())
    lines = read_metrics(out / "metrics.jsonl")
    evaluations = manifest["evaluations"]
    table = summary_table(evaluations, manifest)
    students = _students(out, comparison, config)
    pictures = {}
    for name, title, draw in (
        ("alignment.png", "Stage 1: error of each block's attention over the steps", draw_alignment),
        ("blocks.png", "Error after each block, student running free", draw_blocks),
    ):
        if draw(out / name, lines, evaluations):
            pictures[name] = title
    if comparison.eval_loader is not None:
        draw_features(out / "features.png", comparison, students)
        pictures["features.png"] = "Patch features as PCA colors, one basis (the teacher's) for all"
    speed = read_json(out / "speed.json")
    if not speed.get("rows"):  # once for all stages: they change the weights, not what these cost
        speed = measure_speed(comparison.teacher, students["last"])
        trade = measure_softmax_layers(lines, comparison.teacher, config, speed["rows"][-1]["size"])
        speed |= {"softmax_layers": trade} if trade else {}
        write_json(out / "speed.json", speed)
    draw_speed(out / "speed.png", speed["rows"])
    conditions = f"batch {speed['batch_size']}, {speed['dtype']}, on {speed['machine']}"
    pictures["speed.png"] = f"Forward pass over resolution, {conditions}"
    added = options_added(students["last"], config)
    write_text(out / "report.md", _render(table, manifest, pictures, speed, config, added))
    _print(table)
    return out / "report.md"


def summary_table(evaluations: dict[str, dict], manifest: dict[str, Any]) -> list[list[str]]:
    """Return a heading and one row per model, as text; columns without any figure are left out."""
    columns = []
    for figure in (*FIGURES, IMAGES):
        values = []
        for row in (name for name in ROWS if name in evaluations):
            found = evaluations[row].get(figure.student)
            if row == "teacher":
                others = [line[figure.teacher] for line in evaluations.values() if figure.teacher in line]
                found = others[-1] if others else found
            values.append("" if found is None else figure.form.format(found))
        if any(values):
            columns.append([figure.heading, *values])
    seconds = {**manifest["stages"], "control": manifest.get("control", {})}
    names = [name for name in ROWS if name in evaluations]
    times = [f"{seconds[name]['seconds']:.0f} s" if seconds.get(name, {}).get("seconds") else "" for name in names]
    columns = [["", *(ROWS[name] for name in names)], *columns, ["time", *times]]
    return [list(row) for row in zip(*columns, strict=True)]


def draw_alignment(path: Path, lines: list[dict], evaluations: dict[str, dict]) -> bool:
    """Draw the heat map of stage 1, block by step; return `False` where there is nothing to draw."""
    logs = [line for line in lines if line.get("stage") == "attention-alignment" and "loss" in line]
    if not logs:
        return False
    blocks = sorted({int(key[6:]) for line in logs for key in line if key.startswith("block_")})
    errors = np.array([[line.get(f"block_{block}", np.nan) for line in logs] for block in blocks])
    figure = new_figure(7, 0.28 * len(blocks) + 1.4)
    axes = figure.subplots()
    mesh = axes.pcolormesh([line["step"] for line in logs], blocks, errors, shading="nearest", vmin=0, vmax=1)
    axes.set(xlabel="step", ylabel="block", yticks=blocks)
    figure.colorbar(mesh, label="relative error (1 = no better than a constant)")
    return _save(figure, path)


def draw_blocks(path: Path, lines: list[dict], evaluations: dict[str, dict]) -> bool:
    """Draw the relative error after each block, a curve per stage; return `False` where there is nothing to draw."""
    curves = {name: line["block_errors"] for name, line in evaluations.items() if line.get("block_errors")}
    if not curves:
        return False
    figure = new_figure(7, 3.6)
    axes = figure.subplots()
    for name in (name for name in ROWS if name in curves):
        axes.plot(range(len(curves[name])), curves[name], marker="o", markersize=3, label=ROWS[name])
    axes.set(xlabel="block", ylabel="relative error of the patch tokens", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, path)


def draw_features(path: Path, comparison: Comparison, students: dict[str, PreTrainedModel], images: int = 4) -> None:
    """Draw images, and the first three principal components of their patch features as colors."""
    assert comparison.eval_loader is not None  # write_report asks
    dataset: Any = comparison.eval_loader.dataset
    chosen = torch.linspace(0, len(dataset) - 1, images + 2).long()[1:-1].tolist()  # many datasets are sorted by class
    pixels = torch.stack([dataset[i]["pixel_values"] for i in chosen]).to(comparison.teacher.device)
    models = {"teacher": comparison.teacher, **{name: model for name, model in students.items() if name != "last"}}
    features = {name: patch_features(model, pixels) for name, model in models.items()}
    basis = ColorBasis.fit(features["teacher"])
    colors = {ROWS[name].split(",")[0]: basis(values) for name, values in features.items()}
    low, high = pixels.amin(dim=(1, 2, 3), keepdim=True), pixels.amax(dim=(1, 2, 3), keepdim=True)
    draw_colors(path, ((pixels - low) / (high - low).clamp(min=1e-6)).cpu(), colors)


@torch.no_grad()
def measure_speed(teacher: PreTrainedModel, student: PreTrainedModel, budget: float = 20.0) -> dict[str, Any]:
    """Measure the seconds per image of teacher (SDPA) and student over growing sizes, within a time budget.

    Under bf16 autocast where the hardware multiplies bf16, else in float32. On a GPU also `teacher_bytes` and
    `student_bytes`: the peak of memory above what was in use before.

    Returns:
        `dict`: `machine`, `batch_size`, `dtype`, `autocast` (`None` without), `teacher_attention`, and one of `rows`
        per size.
    """
    models, start = {"teacher": teacher.eval(), "student": student.eval()}, time.perf_counter()
    config, device, rows = vision_config(teacher.config), teacher.device, []
    height, width = patch_size(config)
    dtype = evaluation_dtype()
    autocast = None if dtype is None else str(dtype).removeprefix("torch.")

    def run(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
        with evaluation_autocast(device.type):
            return forward_features(model, pixels)

    for side, following in pairwise((8, 16, 32, 48, 64, 96, 128, 0)):
        size = side * height, side * width
        pixels = torch.randn(1, config.num_channels, *size, device=device)
        runs = {name: partial(run, model, pixels) for name, model in models.items()}
        timings = time_in_turns(runs, device, seconds=budget / 40)
        medians = {name: timing.median for name, timing in timings.items()}
        row: dict[str, Any] = {"size": size[1], "tokens": count_tokens(config, size), **medians}
        if device.type == "cuda":
            row |= {f"{name}_bytes": peak_above(call, device) for name, call in runs.items()}
        rows.append(row)
        # softmax costs the square of the tokens, and the tokens grow with the square of the side
        forecast = 5 * sum(medians.values()) * (following / side) ** 4
        if time.perf_counter() - start + forecast > budget:
            break
    return {
        "machine": describe_machine(),
        "batch_size": 1,
        "dtype": autocast or "float32",
        "autocast": autocast,
        "teacher_attention": config._attn_implementation,
        "rows": rows,
    }


@torch.no_grad()
def measure_softmax_layers(
    lines: list[dict], teacher: PreTrainedModel, config: RecipeConfig, side: int
) -> list[dict[str, Any]]:
    """Return what 0, 1 and 2 softmax layers gain and cost: error of the features after stage 1, seconds per image.

    Empty unless stage 1 has ranked the layers (`softmax_layers="auto:K"`).

    Args:
        lines (`list[dict]`): Of `metrics.jsonl`.
        teacher (`PreTrainedModel`): Softmax model.
        config (`RecipeConfig`): Options of the student.
        side (`int`): Side in pixels of the square images that are timed.
    """
    found = next((line for line in lines if "softmax_none" in line), None)
    if found is None:
        return []
    layers = {int(name): found[f"softmax_{name}"] for name in (k.rpartition("_")[2] for k in found) if name.isdigit()}
    best, student = (
        sorted(layers, key=layers.__getitem__),
        convert(teacher, config.linear_attention, check_parity=False),
    )
    pixels = torch.randn(1, student.config.num_channels, side, side, device=teacher.device)

    def run(count: int) -> torch.Tensor:
        with in_softmax(student, best[:count]), evaluation_autocast(pixels.device.type):
            return forward_features(student, pixels)

    timings = time_in_turns({str(count): partial(run, count) for count in range(3)}, pixels.device, seconds=0.5)
    errors = (found["softmax_none"], layers[best[0]], found["softmax_best_two"])
    return [
        {"layers": best[:count], "relative_error": error, "size": side, "seconds": timings[str(count)].median}
        for count, error in enumerate(errors)
    ]


def options_added(student: PreTrainedModel, config: RecipeConfig) -> list[str]:
    """Return a line for each option of linear attention: what it is, and the parameters that it adds."""
    numbers = dict.fromkeys((".feature_map.", ".local_mixing."), 0)
    for name, parameter in student.named_parameters():
        for part in numbers:
            numbers[part] += parameter.numel() if part in name else 0
    total = student.num_parameters()
    added = {part: f"{count:,} parameters ({count / total:.1%})" for part, count in numbers.items()}
    feature_map, mixing = in_words(config)
    lines = [f"feature map {feature_map}: {added['.feature_map.']}"]
    if config.local_mixing:
        lines.append(f"{mixing}: {added['.local_mixing.']}")
    kept = vision_config(student.config).softmax_layers
    if kept:
        chosen = "auto_softmax_layers" in config.attention_alignment
        lines.append(f"softmax layers {kept}{', chosen by measurement after stage 1' if chosen else ''}")
    return lines


def draw_speed(path: Path, speed: list[dict[str, float]]) -> None:
    """Draw the time per image over resolution, of teacher and student."""
    figure = new_figure(6, 3.6)
    axes = figure.subplots()
    for name, label in (("teacher", "teacher (softmax, SDPA)"), ("student", "student (linear)")):
        axes.loglog([row["size"] for row in speed], [1000 * row[name] for row in speed], marker="o", label=label)
    sizes = [int(row["size"]) for row in speed]
    axes.set(xlabel="image side in pixels", ylabel="ms per image, batch 1")
    axes.set_xticks(sizes, labels=[str(size) for size in sizes])
    axes.xaxis.minorticks_off()
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    _save(figure, path)


def _render(
    table: list[list[str]],
    manifest: dict,
    pictures: dict[str, str],
    speed: dict,
    config: RecipeConfig,
    added: list[str],
) -> str:
    teacher_revision = f" at {plain(manifest['teacher_revision'])}" if manifest["teacher_revision"] else ""
    parity = ", ".join(f"{size}: {value:.1e}" for size, value in manifest["parity"].items())
    stages = []
    for name, facts in manifest["stages"].items():
        if facts:
            resumed = f", resumed from step {facts['resumed_from_step']}" if facts["resumed_from_step"] else ""
            stages.append(
                f"- Stage {STAGES[name].number}, {name}: {facts['steps']} steps in {facts['seconds']:.0f} s"
                f"{cost_in_words(facts)}{resumed}; {plain(facts['images'])}; {code(facts['settings'])}"
            )
    rows = [f"| {row['size']:.0f} | {row['tokens']:.0f} | {1000 * row['teacher']:.1f} | {1000 * row['student']:.1f} "
            f"| {row['teacher'] / row['student']:.2f} |" for row in speed["rows"]]  # fmt: skip
    return "\n".join(
        [
            f"# {plain(manifest['teacher'])} made linear",
            "",
            *_markdown(table),
            "",
            "Figures are of each model's own forward pass on the evaluation images. cos patches is the cosine of the"
            " mean patch feature, error is ‖student - teacher‖ / ‖teacher‖ over all tokens of the final features.",
            "",
            f"- Teacher: {code(manifest['teacher'])}{teacher_revision}, weights {manifest['teacher_sha256'][:12]}",
            f"- Data: {code(manifest['dataset'])}, fingerprint {manifest['data_fingerprint']}",
            f"- Recipe: {config.recipe}; {'; '.join(added)}",
            f"- Student: {code(asdict(config.linear_attention))}; conversion parity {parity}",
            *stages,
            f"- Machine: {manifest['machine']}; bf16 autocast {'on' if manifest['bf16'] else 'off'};"
            f" {', '.join(f'{name} {number}' for name, number in manifest['versions'].items())}",
            "",
            *(line for name, title in pictures.items() for line in (f"## {title}", "", f"![{title}]({name})", "")),
            "| side | tokens | teacher ms | student ms | teacher / student |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "Below 1 in the last column, linear attention is slower than softmax at that size.",
            "",
            *_softmax_lines(speed.get("softmax_layers", [])),
        ]
    )


def _softmax_lines(trade: list[dict]) -> list[str]:
    if not trade:
        return []
    rows = [["softmax layers", "error of the features after stage 1", f"ms at {trade[0]['size']} px"]]
    for row in trade:
        layers = ", ".join(map(str, row["layers"])) or "none"
        rows.append([layers, f"{row['relative_error']:.3f}", f"{1000 * row['seconds']:.1f}"])
    heading = "## Softmax layers: what the first two, chosen by measurement, gain and cost"
    return [heading, "", *_markdown(rows), "", "The error is on the calibration images, before stage 2.", ""]


def _markdown(table: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return [lines[0], "|" + "---|" * len(table[0]), *lines[1:]]


def _print(rows: list[list[str]]) -> None:
    table = Table()
    for index, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows[1:]:
        table.add_row(*row)
    console = Console()
    Console(width=max(console.width, 100)).print(table)


def _students(out: Path, comparison: Comparison, config: RecipeConfig) -> dict[str, PreTrainedModel]:
    """Return the student of each stage, and the last one once more as `"last"`."""
    device = comparison.teacher.device
    students = {}
    for stage in STAGES.values():
        if (out / stage.directory).is_dir():
            students[stage.name] = load_student(str(out / stage.directory)).to(device)
    if not students:
        students["converted"] = convert(comparison.teacher, config.linear_attention, check_parity=False)
    return {**students, "last": list(students.values())[-1]}


def _save(figure: Any, path: Path) -> bool:
    save_figure(figure, path, dpi=130, bbox_inches="tight")
    return True
