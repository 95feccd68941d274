"""What several commands share: loading data, running one stage."""

import json
from pathlib import Path
from typing import Any

from accelerate import PartialState

from hub_cards import write_card
from modeling_adala.conversion import load_config
from trainers.base_trainer import is_student
from trainers.checkpoints import whole_file
from trainers.data_config import DataConfig, DataModule
from trainers.facts import data_facts
from trainers.monitoring import cost_in_words
from trainers.recipe import load_image_processor
from trainers.stages import STAGES, StageResult, run_stage


def load_data(config: DataConfig, model: str, require_labels: bool = False) -> tuple[DataModule, Any]:
    processor = load_image_processor(model)
    return DataModule(config, load_config(model), processor, require_labels=require_labels), processor


def run_and_report(
    name: str, model: Any, args: Any, data: DataModule, image_processor: Any, **kwargs: Any
) -> StageResult:
    directory = Path(args.output_dir)
    train_dataset = data.train_dataset(args.seed)
    if args.eval_strategy != "no" and "eval_dataset" not in kwargs:
        kwargs["eval_dataset"] = data.eval_dataset()
    stage = STAGES[name]
    kwargs |= {"image_processor": image_processor, "train_dataset": train_dataset, "facts": data_facts(data)}
    result = run_stage(stage, model, args, **kwargs)
    if PartialState().is_main_process:
        print(
            f"stage {stage.number}, {stage.name}: {result.steps} steps in {result.seconds:.0f} s"
            f"{cost_in_words(result.metrics)}, {train_dataset.summary()}; saved {directory}"
        )
    return result


def record_evaluation(result: StageResult, data: DataModule, figures: dict[str, float]) -> None:
    """Leaves the figures of a checkpoint's own head in its folder, as `evaluation.json`, and in its card."""
    if PartialState().is_main_process:
        facts = data_facts(data) | {f"head_{name}": value for name, value in figures.items()}
        whole_file(result.directory / "evaluation.json", json.dumps(facts, indent=2) + "\n")
        if is_student(result.model):
            write_card(result.directory)
