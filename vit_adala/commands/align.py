"""`vit-adala align`: stage 1, attention alignment."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from transformers import set_seed

from modeling_adala.configuration_adala import LinearAttentionConfig
from modeling_adala.conversion.convert import convert, student_config
from modeling_adala.conversion.loading import load_teacher, load_teacher_config
from trainers.attention_alignment_config import AttentionAlignmentConfig
from trainers.data.data_config import DataConfig

from ..arguments import CommandParser
from .common import finished_before, load_data, open_folder, run_and_report


@dataclass
class AlignArguments:
    teacher: str = field(metadata={"help": "Softmax checkpoint: Hub id or folder.", "positional": "TEACHER"})


def main(arguments: Sequence[str]) -> None:
    """Run `vit-adala align TEACHER --dataset D [--output-dir O]`."""
    parser = CommandParser(
        "align",
        "Stage 1, attention alignment: each linear attention learns the output of its teacher's softmax attention.",
        "vit-adala align facebook/dinov2-small --dataset ILSVRC/imagenet-1k",
        AlignArguments,
        LinearAttentionConfig,
        DataConfig,
        AttentionAlignmentConfig,
    )
    model_args, linear, data_args, args = parser.parse(arguments)
    name = model_args.teacher
    folder = open_folder("attention-alignment", args, data_args, [name], teacher=name, **asdict(linear))
    if finished_before(folder):
        return
    set_seed(args.seed)
    config = load_teacher_config(name)
    student_config(config, linear)  # refuses wrong options before any time is spent
    data, processor = load_data(data_args, name, config)
    args.check_evaluation(data.raw_eval is not None)
    teacher = load_teacher(name, config=config)
    run_and_report(folder, convert(teacher, linear), args, data, processor, teacher_model=teacher)
