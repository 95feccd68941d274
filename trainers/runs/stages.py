"""One stage from start to end: build its trainer, train or resume, leave a loadable checkpoint."""

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from hub_cards import write_card
from modeling_adala.configuration_adala import vision_config
from modeling_adala.conversion.folding import fold_feature_maps
from modeling_adala.errors import UsageError

from ..attention_alignment_config import AttentionAlignmentConfig
from ..attention_alignment_trainer import AttentionAlignmentTrainer
from ..base_config import AdaLATrainingArguments
from ..base_trainer import AdaLATrainer, check_finite, is_student
from ..feature_alignment_config import FeatureAlignmentConfig
from ..feature_alignment_trainer import FeatureAlignmentTrainer
from ..supervised_config import SupervisedConfig
from ..supervised_trainer import SupervisedTrainer
from .callbacks import CompactProgressCallback, MetricsFileCallback
from .facts import record_stage, training_settings
from .output_folder import LOGS, METRICS, OutputFolder


@dataclass(frozen=True)
class Stage:
    """Row of the stage table."""

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
    """Result of a finished stage: the model, wall time in seconds and steps of this process, last metrics, facts.

    `facts` are those of the main process, as `manifest.json` has them; none for a stock model.
    """

    model: PreTrainedModel
    seconds: float
    steps: int
    resumed_from_step: int
    metrics: dict[str, float]
    facts: dict[str, Any]


def run_stage(
    stage: Stage,
    model: PreTrainedModel,
    args: AdaLATrainingArguments,
    *,
    folder: OutputFolder | None = None,
    image_processor: Any | None = None,
    metrics_file: str | Path | None = None,
    facts: dict[str, Any] | None = None,
    **trainer_kwargs: Any,
) -> StageResult:
    """Run one stage, or resume where a killed run of it stopped, and leave a loadable checkpoint.

    Everything is written inside `args.output_dir`: checkpoints to resume from in `checkpoints/` while it runs, then
    the model, its card, `metrics.jsonl` and `manifest.json`.

    Args:
        stage (`Stage`): One of `STAGES`.
        model (`PreTrainedModel`): The student (stage 3: a classifier or segmenter).
        args (`AdaLATrainingArguments`): The stage's settings; `output_dir` is the stage folder.
        folder (`OutputFolder`, *optional*): The stage folder with the settings that a resumed run has to share.
            Default: those of `args`.
        image_processor (*optional*): Saved beside the model.
        metrics_file (*optional*): A `metrics.jsonl` to append to. Default: in the stage folder.
        facts (`dict`, *optional*): What the model card should say of the data, see `facts.data_facts`.
        trainer_kwargs: For the stage's trainer, such as `teacher_model`, `train_dataset`, `eval_dataset`.

    Raises:
        UsageError: If the folder holds other files, another run, or this stage finished.
        CheckpointError: If the result cannot be written (checkpoints to resume from are kept then), or if all
            checkpoints are damaged.
    """
    if args.push_to_hub:
        raise UsageError("push_to_hub=True: a stage does not push; run `vit-adala push FOLDER NAME` after it.")
    directory = Path(args.output_dir)
    if folder is None:
        folder = OutputFolder(directory, stage.name, training_settings(args))
    if folder.finished:
        raise UsageError(f"output_dir={str(directory)!r} holds this stage, finished; pass another folder.")
    args = copy.copy(args)
    args.output_dir = str(folder.checkpoints)
    with folder.claim(args.process_index == 0):
        PartialState().wait_for_everyone()
        trainer = stage.trainer_class(model=model, args=args, **trainer_kwargs)
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        if not args.disable_tqdm:
            trainer.add_callback(CompactProgressCallback(f"stage {stage.number}, {stage.name}"))
        trainer.add_callback(MetricsFileCallback(metrics_file or directory / METRICS, stage.name))
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(directory / LOGS)  # its default is among the checkpoints
        start = time.perf_counter()
        output = trainer.train(resume_from_checkpoint=True)  # fresh where there is no checkpoint
        seconds, resumed = time.perf_counter() - start, trainer.resumed_from_step

        student = _finished_student(trainer, stage)
        state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped) if student is trainer.model else None
        check_finite(student.state_dict() if state_dict is None else state_dict, f"stage {stage.name}: the weights")
        recorded: list[dict[str, Any]] = [{}]
        if trainer.is_world_process_zero():
            with folder.staging() as staging:
                student.save_pretrained(staging, state_dict=state_dict)
                if image_processor is not None:
                    image_processor.save_pretrained(staging)
                if is_student(student):
                    clock = {
                        "seconds": round(seconds, 1),
                        "steps": output.global_step - resumed,
                        "resumed_from_step": resumed,
                    }
                    recorded = [record_stage(staging, trainer, student, stage.name, **clock, **(facts or {}))]
                    write_card(staging)
        broadcast_object_list(recorded)
    return StageResult(student, seconds, output.global_step - resumed, resumed, output.metrics, recorded[0])


def _finished_student(trainer: AdaLATrainer, stage: Stage) -> PreTrainedModel:
    student = trainer.model
    if hasattr(student, "merge_and_unload"):
        student = student.merge_and_unload()
    student.requires_grad_(True)
    if is_student(student):
        vision_config(student.config).adala_stage = stage.name
        # stage 2 has learning rates for learned maps and for projections; after it they may become one
        if stage.number > 1 and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            fold_feature_maps(student)
    return student
