"""Fine-tune a linear ViT with LoRA adapters from `peft`, save them alone, and open them again.

    python examples/finetune_lora.py --model out/linearize --output_dir out/lora

Without arguments it takes the embedded teacher, converted but not aligned; with --smoke, only a few steps of that:

    python examples/finetune_lora.py --smoke

The attention projections keep the names that they have in every ViT of Transformers, so `target_modules` does, too.
The data are the embedded digits; finetune_classifier.py shows how others come in.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments, set_seed

from modeling_adala import convert
from trainers import DIGITS_TEACHER, load_digits


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fine-tune a linear ViT with LoRA.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--model", help="AdaLA classifier of digits, folder or Hub id; none: the embedded teacher, converted"
    )
    parser.add_argument("--output_dir", default="out/lora", help="folder of the adapters")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=32, help="images per step")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="peak of the schedule")
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

    processor = AutoImageProcessor.from_pretrained(args.model)
    base = AutoModelForImageClassification.from_pretrained(args.model)
    mode = "L" if base.config.num_channels == 1 else "RGB"
    # the head is small, and trained whole beside the adapters
    model = get_peft_model(
        base,
        LoraConfig(
            r=args.rank,
            lora_alpha=2 * args.rank,
            target_modules=["q_proj", "v_proj"],
            modules_to_save=["classifier"],
        ),
    )
    trained, total = model.get_nb_trainable_parameters()

    def preprocess(rows: dict[str, list]) -> dict[str, Any]:
        images = [image.convert(mode) for image in rows["image"]]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": rows["label"]}

    test = load_digits("test").shuffle(seed=0).select(range(100 if args.smoke else 1000)).with_transform(preprocess)
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
            logging_steps=10,
            save_strategy="no",
            remove_unused_columns=False,  # the transform needs the column that the model does not know
        ),
        train_dataset=load_digits("train").with_transform(preprocess),
        eval_dataset=test,
        compute_metrics=lambda output: {"accuracy": (output.predictions.argmax(-1) == output.label_ids).mean()},
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    model.save_pretrained(args.output_dir)

    base = AutoModelForImageClassification.from_pretrained(args.model)
    reloaded = PeftModel.from_pretrained(base, args.output_dir).to(model.device).eval()
    pixel_values = test[:16]["pixel_values"].to(model.device)
    with torch.inference_mode():
        difference = (reloaded(pixel_values).logits - model.eval()(pixel_values).logits).abs().max().item()
    size = (Path(args.output_dir) / "adapter_model.safetensors").stat().st_size
    print(
        f"{args.output_dir}: {trained:,} of {total:,} parameters trained, {size / 1e6:.2f} MB; accuracy {before:.1%}"
        f" -> {after:.1%} on {len(test):,} held-out digits; logits of the reloaded model differ by {difference:g}"
    )


if __name__ == "__main__":
    main()
