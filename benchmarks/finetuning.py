"""Stage 3 at equal steps: the softmax teacher, and students after each stage, with and without a teacher term.

    python -m benchmarks.finetuning --protocol dense --methods "power + mixing" --jobs 2
    python -m benchmarks.finetuning --protocol dense --methods paper --stages converted "stage 1" "stage 2 alone"
    python -m benchmarks.finetuning --protocol dense --methods "power + mixing" --with-teacher

The teacher of the teacher term is the softmax model that is fine-tuned in the same way. Students come from
benchmarks/students.py, finished cells are skipped.
"""

import argparse
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from modeling_adala import load_teacher
from modeling_adala.conversion.folding import fold_feature_maps
from modeling_adala.conversion.loading import load_classifier, load_segmenter
from trainers import SupervisedConfig, SupervisedTrainer
from trainers.base_config import evaluation_dtype, has_fast_bf16
from trainers.data.data_config import DataModule
from trainers.evaluation.comparison import Comparison
from trainers.evaluation.segmentation import evaluate_segmentation

from .common import RESULTS, parser, run_script, write_result
from .methods import METHODS
from .protocols import PROTOCOLS, Protocol
from .quality import SMOKE_BUDGET, SMOKE_IMAGES, run_all, slug
from .students import ALONE, KEPT, QUIET, STAGES, Students, digest, seconds_of

SOFTMAX = "softmax"
CHOICES = [SOFTMAX, *(name for name, method in METHODS.items() if method.counterpart is None)]


@dataclass(frozen=True)
class Cell:
    """Cell of the comparison.

    Args:
        protocol (`str`): Name in `PROTOCOLS`.
        method (`str`): Name in `METHODS`, or `"softmax"` for the teacher itself.
        stage (`str`): The one that fine-tuning starts from.
        with_teacher (`bool`): Learn from the fine-tuned teacher beside the labels.
        seed (`int`): Of head, data and student.
        smoke (`bool`): One step of each stage.
    """

    protocol: str
    method: str
    stage: str = STAGES[-1]
    with_teacher: bool = False
    seed: int = 0
    smoke: bool = False

    @property
    def path(self) -> Path:
        """File of its result."""
        parts = [
            slug(self.method),
            "" if self.stage == STAGES[-1] else slug(self.stage),
            "teacher" * self.with_teacher,
        ]
        return RESULTS / "finetuning" / self.protocol / f"{'-'.join(filter(None, parts))}-{self.seed}.json"


def main() -> None:
    """Run the cells that the command line names."""
    options = parser(__doc__)
    options.add_argument("--protocol", choices=PROTOCOLS, default="digits")
    options.add_argument("--methods", nargs="+", choices=CHOICES, default=[SOFTMAX, "power + mixing"])
    options.add_argument("--stages", nargs="+", choices=[*STAGES, ALONE], default=[STAGES[-1]])
    options.add_argument("--with-teacher", action="store_true", help="learn from the fine-tuned teacher, too")
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--jobs", type=int, default=1, help="processes of one thread each; 1 takes all threads")
    arguments = options.parse_args()
    run_all([partial(run_cell, cell) for cell in cells_of(arguments)], arguments.jobs)


def cells_of(arguments: argparse.Namespace) -> list[Cell]:
    """Return the cells that are not done; the teacher has no stages, and no teacher."""
    cells = []
    for seed, method, stage in product(arguments.seeds, arguments.methods, arguments.stages):
        softmax = method == SOFTMAX
        stage, with_teacher = STAGES[-1] if softmax else stage, arguments.with_teacher and not softmax
        cells.append(Cell(arguments.protocol, method, stage, with_teacher, seed, arguments.smoke))
    return [cell for cell in dict.fromkeys(cells) if cell.smoke or not cell.path.exists()]


def run_cell(cell: Cell) -> Path:
    """Fine-tune and evaluate one model, and return the file of its result."""
    transformers_logging.disable_progress_bar()
    protocol = PROTOCOLS[cell.protocol]
    if cell.smoke:
        shorter = {name: SMOKE_BUDGET[name] for name in ("max_steps", "per_device_train_batch_size")}
        protocol = protocol.with_settings(SMOKE_BUDGET, SMOKE_BUDGET)
        protocol = replace(protocol, stage_3=protocol.stage_3 | shorter)
    data = protocol.open_data(require_labels=True)
    before, budget = 0.0, {"stage_3": protocol.stage_3}
    if cell.method == SOFTMAX:
        model, seconds = fine_tuned_teacher(protocol, data, cell.seed)
    else:
        teacher = load_teacher(protocol.teacher)
        students = Students(protocol, METHODS[cell.method], cell.seed, teacher, data)
        trained, budget = students.after(cell.stage), students.budget | budget
        fold_feature_maps(trained.student)  # as a run does after stage 2
        with tempfile.TemporaryDirectory() as folder:
            trained.student.save_pretrained(folder)
            model = with_head(folder, protocol, data)
        beside = fine_tuned_teacher(protocol, data, cell.seed)[0] if cell.with_teacher else None
        before, seconds = trained.seconds, fine_tune(model, protocol, data, cell.seed, beside)
    metric, figure = evaluate(model, protocol, data, SMOKE_IMAGES if cell.smoke else None)
    row = {"row": "fine-tuned", "seconds": seconds, "seconds_before": before, metric: figure}
    facts: dict[str, Any] = {
        "protocol": cell.protocol,
        "method": cell.method,
        "stage": cell.stage,
        "with_teacher": cell.with_teacher,
        "seed": cell.seed,
        "metric": metric,
        "budget": budget,
        "bf16": has_fast_bf16(),
    }
    output = None if cell.smoke else cell.path
    path = write_result(f"finetuning-{cell.path.stem}", [row], smoke=cell.smoke, output=output, **facts)
    print(f"{path}\n{cell.protocol}: {cell.path.stem}: {metric} {figure:.2%}")
    return path


def fine_tuned_teacher(protocol: Protocol, data: DataModule, seed: int) -> tuple[PreTrainedModel, float]:
    """Return the softmax model after fine-tuning, trained once and kept, and its seconds."""
    steps = protocol.stage_3["max_steps"]
    readable = f"{slug(Path(protocol.teacher).name)}-{slug(protocol.metric)}-{steps}-{seed}"
    facts = [protocol.teacher, protocol.data, protocol.labels, protocol.stage_3, seed, has_fast_bf16()]
    folder = KEPT / "softmax" / readable / digest(facts)
    folder.parent.mkdir(parents=True, exist_ok=True)
    clock = folder.with_suffix(".seconds")
    with FileLock(f"{folder}.lock"):
        if not clock.exists():
            model = with_head(protocol.teacher, protocol, data)
            seconds = fine_tune(model, protocol, data, seed)
            model.save_pretrained(folder)
            clock.write_text(str(seconds))
        return with_head(str(folder), protocol, data), float(clock.read_text())


def with_head(checkpoint: str, protocol: Protocol, data: DataModule) -> PreTrainedModel:
    """Return a checkpoint as a segmenter or classifier of the classes of the data."""
    open_it = load_segmenter if protocol.labels else load_classifier
    return open_it(checkpoint, protocol.labels or data.labels or [])


def fine_tune(
    model: PreTrainedModel, protocol: Protocol, data: DataModule, seed: int, teacher: PreTrainedModel | None = None
) -> float:
    """Run stage 3 and return its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        args = SupervisedConfig(output_dir=folder, **protocol.stage_3, **QUIET, seed=seed)
        images = data.train_dataset(seed)
        return seconds_of(SupervisedTrainer(model, args, train_dataset=images, teacher_model=teacher).train)


def evaluate(
    model: PreTrainedModel, protocol: Protocol, data: DataModule, eval_images: int | None
) -> tuple[str, float]:
    """Return the metric of the task and its value."""
    if protocol.labels:
        loader: Any = data.loader(data.eval_dataset(eval_images))
        options: dict[str, Any] = {"autocast_dtype": evaluation_dtype(), "disable_progress": True}
        return "mean_iou", evaluate_segmentation(model, loader, **options)["mean_iou"]
    comparison = Comparison(model, data, eval_images=eval_images, probe=False, disable_progress=True)
    accuracy = comparison.classifier_accuracy(model)
    assert accuracy is not None  # data and model were opened for classification
    return "accuracy", accuracy


if __name__ == "__main__":
    run_script(main)
