"""`vit-adala distill`: stage 2, feature alignment."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, set_seed

from modeling_adala.configuration_adala import LinearAttentionConfig, has_linear_layers, vision_config
from modeling_adala.conversion.convert import convert, student_config
from modeling_adala.conversion.loading import (
    check_stage_directory,
    load_config,
    load_student,
    load_teacher,
    load_teacher_config,
)
from modeling_adala.errors import UsageError
from modeling_adala.inspection.towers import transformer_blocks
from trainers.base_config import COUNT
from trainers.data.data_config import DataConfig
from trainers.feature_alignment_config import FeatureAlignmentConfig
from trainers.runs.settings import check_settings

from ..arguments import LINEAR_ATTENTION, CommandParser
from .common import finished_before, load_data, open_folder, run_and_report


@dataclass
class DistillArguments:
    model: str = field(
        metadata={
            "help": "Folder of stage 1 or of convert, or a softmax checkpoint: it is converted and its own teacher.",
            "positional": "MODEL",
        }
    )
    teacher: str | None = field(default=None, metadata={"help": "Softmax checkpoint that a linear MODEL came from."})
    lora_r: int | None = field(
        default=None, metadata={"help": "Train LoRA adapters of this rank, merged at the end.", "range": COUNT}
    )
    lora_target_modules: list[str] = field(
        default_factory=list, metadata={"help": "Modules that get adapters. Default: all of attention and MLP."}
    )

    def __post_init__(self):
        check_settings(self, {})
        if self.lora_target_modules and self.lora_r is None:
            raise UsageError(f"lora_target_modules={self.lora_target_modules} needs a rank; also pass --lora-r 16.")


def main(arguments: Sequence[str]) -> None:
    """Run `vit-adala distill MODEL [--teacher T] --dataset D [--output-dir O]`."""
    parser = CommandParser(
        "distill",
        "Stage 2, feature alignment: the whole student learns the teacher's final features.",
        "vit-adala distill out/1-attention-alignment --teacher facebook/dinov2-small --dataset ILSVRC/imagenet-1k",
        DistillArguments,
        LinearAttentionConfig,
        DataConfig,
        FeatureAlignmentConfig,
    )
    model_args, linear, data_args, args = parser.parse(arguments)
    name, models = model_args.model, [model_args.teacher, model_args.model]
    folder = open_folder("feature-alignment", args, data_args, models, **asdict(model_args) | asdict(linear))
    config = load_config(name)
    is_student = has_linear_layers(config)
    _check_teacher(model_args, config, {key: getattr(linear, key) for key in LINEAR_ATTENTION if key in parser.given})
    width = vision_config(config).hidden_size
    if model_args.lora_r is not None and model_args.lora_r > width:
        raise UsageError(f"lora_r={model_args.lora_r} is more than the {width} channels of the model; 16 is usual.")
    if is_student:
        check_stage_directory(name, ("converted", "attention-alignment", "feature-alignment"), "stage 2")
    if finished_before(folder):
        return
    set_seed(args.seed)
    teacher_name = model_args.teacher if is_student else name
    teacher_config = load_teacher_config(teacher_name) if is_student else config
    if not is_student:
        student_config(config, linear)  # refuses wrong options before any time is spent
    data, processor = load_data(data_args, teacher_name, teacher_config)
    args.check_evaluation(data.raw_eval is not None)
    teacher = load_teacher(teacher_name, config=teacher_config)
    student = load_student(name) if is_student else convert(teacher, linear)
    peft_config = None
    if model_args.lora_r is not None:
        from peft import LoraConfig

        targets = _lora_targets(student, model_args.lora_target_modules)
        peft_config = LoraConfig(r=model_args.lora_r, target_modules=targets)
    run_and_report(folder, student, args, data, processor, teacher_model=teacher, peft_config=peft_config)


def _check_teacher(args: DistillArguments, config: PretrainedConfig, options: dict[str, Any]) -> None:
    is_student, name = has_linear_layers(config), args.model
    if is_student and args.teacher is None:
        recorded = getattr(vision_config(config), "teacher_name_or_path", None)
        origin = f" (converted from {recorded!r})" if recorded else ""
        raise UsageError(f"teacher is missing: {name!r} is a linear student{origin}; pass --teacher.")
    if is_student and options:
        option, value = next(iter(options.items()))
        raise UsageError(
            f"{option}={value!r} is for converting a softmax model, and {name!r} is linear; leave it out."
        )
    if not is_student and args.teacher not in (None, name):
        raise UsageError(
            f"teacher={args.teacher!r}: {name!r} is a softmax model and its own teacher; leave --teacher out."
        )


def _lora_targets(student: PreTrainedModel, chosen: list[str]) -> list[str]:
    """Return the names of the linear modules in the vision tower's blocks, all or those whose last part is chosen."""
    in_blocks = {id(module) for block in transformer_blocks(student) for module in block.modules()}
    names = [
        name
        for name, module in student.named_modules()
        if id(module) in in_blocks and isinstance(module, torch.nn.Linear)
    ]
    known = sorted({name.rsplit(".", 1)[-1] for name in names})
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        raise UsageError(f"lora_target_modules={unknown}: no such modules; choose from {', '.join(known)}.")
    return [name for name in names if not chosen or name.rsplit(".", 1)[-1] in chosen]
