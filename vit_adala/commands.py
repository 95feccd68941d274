"""The commands: from parsed arguments to the functions of `trainers`."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from rich.console import Console
from rich.table import Table
from transformers import set_seed

from modeling_adala.conversion import convert, load_config, load_teacher, load_teacher_config, student_config
from modeling_adala.errors import UsageError
from modeling_adala.families import get_family
from trainers.attention_alignment_config import AttentionAlignmentConfig
from trainers.base_trainer import check_pair
from trainers.comparison import Comparison
from trainers.data_config import DataConfig, DataModule, check_counts
from trainers.feature_alignment_config import FeatureAlignmentConfig
from trainers.recipe import load_image_processor, run_recipe
from trainers.recipe_config import RecipeConfig
from trainers.stages import STAGES, check_stage_directory, load_classifier, load_student, run_stage
from trainers.supervised_config import SupervisedConfig

from .arguments import CommandParser, HelpFormatter, parse_settings, print_json, read_json_dict


@dataclass
class TeacherArguments:
    teacher: str = field(metadata={"help": "Softmax checkpoint: Hub id or folder."})


@dataclass
class StudentArguments(TeacherArguments):
    feature_map: str | None = field(default=None, metadata={"help": "phi: elu, exp, hedgehog, relu or t2r."})
    feature_map_kwargs: str = field(default="{}", metadata={"help": "Options of the feature map, as JSON."})
    softmax_layers: list[int] = field(default_factory=list, metadata={"help": "Layers that keep softmax."})

    @property
    def options(self) -> dict[str, Any]:
        return {
            "feature_map": self.feature_map,
            "feature_map_kwargs": read_json_dict("feature_map_kwargs", self.feature_map_kwargs),
            "softmax_layers": self.softmax_layers,
        }


@dataclass
class DistillArguments(TeacherArguments):
    model: str | None = field(
        default=None, metadata={"help": "Folder that stage 1 left. Default: convert the teacher, stage 2 alone."}
    )
    lora_r: int | None = field(default=None, metadata={"help": "Train LoRA adapters of this rank, merged at the end."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
        metadata={"help": "Modules that get adapters."},
    )


@dataclass
class FinetuneArguments:
    model: str = field(metadata={"help": "Linear checkpoint (folder of stage 2) or a softmax one as the baseline."})
    task: str = field(default="image-classification", metadata={"help": "image-classification."})


@dataclass
class EvaluateArguments(TeacherArguments):
    model: str = field(metadata={"help": "The student: an AdaLA checkpoint."})
    knn_images: int = field(default=2000, metadata={"help": "Training images for k-NN and linear probe."})
    eval_images: int | None = field(default=None, metadata={"help": "Evaluation images. Default: all."})
    json: bool = field(default=False, metadata={"help": "Print JSON and nothing else on stdout."})


def run(arguments: Sequence[str]) -> None:
    """`vit-adala run [RECIPE.yaml] [--teacher T --dataset D ...]`"""
    parser = argparse.ArgumentParser(
        prog="vit-adala run",
        usage="vit-adala run [RECIPE.yaml] [options]",
        description="Runs all stages. Killed at any point, the same command goes on.",
        epilog="example: vit-adala run --teacher facebook/dinov2-small --dataset uoft-cs/cifar10 --image-size 112"
        " --set feature_alignment.max_steps=2000. Settings win in this order: flags, --set, recipe, default.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("recipe", nargs="?", help="a YAML of the settings below")
    parser.add_argument("--from-stage", "--from_stage", type=int, help="run stage N and those after it again")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any setting, dotted")
    stages = {stage.name.replace("-", "_") for stage in STAGES.values()}
    for item in dataclasses.fields(RecipeConfig):
        if item.name not in stages:
            flags = dict.fromkeys(("--" + item.name.replace("_", "-"), "--" + item.name))
            parser.add_argument(*flags, dest=item.name, metavar="VALUE", help=item.metadata.get("help"))
    parser.add_argument("--help-all", action="store_true", help="the same; stage settings: vit-adala align --help-all")
    if "--help-all" in arguments:
        arguments = ["--help"]
    parsed, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise UsageError(f"unrecognized arguments: {' '.join(unknown)}; see vit-adala run --help")
    overrides = parse_settings(parsed.set)
    names = {item.name for item in dataclasses.fields(RecipeConfig)}
    given = {name: value for name, value in vars(parsed).items() if name in names and value is not None}
    hints = get_type_hints(RecipeConfig)
    for name, value in given.items():  # a path is what it is, whatever YAML would make of 2024 or [a]
        is_text = hints[name] in (str, str | None)
        overrides |= {name: value} if is_text else parse_settings([f"{name}={value}"])
    if parsed.recipe is not None:
        config = RecipeConfig.from_yaml(parsed.recipe, **overrides)
    else:
        unknown_names = sorted(set(overrides) - names)
        if unknown_names:
            raise UsageError(f"--set {unknown_names[0]}=...: no such setting; see vit-adala run --help")
        config = RecipeConfig(**overrides)
    report = run_recipe(config, from_stage=parsed.from_stage)
    print(f"report: {report}")


def align(arguments: Sequence[str]) -> None:
    """`vit-adala align --teacher T --dataset D --output-dir O`"""
    parser = CommandParser(
        "align",
        "Stage 1: each linear attention learns to give its softmax attention's output.",
        (StudentArguments, DataConfig, AttentionAlignmentConfig),
        "vit-adala align --teacher facebook/dinov2-small --dataset imagenet --output-dir out/1-attention-alignment",
    )
    model_args, data_args, args = parser.parse(arguments)
    options = {name: value for name, value in model_args.options.items() if value is not None}
    student_config(load_teacher_config(model_args.teacher), **options)  # before any time is spent
    set_seed(args.seed)
    data, processor = _data(data_args, model_args.teacher)
    student, _ = convert(model_args.teacher, **options)
    _run("attention-alignment", student, args, data, processor, teacher_model=model_args.teacher)


def distill(arguments: Sequence[str]) -> None:
    """`vit-adala distill --teacher T --model O/1-attention-alignment --dataset D --output-dir O`"""
    parser = CommandParser(
        "distill",
        "Stage 2: the whole student learns the teacher's final features.",
        (DistillArguments, DataConfig, FeatureAlignmentConfig),
        "vit-adala distill --teacher facebook/dinov2-small --model out/1-attention-alignment --dataset imagenet"
        " --output-dir out/2-feature-alignment",
    )
    model_args, data_args, args = parser.parse(arguments)
    check_counts(lora_r=model_args.lora_r)
    load_teacher_config(model_args.teacher)
    if model_args.model is not None:
        check_stage_directory(model_args.model, ("attention-alignment", "converted", "feature-alignment"), "stage 2")
    set_seed(args.seed)
    data, processor = _data(data_args, model_args.teacher)
    student = load_student(model_args.model) if model_args.model is not None else convert(model_args.teacher)[0]
    peft_config = None
    if model_args.lora_r is not None:
        _check_lora(model_args, student)
        from peft import LoraConfig

        peft_config = LoraConfig(r=model_args.lora_r, target_modules=model_args.lora_target_modules)
    options = {"teacher_model": model_args.teacher, "peft_config": peft_config}
    _run("feature-alignment", student, args, data, processor, **options)


def finetune(arguments: Sequence[str]) -> None:
    """`vit-adala finetune --model O/2-feature-alignment --dataset D --output-dir O`"""
    parser = CommandParser(
        "finetune",
        "Stage 3: trains a classifier; give it the softmax teacher to get the baseline under the same command.",
        (FinetuneArguments, DataConfig, SupervisedConfig),
        "vit-adala finetune --model out/2-feature-alignment --dataset uoft-cs/cifar10 --output-dir out/3-supervised",
    )
    model_args, data_args, args = parser.parse(arguments)
    if model_args.task != "image-classification":
        raise UsageError(f"task={model_args.task!r} is not supported; choose image-classification.")
    config = load_config(model_args.model)
    get_family(config.model_type)
    if config.model_type.startswith("adala_"):
        check_stage_directory(
            model_args.model, ("feature-alignment", "supervised", "attention-alignment", "converted"), "stage 3"
        )
    set_seed(args.seed)
    data, processor = _data(data_args, model_args.model, require_labels=True)
    model = load_classifier(model_args.model, data.labels or [])
    result = _run("supervised", model, args, data, processor, eval_dataset=data.eval_dataset())
    if data.raw_eval is not None:
        metrics = Comparison(model, data, probe=False).classifier_accuracy(result.model.to(model.device))
        print(f"accuracy {metrics:.4f} on {len(data.raw_eval):,} images")


def evaluate(arguments: Sequence[str]) -> None:
    """`vit-adala evaluate --teacher T --model S --dataset D [--json]`"""
    parser = CommandParser(
        "evaluate",
        "Teacher beside student, each on its own forward pass.",
        (EvaluateArguments, DataConfig),
        "vit-adala evaluate --teacher facebook/dinov2-small --model out/2-feature-alignment --dataset uoft-cs/cifar10",
    )
    model_args, data_args = parser.parse(arguments)
    check_counts(knn_images=model_args.knn_images, eval_images=model_args.eval_images)
    load_teacher_config(model_args.teacher)
    student = load_student(model_args.model)
    teacher = load_teacher(model_args.teacher)
    check_pair(teacher, student)
    data, _ = _data(data_args, model_args.teacher)
    if data.raw_eval is None:
        raise UsageError(f"dataset={data_args.dataset!r} has no test or validation split; pass --eval-split.")
    comparison = Comparison(teacher, data, knn_images=model_args.knn_images, eval_images=model_args.eval_images)
    results = comparison(student)
    teacher_accuracy = comparison.classifier_accuracy(teacher)
    if teacher_accuracy is not None:
        results["teacher_head_accuracy"] = teacher_accuracy
    if model_args.json:
        print_json(results)
        return
    table = Table("", "student", "teacher")
    for name, value in results.items():
        if name.startswith("teacher_") or not isinstance(value, float):
            continue
        other = results.get("teacher_" + name.removeprefix("student_"), "")
        table.add_row(name.removeprefix("student_"), f"{value:.4f}", f"{other:.4f}" if other != "" else "")
    Console().print(table)


def _check_lora(args: DistillArguments, student: Any) -> None:
    modules = {name.rsplit(".", 1)[-1] for name, module in student.named_modules() if hasattr(module, "in_features")}
    unknown = [name for name in args.lora_target_modules if name.rsplit(".", 1)[-1] not in modules]
    if unknown and args.lora_target_modules != DistillArguments("").lora_target_modules:
        raise UsageError(f"lora_target_modules={unknown}: no such modules; choose from {', '.join(sorted(modules))}.")


def _data(config: DataConfig, model: str, require_labels: bool = False) -> tuple[DataModule, Any]:
    processor = load_image_processor(model)
    return DataModule(config, load_config(model), processor, require_labels=require_labels), processor


def _run(name: str, model: Any, args: Any, data: DataModule, image_processor: Any, **kwargs: Any) -> Any:
    directory = Path(args.output_dir)
    train_dataset = data.train_dataset(args.seed)
    if args.eval_strategy != "no" and "eval_dataset" not in kwargs:
        kwargs["eval_dataset"] = data.eval_dataset()
    stage = STAGES[name]
    result = run_stage(stage, model, args, image_processor=image_processor, train_dataset=train_dataset, **kwargs)
    print(
        f"stage {stage.number}, {stage.name}: {result.steps} steps in {result.seconds:.0f} s,"
        f" {train_dataset.summary()}; saved {directory}"
    )
    return result
