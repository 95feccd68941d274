"""`vit-adala align`: stage 1."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import set_seed

from modeling_adala.conversion import convert, student_config
from modeling_adala.loading import load_teacher_config
from trainers.attention_alignment_config import AttentionAlignmentConfig
from trainers.data_config import DataConfig, check_streaming

from ..arguments import CommandParser, read_json_dict
from .common import TeacherArguments, finished_before, load_data, open_folder, run_and_report


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


def main(arguments: Sequence[str]) -> None:
    """`vit-adala align --teacher T --dataset D --output-dir O`"""
    parser = CommandParser(
        "align",
        "Stage 1: each linear attention learns to give its softmax attention's output.",
        (StudentArguments, DataConfig, AttentionAlignmentConfig),
        "vit-adala align --teacher facebook/dinov2-small --dataset imagenet --output-dir out/1-attention-alignment",
    )
    model_args, data_args, args = parser.parse(arguments)
    check_streaming(data_args, args.max_steps)
    options = {name: value for name, value in model_args.options.items() if value is not None}
    teacher = model_args.teacher
    folder = open_folder("attention-alignment", args, data_args, [teacher], teacher=teacher, **options)
    student_config(load_teacher_config(model_args.teacher), **options)  # before any time is spent
    if finished_before(folder):
        return
    set_seed(args.seed)
    data, processor = load_data(data_args, model_args.teacher)
    student, _ = convert(model_args.teacher, **options)
    run_and_report(folder, student, args, data, processor, teacher_model=model_args.teacher)
