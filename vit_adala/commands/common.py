"""What several commands share: loading data, running one stage."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel

from hub_cards import write_card
from modeling_adala.conversion.loading import load_config, load_image_processor
from trainers.base_config import AdaLATrainingArguments
from trainers.base_trainer import is_student
from trainers.data.data_config import DataConfig, DataModule, check_streaming
from trainers.data.sources import fingerprint
from trainers.runs.callbacks import cost_in_words
from trainers.runs.checkpoints import whole_file
from trainers.runs.facts import data_facts, training_settings
from trainers.runs.output_folder import EVALUATION, OutputFolder
from trainers.runs.stages import STAGES, StageResult, run_stage

from ..doctor.environment_checks import check_cache
from ..interruption import writes_to


def load_data(config: DataConfig, model: str, require_labels: bool = False) -> tuple[DataModule, Any]:
    processor = load_image_processor(model)
    return DataModule(config, load_config(model), processor, require_labels=require_labels), processor


def open_folder(
    name: str, args: AdaLATrainingArguments, data: DataConfig, models: Sequence[str | None], **settings: Any
) -> OutputFolder:
    """Check what a stage command can know before any time is spent, its output folder first of all.

    Args:
        name (`str`): Name of the stage.
        args (`AdaLATrainingArguments`): Its settings, `output_dir` among them.
        data (`DataConfig`): Where the images come from.
        models (`Sequence[str]`): What is read besides, teacher and model; names on the Hub or folders.
        settings: All else that decides the result.

    Raises:
        UsageError: See `OutputFolder`, `check_streaming` and `check_cache`.
    """
    check_streaming(data, args.max_steps)
    of_data = {key: value for key, value in asdict(data).items() if not key.startswith("eval_")}
    named = {"dataset": data.dataset} | {key: value for key, value in settings.items() if isinstance(value, str)}
    places = {key: os.path.realpath(value) for key, value in named.items() if value and os.path.exists(value)}
    inputs = [*models, data.dataset]
    folder = OutputFolder(args.output_dir, name, of_data | settings | places | training_settings(args), inputs)
    writes_to(args.output_dir)
    check_cache()
    return folder


def finished_before(folder: OutputFolder) -> bool:
    """Return whether a stage has finished in a folder, and say so."""
    if folder.finished and PartialState().is_main_process:
        print(f"stage {STAGES[folder.command].number}, {folder.command}: already done, in {folder.path}")
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
            f"stage {stage.number}, {stage.name}: {result.steps} steps in {result.seconds:.0f} s"
            f"{cost_in_words(result.metrics)}, {train_dataset.summary()}; saved {folder.path}"
        )
    return result


def record_evaluation(directory: Path, model: PreTrainedModel, data: DataModule, figures: dict[str, float]) -> None:
    """Leave the figures of a checkpoint's own head in its folder, as `evaluation.json`, and in its card."""
    if PartialState().is_main_process:
        facts = data_facts(data) | {f"head_{name}": value for name, value in figures.items()}
        whole_file(directory / EVALUATION, json.dumps(facts, indent=2) + "\n")
        if is_student(model):
            write_card(directory)
