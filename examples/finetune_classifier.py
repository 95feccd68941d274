"""Fine-tune a linear ViT with the plain `Trainer` of Transformers.

    python examples/finetune_classifier.py --model out/linearize --dataset path-or-hub-id --output_dir out/classifier

Without arguments it takes the embedded digits, and the embedded teacher converted but not aligned; with --smoke, only
a few steps of that:

    python examples/finetune_classifier.py --smoke

Nothing but `import modeling_adala` tells this from a script for any other ViT.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments, set_seed

from modeling_adala import convert
from trainers import DIGITS_TEACHER, load_digits


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fine-tune a linear ViT with the plain Trainer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", help="AdaLA checkpoint, folder or Hub id; none: the embedded teacher, converted")
    parser.add_argument("--dataset", help="with columns image and label, splits train and test; none: the digits")
    parser.add_argument("--output_dir", default="out/classifier", help="folder of the classifier")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=32, help="images per step")
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="peak of the schedule")
    parser.add_argument("--smoke", action="store_true", help="a few small steps, half a minute on one core")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.smoke:
        args.steps, args.batch_size = 20, 16
    set_seed(0)
    if args.model is None:
        args.model = str(Path(args.output_dir) / "converted")
        convert(DIGITS_TEACHER).save_pretrained(args.model)
        AutoImageProcessor.from_pretrained(DIGITS_TEACHER).save_pretrained(args.model)

    splits = load_dataset(args.dataset) if args.dataset else {name: load_digits(name) for name in ("train", "test")}
    names = splits["train"].features["label"].names
    processor = AutoImageProcessor.from_pretrained(args.model)
    model = AutoModelForImageClassification.from_pretrained(
        args.model,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        ignore_mismatched_sizes=True,  # another number of classes: the head starts anew
    )
    mode = "L" if model.config.num_channels == 1 else "RGB"

    def preprocess(rows: dict[str, list]) -> dict[str, Any]:
        images = [image.convert(mode) for image in rows["image"]]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": rows["label"]}

    test = splits["test"].shuffle(seed=0).select(range(100)) if args.smoke else splits["test"]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            args.output_dir,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=64,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            weight_decay=0.05,
            logging_steps=10,
            save_strategy="no",
            bf16=torch.cuda.is_available(),
            remove_unused_columns=False,  # the transform needs the column that the model does not know
        ),
        train_dataset=splits["train"].with_transform(preprocess),
        eval_dataset=test.with_transform(preprocess),
        processing_class=processor,
        compute_metrics=lambda output: {"accuracy": (output.predictions.argmax(-1) == output.label_ids).mean()},
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()
    print(f"{args.output_dir}: accuracy {before:.1%} -> {after:.1%} on {len(test):,} held-out images")


if __name__ == "__main__":
    main()
