"""`vit-adala evaluate`: a student beside its teacher."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from modeling_adala.conversion.loading import load_image_processor, load_student, load_teacher
from modeling_adala.errors import UsageError
from trainers.alignment_trainer import check_pair
from trainers.base_config import COUNT
from trainers.data.data_config import DataConfig, DataModule
from trainers.evaluation.comparison import Comparison
from trainers.evaluation.dense_probe import DenseProbe
from trainers.runs.facts import data_facts
from trainers.runs.settings import check_settings

from ..arguments import CommandParser, print_json
from ..doctor.environment_checks import check_cache
from .common import load_data, load_masks


@dataclass
class EvaluateArguments:
    model: str = field(metadata={"help": "Student: an AdaLA checkpoint.", "positional": "MODEL"})
    teacher: str = field(metadata={"help": "Softmax checkpoint: Hub id or folder."})
    knn_images: int = field(
        default=2000, metadata={"help": "Training images for k-NN and linear probe.", "range": COUNT}
    )
    eval_images: int | None = field(
        default=None, metadata={"help": "Evaluation images. Default: all.", "range": COUNT}
    )
    task: str = field(
        default="image-classification",
        metadata={"help": "Also semantic-segmentation: a linear probe of the patch features against masks."},
    )
    labels: str | None = field(default=None, metadata={"help": "Segmentation: class names, as for finetune."})
    reduce_labels: bool = field(default=False, metadata={"help": "Segmentation: 0 stands for no class, as in ADE20K."})
    json: bool = field(default=False, metadata={"help": "Print JSON and nothing else on stdout."})

    def __post_init__(self):
        check_settings(self, {})
        if self.task not in ("image-classification", "semantic-segmentation"):
            raise UsageError(
                f"task={self.task!r} is not supported; choose from image-classification, semantic-segmentation."
            )


def main(arguments: Sequence[str]) -> None:
    """Run `vit-adala evaluate MODEL --teacher T --dataset D [--json]`."""
    parser = CommandParser(
        "evaluate",
        "Evaluate a student beside its teacher, each on its own forward pass: k-NN, linear probe, features.",
        "vit-adala evaluate out/2-feature-alignment --teacher facebook/dinov2-small --dataset uoft-cs/cifar10",
        EvaluateArguments,
        DataConfig,
    )
    model_args, data_args = parser.parse(arguments)
    check_cache()
    teacher = load_teacher(model_args.teacher)
    student = load_student(model_args.model)
    check_pair(teacher, student)
    if model_args.task == "semantic-segmentation":
        processor = load_image_processor(model_args.teacher)
        masks = load_masks(data_args, teacher.config, processor, model_args.labels, model_args.reduce_labels)
        _check_split(masks, data_args)
        options: dict[str, Any] = {"train_images": model_args.knn_images, "eval_images": model_args.eval_images}
        _show(DenseProbe(teacher, masks, **options)(student), masks, model_args.json)
        return
    for name, value in (("labels", model_args.labels), ("reduce_labels", model_args.reduce_labels)):
        if value:
            raise UsageError(f"{name}={value!r} is for --task semantic-segmentation; leave it out.")
    data, _ = load_data(data_args, model_args.teacher, teacher.config)
    _check_split(data, data_args)
    comparison = Comparison(teacher, data, knn_images=model_args.knn_images, eval_images=model_args.eval_images)
    results = comparison(student)
    teacher_accuracy = comparison.classifier_accuracy(teacher)
    if teacher_accuracy is not None:
        results["teacher_head_accuracy"] = teacher_accuracy
    _show(results, data, model_args.json)


def _check_split(data: DataModule, config: DataConfig) -> None:
    if data.raw_eval is None:
        raise UsageError(f"dataset={config.dataset!r} has no test or validation split; pass --eval-split.")


def _show(results: dict[str, Any], data: DataModule, as_json: bool) -> None:
    if as_json:
        print_json(data_facts(data) | results)
        return
    table = Table("", "student", "teacher")
    for name, value in results.items():
        if name.startswith("teacher_") or not isinstance(value, float):
            continue
        other = results.get("teacher_" + name.removeprefix("student_"), "")
        table.add_row(name.removeprefix("student_"), f"{value:.4f}", f"{other:.4f}" if other != "" else "")
    Console().print(table)
