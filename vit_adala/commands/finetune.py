"""`vit-adala finetune`: stage 3, supervised fine-tuning."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PretrainedConfig, set_seed

from hub_cards.records import EVALUATION, METRICS, append_metrics
from modeling_adala.conversion.loading import (
    check_stage_directory,
    load_classifier,
    load_config,
    load_image_processor,
    load_segmenter,
)
from modeling_adala.errors import UsageError
from modeling_adala.families import get_family, is_adala
from trainers.alignment_trainer import check_configs
from trainers.data.data_config import DataConfig
from trainers.evaluation.comparison import Comparison
from trainers.evaluation.segmentation import evaluate_segmentation, segmentation_processor
from trainers.runs.output_folder import OutputFolder
from trainers.supervised_config import SupervisedConfig

from ..arguments import CommandParser
from .common import finished_before, load_data, load_masks, open_folder, record_evaluation, run_and_report


@dataclass
class FinetuneArguments:
    model: str = field(
        metadata={
            "help": "Linear checkpoint (folder of stage 2), or a softmax one as the baseline.",
            "positional": "MODEL",
        }
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Softmax model of the same shape to learn from beside the labels, fine-tuned or pretrained."
        },
    )
    task: str = field(
        default="image-classification", metadata={"help": "image-classification or semantic-segmentation."}
    )
    labels: str | None = field(
        default=None,
        metadata={
            "help": "Segmentation: class names, a,b,c or a JSON file. Default: those of the data, otherwise numbers."
        },
    )
    reduce_labels: bool = field(
        default=False, metadata={"help": "Segmentation: mask value 0 is ignored, 1 is the first class (ADE20K)."}
    )


def main(arguments: Sequence[str]) -> None:
    """Run `vit-adala finetune MODEL --dataset D [--output-dir O]`."""
    parser = CommandParser(
        "finetune",
        "Stage 3, supervised fine-tuning: train a classifier or a segmenter. With the softmax teacher as MODEL, it"
        " trains the baseline in the same way.",
        "vit-adala finetune out/2-feature-alignment --dataset uoft-cs/cifar10",
        FinetuneArguments,
        DataConfig,
        SupervisedConfig,
    )
    model_args, data_args, args = parser.parse(arguments)
    if model_args.task not in TASKS:
        raise UsageError(f"task={model_args.task!r} is not supported; choose from {', '.join(TASKS)}.")
    _check_metric(args.metric_for_best_model, model_args.task)
    models = [model_args.model, model_args.teacher]
    folder = open_folder("supervised", args, data_args, models, **asdict(model_args))
    config = load_config(model_args.model)
    get_family(config.model_type)
    if model_args.teacher is not None:
        check_configs(load_config(model_args.teacher), config)
    args.check_teacher(model_args.teacher is not None)
    if is_adala(config):
        check_stage_directory(
            model_args.model, ("feature-alignment", "supervised", "attention-alignment", "converted"), "stage 3"
        )
    if folder.finished and (folder.path / EVALUATION).is_file():
        finished_before(folder)
        return
    set_seed(args.seed)
    TASKS[model_args.task](folder, model_args, config, data_args, args)


def _classify(
    folder: OutputFolder,
    model_args: FinetuneArguments,
    config: PretrainedConfig,
    data_args: DataConfig,
    args: SupervisedConfig,
) -> None:
    for name, value in {**vars(model_args), "window": args.window, "stride": args.stride}.items():
        if name in ("labels", "reduce_labels", "window", "stride") and value:
            raise UsageError(f"{name}={value!r} is for --task semantic-segmentation; leave it out.")
    data, processor = load_data(data_args, model_args.model, config, require_labels=True)
    args.check_evaluation(data.raw_eval is not None)
    # a kill may have come between the end of the training and the evaluation
    model = load_classifier(str(folder.path) if finished_before(folder) else model_args.model, data.labels or [])
    if not folder.finished:
        options = {"eval_dataset": data.eval_dataset(), "teacher_model": model_args.teacher}
        model = run_and_report(folder, model, args, data, processor, **options).model
    if data.raw_eval is not None:
        accuracy = Comparison(model, data, probe=False).classifier_accuracy(model.to(args.device))
        assert accuracy is not None  # data and model were opened for classification
        record_evaluation(folder.path, model, data, {"accuracy": accuracy})
        if args.process_index == 0:
            print(f"accuracy {accuracy:.4f} on {len(data.raw_eval):,} images")


def _segment(
    folder: OutputFolder,
    model_args: FinetuneArguments,
    config: PretrainedConfig,
    data_args: DataConfig,
    args: SupervisedConfig,
) -> None:
    processor, windows = load_image_processor(model_args.model), args.windows
    window = None if windows is None else windows[0]
    data = load_masks(data_args, config, processor, model_args.labels, model_args.reduce_labels, window)
    dataset: Any = data.eval_dataset()
    args.check_evaluation(dataset is not None)
    model = load_segmenter(str(folder.path) if finished_before(folder) else model_args.model, data.labels)
    if not folder.finished:
        processor = segmentation_processor(processor, data.image_size)
        options = {"eval_dataset": dataset, "teacher_model": model_args.teacher}
        model = run_and_report(folder, model, args, data, processor, **options).model
    if dataset is None:
        return
    metrics = evaluate_segmentation(
        model.to(args.device),
        data.loader(dataset) or [],
        windows=windows,
        autocast_dtype=torch.bfloat16 if args.bf16 else None,
        disable_progress=args.disable_tqdm or None,
    )
    if args.process_index == 0:
        line = {"stage": "supervised"} | {f"eval_{name}": value for name, value in metrics.items()}
        append_metrics(folder.path / METRICS, line)
        record_evaluation(folder.path, model, data, metrics)
        _print_table(metrics, data.labels)
        print(f"mean IoU {metrics['mean_iou']:.4f} on {dataset.summary()}")


def _check_metric(metric: str | None, task: str) -> None:
    name = (metric or "loss").removeprefix("eval_")
    if name != "loss" and (name == "accuracy") != (task == "image-classification"):
        other = "accuracy" if task == "image-classification" else "mean_iou"
        raise UsageError(f"metric_for_best_model={metric!r} is not reported for {task}; choose loss or {other}.")


def _print_table(metrics: dict[str, float], labels: list[str]) -> None:
    table = Table("", "IoU")
    for label in labels:
        value = metrics.get(f"iou_{label}")
        plain = Text("".join(c if c.isprintable() else " " for c in label))  # no markup, no control characters
        table.add_row(plain, "" if value is None else f"{value:.4f}")
    table.add_section()
    for name in ("mean_iou", "mean_accuracy", "pixel_accuracy"):
        table.add_row(name.replace("_", " ").replace("iou", "IoU"), f"{metrics[name]:.4f}")
    Console().print(table)


TASKS = {"image-classification": _classify, "semantic-segmentation": _segment}
