"""Protocols of benchmarks/quality.py: one teacher, one data set, one budget, one evaluation for every method."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel

from modeling_adala.conversion.loading import load_config, load_image_processor, load_teacher
from trainers.base_config import evaluation_dtype
from trainers.data.data_config import DataConfig, DataModule
from trainers.data.digits import DIGITS_TEACHER
from trainers.data.segmentation_data import SegmentationData
from trainers.evaluation.comparison import Comparison
from trainers.evaluation.dense_probe import DenseProbe
from trainers.evaluation.probes import compare_features

from .common import ROOT, device

SHARED = ROOT.parent / "shared"
DINOV2 = str(SHARED / "models" / "dinov2-small-saliency")
CAMVID_CLASSES = [
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
]
FIGURES = ("cls_cosine", "patches_cosine", "patch_mean_cosine", "relative_error")

Evaluate = Callable[[PreTrainedModel], dict[str, float]]


@dataclass(frozen=True)
class Protocol:
    """Conditions under which every method is measured.

    Args:
        metric (`str`): Figure that ranks the methods, in percent.
        teacher (`str`): Softmax checkpoint.
        data (`dict`): Settings of `DataConfig`.
        labels (`list[str]`): Classes of the masks; empty for images without.
        evaluation (`Callable`): Called with teacher, data and the number of evaluation images, `None` for all; returns
            what is called with a student.
        stage_1 (`dict`), stage_2 (`dict`), stage_3 (`dict`): Steps, batch and learning rates; those of stage 2 were
            chosen with our default method (docs/experiments.md), and are the same for all.
    """

    metric: str
    teacher: str
    data: dict[str, Any]
    evaluation: Callable[[PreTrainedModel, DataModule, int | None], Evaluate]
    stage_1: dict[str, Any] = field(default_factory=dict)
    stage_2: dict[str, Any] = field(default_factory=dict)
    stage_3: dict[str, Any] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)

    def open(self, eval_images: int | None = None) -> tuple[PreTrainedModel, DataModule, Evaluate]:
        """Return teacher, data and evaluation, which remembers the teacher's figures."""
        teacher = load_teacher(self.teacher).to(device())
        data = self.open_data()
        return teacher, data, self.evaluation(teacher, data, eval_images)

    def open_data(self, require_labels: bool = False) -> DataModule:
        """Return the data, with labels for training if they are required; masks are always there."""
        images = DataConfig(**self.data), load_config(self.teacher), load_image_processor(self.teacher)
        if self.labels:
            return SegmentationData(*images, labels=self.labels)
        return DataModule(*images, require_labels=require_labels)

    def with_settings(self, stage_1: dict[str, Any], stage_2: dict[str, Any]) -> "Protocol":
        """Return a protocol with further settings of stages 1 and 2."""
        return replace(self, stage_1=self.stage_1 | stage_1, stage_2=self.stage_2 | stage_2)

    def scaled(self, factor: float) -> "Protocol":
        """Return a protocol with `factor` times the steps in stages 1 and 2."""
        one, two = ({"max_steps": round(factor * stage["max_steps"])} for stage in (self.stage_1, self.stage_2))
        return self.with_settings(one, two)


def budget(steps: int, images: int, learning_rate: float, **settings: Any) -> dict[str, Any]:
    """Return the settings of a stage that sees `steps * images` images."""
    return {"max_steps": steps, "per_device_train_batch_size": images, "learning_rate": learning_rate, **settings}


def image_figures(teacher: PreTrainedModel, data: DataModule, eval_images: int | None, **options: Any) -> Evaluate:
    """Return the comparison of features, k-NN, linear probe, and the accuracy of a classifier."""
    comparison = Comparison(teacher, data, eval_images=eval_images, disable_progress=True, **options)
    accuracy = comparison.classifier_accuracy(teacher)
    both = [f"{who}_{name}" for who in ("student", "teacher") for name in ("knn_accuracy", "linear_probe_accuracy")]
    wanted = [*FIGURES, *both, "head_accuracy"]

    def evaluate(student: PreTrainedModel) -> dict[str, float]:
        found = comparison(student)
        figures = {name: found[name] for name in wanted if name in found}
        return figures if accuracy is None else figures | {"teacher_head_accuracy": accuracy}

    return evaluate


def dense_figures(teacher: PreTrainedModel, data: Any, eval_images: int | None) -> Evaluate:
    """Return the comparison of features, and the frozen segmentation probe."""
    options: dict[str, Any] = {"autocast_dtype": evaluation_dtype(), "disable_progress": True}
    probe = DenseProbe(teacher, data, train_images=eval_images or 2000, eval_images=eval_images, **options)
    loader = data.loader(data.eval_dataset(eval_images))
    batches = [{"pixel_values": batch["pixel_values"]} for batch in loader]

    def evaluate(student: PreTrainedModel) -> dict[str, float]:
        found, *_ = compare_features(teacher, student, batches, **options)
        return {**{name: found[name] for name in FIGURES}, **probe(student)}

    return evaluate


def camvid(size: str, steps: int, learning_rate: float = 4e-5) -> Protocol:
    """Return the protocol of street scenes of a size, with a stage 2 of as many steps at a learning rate."""
    folder = str(SHARED / "data" / "camvid")
    data = {"dataset": folder, "label_column": "label", "eval_split": "validation", "crop_scale": 0.5}
    one, two = budget(100, 8, 1e-3), budget(steps, 8, learning_rate, new_learning_rate=5e-4)
    three, data = budget(200, 8, 3e-5), {**data, "image_size": size}
    return Protocol("student_mean_iou", DINOV2, data, dense_figures, one, two, three, CAMVID_CLASSES)


PROTOCOLS = {
    "digits": Protocol(
        "head_accuracy",
        str(DIGITS_TEACHER),
        {"dataset": "mnist-digits", "image_size": "28", "crop_scale": 0.8, "horizontal_flip": 0.0},
        lambda teacher, data, count: image_figures(teacher, data, count, knn_images=count or 500, probe=False),
        budget(100, 32, 1e-3),
        budget(100, 32, 1e-4, new_learning_rate=5e-4),
        budget(60, 32, 5e-5),
    ),
    "dense": camvid("168x224", 120),
    "dense-1e-4": camvid("168x224", 120, 1e-4),
    "dense-large": camvid("336x448", 150),
    "images": Protocol(
        "student_knn_accuracy",
        DINOV2,
        {"dataset": str(SHARED / "data" / "cifar10"), "image_size": "112", "eval_split": "test"},
        lambda teacher, data, count: image_figures(teacher, data, count or 1000),
        budget(300, 16, 1e-3),
        budget(400, 16, 1e-5, new_learning_rate=5e-4),
        budget(300, 16, 3e-5),
    ),
}
