"""The records that a run leaves beside a checkpoint: their files, their figures, and how they are read and written.

- `manifest.json`: of a checkpoint `teacher_license`, `versions`, and `stages` (the facts of each stage, by name); of a
  run also `teacher`, `dataset`, `machine`, ..., and `evaluations` (the figures of each row of `EVALUATIONS`);
- `evaluation.json`: figures of one checkpoint, and the data that they were taken on;
- `speed.json`: `machine`, `batch_size`, `dtype`, `autocast`, and `rows` with seconds per image;
- `metrics.jsonl`: log of the training, one JSON object a line.

A record that cannot be read counts as missing.
"""

import functools
import json
import logging
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, metadata_load
from huggingface_hub.utils import HFValidationError, validate_repo_id

from modeling_adala.errors import CheckpointError

MANIFEST, EVALUATION, SPEED, METRICS = "manifest.json", "evaluation.json", "speed.json", "metrics.jsonl"


@dataclass(frozen=True)
class Figure:
    """Figure of merit of an evaluation.

    Args:
        student (`str`), teacher (`str`, *optional*): Keys of the student's and of the teacher's figure in a record.
        name (`str`), heading (`str`): Name in a card, and heading of its column in a report.
        form (`str`): Format.
        type (`str`, *optional*), task (`str`, *optional*, defaults to `"image-classification"`): On the Hub.
    """

    student: str
    teacher: str | None
    name: str
    heading: str
    form: str
    type: str | None = None
    task: str = "image-classification"


# columns of the tables in cards and reports
FIGURES = (
    Figure("head_accuracy", "teacher_head_accuracy", "Accuracy", "accuracy", "{:.1%}", "accuracy"),
    Figure("head_mean_iou", "teacher_head_mean_iou", "Mean IoU", "mIoU", "{:.1%}", "mean_iou", "image-segmentation"),
    Figure("student_knn_accuracy", "teacher_knn_accuracy", "k-NN accuracy", "k-NN", "{:.1%}", "accuracy"),
    Figure(
        "student_linear_probe_accuracy",
        "teacher_linear_probe_accuracy",
        "Linear probe accuracy",
        "probe",
        "{:.1%}",
        "accuracy",
    ),
    Figure(
        "student_mean_iou",
        "teacher_mean_iou",
        "Mean IoU of a linear probe",
        "probe mIoU",
        "{:.1%}",
        "mean_iou",
        "image-segmentation",
    ),
    Figure("cls_cosine", None, "Cosine to the teacher, class token", "cos CLS", "{:.4f}"),
    Figure("patch_mean_cosine", None, "Cosine to the teacher, mean patch", "cos patches", "{:.4f}"),
    Figure("relative_error", None, "Relative error of the features", "error", "{:.3f}"),
)
IMAGES = Figure("num_eval_images", None, "images", "images", "{:,.0f}")
# rows of those tables: what is evaluated in a run, in order
EVALUATIONS = {
    "teacher": "teacher (softmax)",
    "converted": "converted, untrained",
    "attention-alignment": "stage 1, attention alignment",
    "feature-alignment": "stage 2, feature alignment",
    "supervised": "stage 3, supervised fine-tuning",
    "control": "stage 2 alone, same wall time",
}

logger = logging.getLogger(__name__)

# stage folders of a run: a number and the stage
_STAGE_FOLDER = re.compile(r"\d+-(?P<stage>.+)")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in one step: it is the old one or the new one, never half of it.

    Raises:
        CheckpointError: If it cannot be written.
    """
    path = Path(path)
    staging = path.with_name(f".{path.name}.writing")
    try:
        staging.write_text(text, encoding="utf-8")
        os.replace(staging, path)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise CheckpointError(f"could not write {path}: {error}. Free some space or check the permissions.") from error


def write_json(path: str | Path, record: dict[str, Any]) -> None:
    """Write a record, see `write_text`."""
    write_text(path, json.dumps(record, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is none, with a warning if the file is there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s is left out of the card: %s", path, str(error).splitlines()[0])
        return {}
    return mapping(content)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the complete lines of a `metrics.jsonl`; none if there is no such file."""
    lines = []
    if Path(path).is_file():
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):  # such as the line that was being written when a process was killed
                continue
            if isinstance(content, dict):
                lines.append(content)
    return lines


def append_metrics(path: str | Path, values: dict[str, Any]) -> None:
    """Append one line to a `metrics.jsonl`, after ending a line that a kill may have cut short."""
    with Path(path).open("a+b") as file:
        torn = False
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write(b"\n" * torn + json.dumps(values).encode() + b"\n")


def run_directory(directory: Path) -> Path | None:
    """Return the folder of the run that a stage folder belongs to: its parent, if that has a record of the stage."""
    directory = directory.absolute()
    found = _STAGE_FOLDER.fullmatch(directory.name)
    if found is None or found["stage"] not in mapping(read_json(directory.parent / MANIFEST).get("stages")):
        return None
    return directory.parent


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, merged with that of its run; its own entries take precedence.

    `stages` holds the checkpoint's stage and those before it.
    """
    own, run = read_json(directory / MANIFEST), run_directory(directory)
    if run is None:
        return own
    whole = read_json(run / MANIFEST)
    names = list(whole["stages"])
    names = names[: names.index(directory.absolute().name.partition("-")[2]) + 1]
    stages = {name: whole["stages"][name] for name in names}
    return {**whole, **own, "stages": stages | mapping(own.get("stages"))}


@functools.cache
def find_license(teacher: str | None, revision: str | None = None, *, download: bool = False) -> dict[str, str]:
    """Return `license`, `license_name` and `license_link` as the teacher's card states them; empty if unknown.

    Args:
        teacher (`str`, *optional*): Folder or Hub id.
        revision (`str`, *optional*): Commit of the Hub id; without it, the teacher is a folder.
        download (`bool`, *optional*, defaults to `False`): Ask the Hub for a card that is not in the cache.
    """
    try:
        if revision is not None and hub_id(teacher):
            card = Path(hf_hub_download(str(teacher), "README.md", revision=revision, local_files_only=not download))
        else:
            card = Path(teacher or "") / "README.md"
        metadata = metadata_load(card) if card.is_file() else None
    except (OSError, ValueError) as error:  # no such card, no network, no valid YAML
        logger.info("license of %s: not known (%s)", teacher, str(error).splitlines()[0])
        return {}
    return license_of(metadata)


def license_of(record: Any) -> dict[str, str]:
    """Return the license fields of a card's metadata."""
    fields = {name: one_line(mapping(record).get(name)) for name in ("license", "license_name", "license_link")}
    return {name: value for name, value in fields.items() if value}


def hub_id(name: Any) -> str | None:
    """Return the name if it is a valid repo id of the Hub, else `None`."""
    try:
        validate_repo_id(name)
    except (HFValidationError, TypeError):
        return None
    return name


def mapping(value: Any) -> dict[str, Any]:
    """Return the value if it is a `dict`, else an empty one."""
    return value if isinstance(value, dict) else {}


def number(value: Any) -> float | None:
    """Return the value if it is a finite number, else `None`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def one_line(value: Any) -> str | None:
    """Return a text on one line and without control characters; `None` for anything else, or if nothing is left."""
    if not isinstance(value, str):
        return None
    return "".join(character for character in " ".join(value.split()) if character.isprintable()) or None
