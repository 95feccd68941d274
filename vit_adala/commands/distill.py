"""`vit-adala distill`: stage 2."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, set_seed

from modeling_adala.conversion import convert
from modeling_adala.errors import UsageError
from modeling_adala.families import transformer_blocks
from modeling_adala.loading import check_stage_directory, load_student, load_teacher_config
from trainers.data_config import DataConfig, check_counts, check_streaming
from trainers.feature_alignment_config import FeatureAlignmentConfig

from ..arguments import CommandParser
from .common import TeacherArguments, finished_before, load_data, open_folder, run_and_report


@dataclass
class DistillArguments(TeacherArguments):
    model: str | None = field(
        default=None, metadata={"help": "Folder that stage 1 left. Default: convert the teacher, stage 2 alone."}
    )
    lora_r: int | None = field(default=None, metadata={"help": "Train LoRA adapters of this rank, merged at the end."})
    lora_target_modules: list[str] = field(
        default_factory=list, metadata={"help": "Modules that get adapters. Default: all of attention and MLP."}
    )


def main(arguments: Sequence[str]) -> None:
    """`vit-adala distill --teacher T --model O/1-attention-alignment --dataset D --output-dir O`"""
    parser = CommandParser(
        "distill",
        "Stage 2: the whole student learns the teacher's final features.",
        (DistillArguments, DataConfig, FeatureAlignmentConfig),
        "vit-adala distill --teacher facebook/dinov2-small --model out/1-attention-alignment --dataset imagenet"
        " --output-dir out/2-feature-alignment",
    )
    model_args, data_args, args = parser.parse(arguments)
    check_streaming(data_args, args.max_steps)
    check_counts(lora_r=model_args.lora_r)
    names = {"teacher": model_args.teacher, "model": model_args.model}
    lora = {"lora_r": model_args.lora_r, "lora_target_modules": model_args.lora_target_modules}
    folder = open_folder("feature-alignment", args, data_args, list(names.values()), **names, **lora)
    load_teacher_config(model_args.teacher)
    if model_args.model is not None:
        check_stage_directory(model_args.model, ("attention-alignment", "converted", "feature-alignment"), "stage 2")
    if finished_before(folder):
        return
    set_seed(args.seed)
    data, processor = load_data(data_args, model_args.teacher)
    student = load_student(model_args.model) if model_args.model is not None else convert(model_args.teacher)[0]
    peft_config = None
    if model_args.lora_r is not None:
        from peft import LoraConfig

        targets = _lora_targets(student, model_args.lora_target_modules)
        peft_config = LoraConfig(r=model_args.lora_r, target_modules=targets)
    options = {"teacher_model": model_args.teacher, "peft_config": peft_config}
    run_and_report(folder, student, args, data, processor, **options)


def _lora_targets(student: PreTrainedModel, chosen: list[str]) -> list[str]:
    """Full names of the linear modules in the blocks of the vision tower, or of those with a chosen last name."""
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
