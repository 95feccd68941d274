"""`vit-adala finetune`: stage 3."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import set_seed

from modeling_adala.conversion import load_config
from modeling_adala.errors import UsageError
from modeling_adala.families import get_family
from trainers.comparison import Comparison
from trainers.data_config import DataConfig
from trainers.stages import check_stage_directory, load_classifier
from trainers.supervised_config import SupervisedConfig

from ..arguments import CommandParser
from .common import load_data, run_and_report


@dataclass
class FinetuneArguments:
    model: str = field(metadata={"help": "Linear checkpoint (folder of stage 2) or a softmax one as the baseline."})
    task: str = field(default="image-classification", metadata={"help": "image-classification."})


def main(arguments: Sequence[str]) -> None:
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
    data, processor = load_data(data_args, model_args.model, require_labels=True)
    model = load_classifier(model_args.model, data.labels or [])
    result = run_and_report("supervised", model, args, data, processor, eval_dataset=data.eval_dataset())
    if data.raw_eval is not None:
        metrics = Comparison(model, data, probe=False).classifier_accuracy(result.model.to(model.device))
        print(f"accuracy {metrics:.4f} on {len(data.raw_eval):,} images")
