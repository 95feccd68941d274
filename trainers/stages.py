"""One stage from start to end: build its trainer, train or resume, leave a loadable checkpoint."""

import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from hub_cards import write_card
from modeling_adala.configuration_adala import vision_config

from .attention_alignment_config import AttentionAlignmentConfig
from .attention_alignment_trainer import AttentionAlignmentTrainer
from .base_config import AdaLATrainingArguments
from .base_trainer import AdaLATrainer, is_student
from .callbacks import CompactProgressCallback, MetricsFileCallback
from .checkpoints import complete_checkpoints, step_of, whole_directory
from .facts import record_stage
from .feature_alignment_config import FeatureAlignmentConfig
from .feature_alignment_trainer import FeatureAlignmentTrainer
from .supervised_config import SupervisedConfig
from .supervised_trainer import SupervisedTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """A row of the stage table."""

    number: int
    name: str
    config_class: type[AdaLATrainingArguments]
    trainer_class: type[AdaLATrainer]

    @property
    def directory(self) -> str:
        return f"{self.number}-{self.name}"


STAGES = {
    stage.name: stage
    for stage in (
        Stage(1, "attention-alignment", AttentionAlignmentConfig, AttentionAlignmentTrainer),
        Stage(2, "feature-alignment", FeatureAlignmentConfig, FeatureAlignmentTrainer),
        Stage(3, "supervised", SupervisedConfig, SupervisedTrainer),
    )
}


@dataclass(frozen=True)
class StageResult:
    """What a finished stage reports: its checkpoint, wall time in seconds and steps of this process, last metrics."""

    directory: Path
    model: PreTrainedModel
    seconds: float
    steps: int
    resumed_from_step: int
    metrics: dict[str, float]


def checkpoints_directory(stage_directory: Path) -> Path:
    """Where the resumable checkpoints of a stage are kept while it runs, so that its own folder appears whole."""
    return stage_directory.parent / "checkpoints" / stage_directory.name


def remove_checkpoints(stage_directory: Path) -> None:
    """Removes the resumable checkpoints of a stage, and the folder that held them if it was the last."""
    work = checkpoints_directory(stage_directory)
    shutil.rmtree(work, ignore_errors=True)
    if work.parent.is_dir() and not any(work.parent.iterdir()):
        work.parent.rmdir()


def run_stage(
    stage: Stage,
    model: PreTrainedModel,
    args: AdaLATrainingArguments,
    *,
    image_processor: Any | None = None,
    metrics_file: str | Path | None = None,
    facts: dict[str, Any] | None = None,
    **trainer_kwargs: Any,
) -> StageResult:
    """Runs one stage, or goes on where a killed run of it stopped, and writes the stage folder.

    Args:
        stage (`Stage`): One of `STAGES`.
        model (`PreTrainedModel`): The student (stage 3: a classifier).
        args (`AdaLATrainingArguments`): The stage's settings; `output_dir` is the stage folder.
        image_processor (*optional*): Saved beside the model.
        metrics_file (*optional*): A `metrics.jsonl` to append to. Default: beside the stage folder.
        facts (`dict`, *optional*): What the model card should say of the data, see `facts.data_facts`.
        trainer_kwargs: For the stage's trainer, such as `teacher_model`, `train_dataset`, `eval_dataset`.

    Raises:
        CheckpointError: if the result cannot be written; checkpoints to go on from are kept then.
    """
    directory = Path(args.output_dir)
    work = checkpoints_directory(directory)
    args.output_dir = str(work)
    trainer = stage.trainer_class(model=model, args=args, **trainer_kwargs)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if not args.disable_tqdm:
        trainer.add_callback(CompactProgressCallback(f"stage {stage.number}, {stage.name}"))
    trainer.add_callback(MetricsFileCallback(metrics_file or directory.parent / "metrics.jsonl", stage.name))

    found = complete_checkpoints(work)
    resumed = step_of(found[-1]) if found else 0
    if resumed:
        logger.warning("stage %d, %s: going on from step %d", stage.number, stage.name, resumed)
    start = time.perf_counter()
    output = trainer.train(resume_from_checkpoint=True)
    seconds = time.perf_counter() - start

    student = _finished_student(trainer, stage)
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped) if student is trainer.model else None
    if trainer.is_world_process_zero():
        with whole_directory(directory) as staging:
            student.save_pretrained(staging, state_dict=state_dict)
            if image_processor is not None:
                image_processor.save_pretrained(staging)
            if is_student(student):
                clock = {
                    "seconds": round(seconds, 1),
                    "steps": output.global_step - resumed,
                    "resumed_from_step": resumed,
                }
                record_stage(staging, trainer, student, stage.name, **clock, **(facts or {}))
                write_card(staging)
        remove_checkpoints(directory)
    trainer.accelerator.wait_for_everyone()
    return StageResult(directory, student, seconds, output.global_step - resumed, resumed, output.metrics)


def _finished_student(trainer: AdaLATrainer, stage: Stage) -> PreTrainedModel:
    student = trainer.model
    if hasattr(student, "merge_and_unload"):
        student = student.merge_and_unload()
    student.requires_grad_(True)
    if is_student(student):
        vision_config(student.config).adala_stage = stage.name
    return student
