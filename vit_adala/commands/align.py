"""`vit-adala align`: stage 1."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from transformers import set_seed

from modeling_adala.conversion.convert import convert, student_config
from modeling_adala.conversion.loading import load_teacher_config
from trainers.attention_alignment_config import AttentionAlignmentConfig
from trainers.data.data_config import DataConfig
from trainers.runs.recipe_config import StudentConfig

from ..arguments import CommandParser
from .common import finished_before, load_data, open_folder, run_and_report


@dataclass
class AlignArguments:
    teacher: str = field(metadata={"help": "Softmax checkpoint: Hub id or folder.", "positional": "TEACHER"})


def main(arguments: Sequence[str]) -> None:
    """`vit-adala align TEACHER --dataset D [--output-dir O]`"""
    parser = CommandParser(
        "align",
        "Stage 1: each linear attention learns to give its softmax attention's output.",
        "vit-adala align facebook/dinov2-small --dataset ILSVRC/imagenet-1k",
        AlignArguments,
        StudentConfig,
        DataConfig,
        AttentionAlignmentConfig,
    )
    model_args, student_args, data_args, args = parser.parse(arguments)
    options, teacher = student_args.feature_options, model_args.teacher
    folder = open_folder("attention-alignment", args, data_args, [teacher], teacher=teacher, **asdict(student_args))
    student_config(load_teacher_config(teacher), **options)  # before any time is spent
    if finished_before(folder):
        return
    set_seed(args.seed)
    data, processor = load_data(data_args, teacher)
    args.check_evaluation(data.raw_eval is not None)
    student = convert(teacher, **options)
    run_and_report(folder, student, args, data, processor, teacher_model=teacher)
