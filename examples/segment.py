"""Train a linear ViT for semantic segmentation: which digit, if any, does each pixel belong to?

    python examples/segment.py --model out/linearize --output_dir out/segment

Without arguments it takes the embedded teacher, converted but not aligned; with --smoke, only a few steps of that:

    python examples/segment.py --smoke

The masks are made from the embedded digits: the digit's class where there is ink, background elsewhere. For images and
masks of your own, change `digits_with_masks`, or leave the script aside: `vit-adala finetune --task
semantic-segmentation` reads folders of parquet files and Hub ids.
"""

import argparse
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, set_seed

from modeling_adala import convert, native_size
from trainers import (
    DIGITS_TEACHER,
    SegmentationDataset,
    SegmentationTransform,
    SupervisedConfig,
    SupervisedTrainer,
    load_digits,
)

LABELS = ["background", *(f"digit {digit}" for digit in range(10))]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a linear ViT to segment digits.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="AdaLA checkpoint, folder or Hub id; none: the embedded teacher, converted")
    parser.add_argument("--output_dir", default="out/segment", help="folder of the segmentation model")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=32, help="images per step")
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="peak of the schedule; the head's is higher")
    parser.add_argument("--smoke", action="store_true", help="a few small steps, half a minute on one core")
    return parser.parse_args()


def digits_with_masks(split: str, limit: int | None = None) -> datasets.Dataset:
    """Make rows of `image` and `mask`, a gray image of class numbers in the same size."""
    rows = load_digits(split).shuffle(seed=0)

    def add_mask(row: dict) -> dict:
        ink = np.asarray(row["image"]) > 127
        return {"mask": Image.fromarray(np.where(ink, 1 + row["label"], 0).astype(np.uint8))}

    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    return rows.select(range(limit or len(rows))).map(add_mask, remove_columns="label", features=features)


def main() -> None:
    args = parse_args()
    if args.smoke:
        args.steps, args.batch_size = 20, 16
    set_seed(0)
    if args.model is None:
        args.model = str(Path(args.output_dir) / "converted")
        convert(DIGITS_TEACHER).save_pretrained(args.model)
        AutoImageProcessor.from_pretrained(DIGITS_TEACHER).save_pretrained(args.model)

    processor = AutoImageProcessor.from_pretrained(args.model)
    model = AutoModelForSemanticSegmentation.from_pretrained(
        args.model,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
        ignore_mismatched_sizes=True,  # the head of a classifier is of no use here
    )

    def dataset(split: str, limit: int | None, **options) -> SegmentationDataset:
        size, channels = native_size(model.config), model.config.num_channels
        transform = SegmentationTransform.from_processor(processor, size, channels, **options)
        return SegmentationDataset(
            digits_with_masks(split, limit), transform, label_column="mask", num_labels=len(LABELS)
        )

    test = dataset("test", 100 if args.smoke else None)
    trainer = SupervisedTrainer(
        model=model,
        args=SupervisedConfig(
            args.output_dir,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            save_strategy="no",
        ),
        # a flipped digit is none
        train_dataset=dataset("train", 320 if args.smoke else None, train=True, horizontal_flip=0.0),
        eval_dataset=test,
        processing_class=processor,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    mean_iou, pixels = (f"{before[key]:.1%} -> {after[key]:.1%}" for key in ("eval_mean_iou", "eval_pixel_accuracy"))
    print(f"{args.output_dir}: mean IoU {mean_iou}, pixel accuracy {pixels} on {test.summary()}")


if __name__ == "__main__":
    main()
