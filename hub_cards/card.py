"""Renders the facts of a checkpoint as a model card. Anything that comes from a record appears as plain text."""

import json
import os
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from .card_data import PICTURES, AdaLACardData, dataset_name, last_part
from .exports import ACCURACIES
from .records import EVALUATIONS, FIGURES, IMAGES, Figure, mapping, number, one_line, write_text
from .usage import onnx_usage, usage

_MARKDOWN = re.compile(r"[\\`*_\[\]~$#!^]|:(?=//)|(?<=www)\.|@")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"}


class Markdown(str):
    """Text that is put into the card as it is. All other values are escaped."""


def build_card(directory: str | Path, repo_id: str | None = None) -> ModelCard:
    """Return the model card of a checkpoint folder for the Hub, where the pictures are beside it.

    Args:
        directory (`str` or `Path`): The checkpoint.
        repo_id (`str`, *optional*): Repository on the Hub, which the examples then open.

    Raises:
        CheckpointError, DataError, UsageError: See `AdaLACardData.from_checkpoint`.

    Example:

    ```python
    card = build_card("out/2-feature-alignment")
    print(card.content)
    ```
    """
    return render_card(AdaLACardData.from_checkpoint(directory, repo_id))


def write_card(directory: str | Path, repo_id: str | None = None, **stated: Any) -> Path:
    """Write `README.md` into a checkpoint folder, unless it would not change; pictures are linked where they are.

    Args:
        directory, repo_id, stated: See `AdaLACardData.from_checkpoint`.

    Raises:
        CheckpointError: If it cannot be written, or see `build_card`.

    Example:

    ```python
    write_card("out/2-feature-alignment")  # writes README.md
    ```
    """
    directory = Path(directory)
    data = AdaLACardData.from_checkpoint(directory, repo_id, **stated)
    links = {path.name: Path(os.path.relpath(path, directory)).as_posix() for path in data.pictures}
    path, content = directory / "README.md", str(render_card(data, links))
    if not path.is_file() or path.read_bytes() != content.encode():
        write_text(path, content)
    return path


def render_card(data: AdaLACardData, links: dict[str, str] | None = None) -> ModelCard:
    """Return the card of these facts; `links` says where pictures are, by name. Default: beside the card."""
    shown = {path.name for path in data.pictures}
    content = _template().render(
        metadata=Markdown(data.metadata().to_yaml()),
        card=data,
        base_url=Markdown(f"https://huggingface.co/{data.base_model}"),
        usage=Markdown(usage(data)),
        remote_usage=Markdown(usage(data, trust_remote_code=True)) if data.has_remote_code else "",
        onnx=onnx_rows(data),
        onnx_usage=Markdown(onnx_usage(data)) if data.exports else "",
        results=result_rows(data),
        history=history_rows(data),
        stages=stage_rows(data),
        speed=speed_rows(data),
        conditions=speed_conditions(data.speed),
        details=training_details(data),
        dataset=dataset_name(data.protocol),
        pictures={
            name: Markdown(f"![{title}]({(links or {}).get(name, name)})")
            for name, title in PICTURES.items()
            if name in shown
        },
    )
    return ModelCard(re.sub(r"\n{3,}", "\n\n", content))


def onnx_rows(data: AdaLACardData) -> list[list[str]]:
    """Return the ONNX graphs: heading and rows; columns without an entry are left out."""
    columns = [["", *(export.name for export in data.exports)], ["type", *(export.kind for export in data.exports)]]
    columns.append(["image size", *(", ".join(export.sizes) or "any" for export in data.exports)])
    columns.append(["batch", *(str(export.batch or "any") for export in data.exports)])
    columns.append(["MB", *(f"{export.size / 1e6:,.1f}" for export in data.exports)])
    differences = [export.difference for export in data.exports]
    columns.append(["largest difference", *("" if value is None else f"{value:.1e}" for value in differences)])
    for name in dict.fromkeys(name for export in data.exports for name in export.accuracy):
        pairs = [export.accuracy.get(name) for export in data.exports]
        heading = f"{ACCURACIES.get(name, name)} before, after"
        columns.append([heading, *("" if pair is None else f"{pair[0]:.1%}, {pair[1]:.1%}" for pair in pairs)])
    return _rows(columns)


def result_rows(data: AdaLACardData) -> list[list[str]]:
    """Return teacher and student, figure by figure: heading and rows; no teacher if none was measured."""
    taken = [metric for metric in FIGURES if metric.student in data.evaluation]
    columns = [["", *(metric.name for metric in taken)]]
    columns.append(
        ["softmax teacher", *(_figure(metric, data.evaluation.get(metric.teacher or "")) for metric in taken)]
    )
    columns.append(["this model", *(_figure(metric, data.evaluation[metric.student]) for metric in taken)])
    return _rows(columns)


def history_rows(data: AdaLACardData) -> list[list[str]]:
    """Return the figures after each stage: heading and rows; columns without a figure are left out."""
    if len(data.history) < 2:
        return []
    columns = [["", *(stage_title(name) for name in data.history)]]
    for metric in (*FIGURES, IMAGES):
        values = [figures.get(metric.student) for figures in data.history.values()]
        columns.append([metric.name, *(_figure(metric, value) for value in values)])
    return _rows(columns)


def stage_rows(data: AdaLACardData) -> list[list[str]]:
    """Return the training, stage by stage: heading and rows; columns without an entry are left out."""
    columns = [["", *(stage_title(name) for name in data.stages)]]
    records = list(data.stages.values())
    columns.append(
        ["data", *(dataset_name(facts if "dataset" in facts else data.manifest) or "" for facts in records)]
    )
    for heading, name in {"images": "images", "hardware": "machine"}.items():
        columns.append([heading, *(one_line(facts.get(name, data.manifest.get(name))) or "" for facts in records)])
    steps = [(number(facts.get("steps")), number(facts.get("resumed_from_step"))) for facts in records]
    columns.append(["steps", *("" if last is None else _count(last + (first or 0)) for last, first in steps)])
    columns.append(["images per step", *(_count(facts.get("images_per_step")) for facts in records)])
    columns.append(["time", *(_seconds(facts) for facts in records)])
    return _rows(columns)


def speed_rows(data: AdaLACardData) -> list[list[str]]:
    """Return time and memory over resolution: heading and rows; columns without a figure are left out."""
    rows = data.speed.get("rows")
    measured = [row for row in rows if number(mapping(row).get("student"))] if isinstance(rows, list) else []
    columns: list[list[str]] = []
    for heading, name, scale, form in (
        ("side in pixels", "size", 1, "{:.0f}"),
        ("tokens", "tokens", 1, "{:,.0f}"),
        ("teacher, ms", "teacher", 1e3, "{:.1f}"),
        ("this model, ms", "student", 1e3, "{:.1f}"),
        ("teacher, MiB", "teacher_bytes", 2**-20, "{:,.1f}"),
        ("this model, MiB", "student_bytes", 2**-20, "{:,.1f}"),
    ):
        values = [number(row.get(name)) for row in measured]
        columns.append([heading, *("" if value is None else form.format(value * scale) for value in values)])
    ratios = [(number(row.get("teacher")), row["student"]) for row in measured]
    columns.append(["times as fast", *("" if one is None else f"{one / other:.2f}" for one, other in ratios)])
    return _rows(columns)


def speed_conditions(speed: dict[str, Any]) -> list[str]:
    """Return the conditions under which the speed was measured, as far as they are on record."""
    batch = number(speed.get("batch_size"))
    conditions = [f"batch {batch:.0f}"] if batch else []
    for name, text in {
        "autocast": "{} autocast",
        "teacher_attention": "teacher with {} attention",
        "machine": "on {}",
    }.items():
        value = one_line(speed.get(name))
        conditions += [text.format(value)] if value else []
    return conditions


def training_details(data: AdaLACardData) -> list[Markdown]:
    """Return the settings of each stage, versions, and what identifies teacher and data."""
    lines: dict[str, Any] = {
        f"Settings of {stage_title(name)}": mapping(facts.get("settings")) for name, facts in data.stages.items()
    }
    versions = mapping(data.manifest.get("versions"))
    lines["Software"] = ", ".join(f"{name} {value}" for name, value in versions.items() if isinstance(value, str))
    lines["SHA256 of the teacher's weights"] = one_line(data.manifest.get("teacher_sha256"))
    lines["Fingerprint of the training data"] = one_line(data.manifest.get("data_fingerprint"))
    return [Markdown(f"{plain(name)}: {code(value)}") for name, value in lines.items() if value]


def stage_title(name: str) -> str:
    return EVALUATIONS.get(name, name)


def plain(value: Any) -> Markdown:
    """Return a value as text on one line that Markdown and HTML readers show as it is."""
    if isinstance(value, Markdown):
        return value
    line = one_line(str(value)) or ""
    line = "".join(_HTML.get(character, character) for character in line)
    return Markdown(_MARKDOWN.sub(lambda found: "\\" + found[0], line))


def code(value: Any) -> Markdown:
    """Return a value in a code span, fenced by more backticks than it holds in a row. Not for tables."""
    line = one_line(value if isinstance(value, str) else json.dumps(value)) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    padding = " " if line.startswith("`") or line.endswith("`") else ""
    return Markdown(f"{fence}{padding}{line}{padding}{fence}")


def table(rows: Iterable[list[str]]) -> Markdown:
    """Return rows of cells as a Markdown table; the first is its heading."""
    lines = ["| " + " | ".join(plain(cell) for cell in row) + " |" for row in rows]
    columns = lines[0].count("|") - 1
    return Markdown("\n".join([lines[0], "|" + " --- |" * columns, *lines[1:]]))


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader(__package__),
        finalize=plain,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code, "table": table, "count": _count, "size": _size, "last_part": last_part}
    return environment.get_template("model_card.md.jinja")


def _rows(columns: list[list[str]]) -> list[list[str]]:
    """Return columns with a heading each as rows, without empty columns; nothing if all are empty."""
    filled = [column for column in columns if any(column[1:])]
    return [list(row) for row in zip(*filled, strict=True)]


def _figure(metric: Figure, value: float | None) -> str:
    return "" if value is None else metric.form.format(value)


def _count(value: Any) -> str:
    found = number(value)
    return "" if found is None else f"{found:,.0f}"


def _size(value: Any) -> str:
    """Return the side of a square, or height and width."""
    sides = list(map(number, value if isinstance(value, list | tuple) else [value]))
    sides = sides[: len(set(sides))]
    return " x ".join(f"{side:.0f}" for side in sides if side)


def _seconds(facts: dict[str, Any]) -> str:
    seconds, resumed = number(facts.get("seconds")), number(facts.get("resumed_from_step"))
    if seconds is None:
        return ""
    return f"{seconds:,.0f} s" + (f" from step {resumed:,.0f} on" if resumed else "")
