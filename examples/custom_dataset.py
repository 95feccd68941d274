"""Train on data of your own: a PyTorch dataset and one of `datasets`, through all three stages.

    python examples/custom_dataset.py --output_dir out/bits

With --smoke, only a few steps of each stage:

    python examples/custom_dataset.py --smoke

The task is made up from the embedded digits: is it a zero or a one? Folders, parquet files and Hub ids need no code:
`vit-adala run --dataset` takes them.
"""

import argparse

import datasets
import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

from modeling_adala import convert, native_size
from trainers import (
    DIGITS_TEACHER,
    AttentionAlignmentConfig,
    AttentionAlignmentTrainer,
    FeatureAlignmentConfig,
    FeatureAlignmentTrainer,
    ImageDataset,
    ImageTransform,
    SupervisedConfig,
    SupervisedTrainer,
    load_digits,
)


def zeros_and_ones(split: str) -> datasets.Dataset:
    return load_digits(split).filter(lambda label: label < 2, input_columns="label")


class Bits(torch.utils.data.Dataset):
    """Anything with a length and examples by index will do. Stages 1 and 2 read `pixel_values`, stage 3 `labels`."""

    def __init__(self, transform: ImageTransform):
        rows = zeros_and_ones("train")
        self.images, self.labels, self.transform, self.epoch = rows["image"][:], rows["label"][:], transform, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch (optional): augmentation drawn from epoch and index is the same after a resume."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        pixel_values = self.transform(self.images[index], np.random.default_rng([self.epoch, index]))
        return {"pixel_values": pixel_values, "labels": self.labels[index]}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Three stages on data of one's own.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output_dir", default="out/bits", help="folder of the classifier")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each stage")
    parser.add_argument("--batch_size", type=int, default=32, help="images per step")
    parser.add_argument("--smoke", action="store_true", help="a few small steps, half a minute on one core")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.smoke:
        args.steps, args.batch_size = 8, 8
    set_seed(0)

    processor = AutoImageProcessor.from_pretrained(DIGITS_TEACHER)
    teacher = AutoModelForImageClassification.from_pretrained(
        DIGITS_TEACHER,
        id2label={0: "zero", 1: "one"},
        label2id={"zero": 0, "one": 1},
        ignore_mismatched_sizes=True,  # a new head for the new classes
    )
    size, channels = native_size(teacher.config), teacher.config.num_channels

    # a dataset in PyTorch, which decides on everything itself
    train = Bits(ImageTransform.from_processor(processor, size, channels, train=True, horizontal_flip=0.0))
    # rows of `datasets` under whatever column names; broken image files would be skipped, counted and named
    rows = zeros_and_ones("test").rename_columns({"image": "scan", "label": "bit"})
    transform = ImageTransform.from_processor(processor, size, channels)
    test = ImageDataset(rows, transform, image_column="scan", label_column="bit")

    student = convert(teacher)
    common = {"max_steps": args.steps, "per_device_train_batch_size": args.batch_size, "save_strategy": "no"}
    for config_class, trainer_class in (
        (AttentionAlignmentConfig, AttentionAlignmentTrainer),
        (FeatureAlignmentConfig, FeatureAlignmentTrainer),
    ):
        config = config_class(args.output_dir, **common)
        trainer_class(model=student, teacher_model=teacher, args=config, train_dataset=train).train()
    trainer = SupervisedTrainer(
        model=student,
        args=SupervisedConfig(args.output_dir, learning_rate=3e-4, **common),  # the alignment was short
        train_dataset=train,
        eval_dataset=test,
        processing_class=processor,
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()
    trainer.create_model_card()
    print(f"{args.output_dir}: zero or one, accuracy {before:.1%} -> {after:.1%} on {test.summary()}")


if __name__ == "__main__":
    main()
