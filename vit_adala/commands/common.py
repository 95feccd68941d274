"""Helpers of several commands: loading data, running a stage, recording an evaluation."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PretrainedConfig, PreTrainedModel

from hub_cards import write_card
from hub_cards.records import EVALUATION, EVALUATIONS, write_json
from modeling_adala.conversion.loading import load_image_processor
from trainers.base_config import AdaLATrainingArguments
from trainers.base_trainer import is_student
from trainers.data.data_config import DataConfig, DataModule, check_streaming
from trainers.data.segmentation_data import SegmentationData, read_labels
from trainers.data.sources import fingerprint
from trainers.runs.callbacks import cost_in_words
from trainers.runs.facts import data_facts, training_settings
from trainers.runs.output_folder import OutputFolder
from trainers.runs.stages import STAGES, StageResult, run_stage

from ..doctor.environment_checks import check_cache
from ..interruption import writes_to


def load_data(
    config: DataConfig, model: str, model_config: PretrainedConfig, require_labels: bool = False
) -> tuple[DataModule, Any]:
    """Return the data for a model and the model's image processor."""
    processor = load_image_processor(model)
    return DataModule(config, model_config, processor, require_labels=require_labels), processor


def load_masks(
    config: DataConfig,
    model_config: PretrainedConfig,
    image_processor: Any,
    labels: str | None,
    reduce_labels: bool,
    window: tuple[int, int] | None = None,
) -> SegmentationData:
    """Return images with masks; `labels` are class names as the command line writes them."""
    names = None if labels is None else read_labels(labels)
    return SegmentationData(
        config, model_config, image_processor, labels=names, reduce_labels=reduce_labels, window=window
    )


def open_folder(
    name: str, args: AdaLATrainingArguments, data: DataConfig, models: Sequence[str | None], **settings: Any
) -> OutputFolder:
    """Return the output folder of a stage command, after the checks that can be made before any time is spent.

    Args:
        name (`str`): Name of the stage.
        args (`AdaLATrainingArguments`): Its settings, `output_dir` among them.
        data (`DataConfig`): Where the images come from.
        models (`Sequence[str]`): Teacher and model, folders or Hub ids.
        settings: Everything else that decides the result.

    Raises:
        UsageError: See `OutputFolder`, `check_streaming` and `check_cache`.
    """
    check_streaming(data, args.max_steps)
    of_data = {key: value for key, value in asdict(data).items() if not key.startswith("eval_")}
    inputs = [*models, data.dataset]
    settings = absolute(of_data | settings) | training_settings(args)
    folder = OutputFolder(args.output_dir, name, settings, inputs)
    writes_to(args.output_dir)
    check_cache()
    return folder


def absolute(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with absolute paths for the names of existing files and folders."""
    return {
        name: os.path.realpath(value) if isinstance(value, str) and value and os.path.exists(value) else value
        for name, value in settings.items()
    }


def finished_before(folder: OutputFolder) -> bool:
    """Return whether a command has finished in a folder, and say so."""
    if folder.finished and PartialState().is_main_process:
        print(f"{EVALUATIONS.get(folder.command, folder.command)}: already done, in {folder.path}")
    return folder.finished


def run_and_report(
    folder: OutputFolder, model: Any, args: AdaLATrainingArguments, data: DataModule, image_processor: Any, **kwargs
) -> StageResult:
    """Run the stage of a folder and print one line on what it took."""
    train_dataset = data.train_dataset(args.seed)
    if args.eval_strategy != "no" and "eval_dataset" not in kwargs:
        kwargs["eval_dataset"] = data.eval_dataset()
    stage = STAGES[folder.command]
    folder.settings["data_fingerprint"] = fingerprint(data.raw_train)
    kwargs |= {"image_processor": image_processor, "train_dataset": train_dataset, "facts": data_facts(data)}
    result = run_stage(stage, model, args, folder=folder, **kwargs)
    if PartialState().is_main_process:
        print(
            f"{EVALUATIONS[stage.name]}: {result.steps} steps in {result.seconds:.0f} s"
            f"{cost_in_words(result.metrics)}, {train_dataset.summary()}; saved {folder.path}"
        )
    return result


def record_evaluation(directory: Path, model: PreTrainedModel, data: DataModule, figures: dict[str, float]) -> None:
    """Write the figures of a checkpoint's own head into its folder, as `evaluation.json` and in its card."""
    if PartialState().is_main_process:
        facts = data_facts(data) | {f"head_{name}": value for name, value in figures.items()}
        write_json(directory / EVALUATION, facts)
        if is_student(model):
            write_card(directory)
