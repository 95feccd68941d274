# /// script
# requires-python = ">=3.11"
# dependencies = ["vit-adala[digits]"]
#
# [tool.uv.sources]
# vit-adala = { path = "..", editable = true }
# ///
"""Linearize a softmax ViT in Python: convert it, run stages 1 and 2, compare it with its teacher, save it.

    python examples/linearize.py --teacher facebook/dinov2-small --dataset path-or-hub-id --image_size 518

Without arguments it takes the embedded teacher and digits; with --smoke, only a few steps of that:

    python examples/linearize.py --smoke

`uv run examples/linearize.py --smoke` needs no environment: uv makes one from the lines above.

`vit-adala run` does the same from a recipe, goes on after an interruption and writes a report. Copy from here to
change what happens between the steps.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoImageProcessor, HfArgumentParser, set_seed

from modeling_adala import UsageError, convert, load_teacher, parity_report
from trainers import (
    DIGITS_TEACHER,
    AttentionAlignmentConfig,
    AttentionAlignmentTrainer,
    DataConfig,
    DataModule,
    FeatureAlignmentConfig,
    FeatureAlignmentTrainer,
    compare_features,
    evaluate_pair,
)


@dataclass
class Arguments:
    teacher: str = field(default=str(DIGITS_TEACHER), metadata={"help": "softmax checkpoint: Hub id or folder"})
    output_dir: str = field(default="out/linearize", metadata={"help": "folder of the linear checkpoint"})
    attention_steps: int = field(default=500, metadata={"help": "steps of stage 1"})
    feature_steps: int = field(default=400, metadata={"help": "steps of stage 2"})
    batch_size: int = field(default=16, metadata={"help": "images per step"})
    eval_images: int = field(default=500, metadata={"help": "images to compare student and teacher on"})
    knn_images: int = field(default=1000, metadata={"help": "training images that k-NN looks its neighbors up in"})
    smoke: bool = field(default=False, metadata={"help": "a few small steps, half a minute on one core"})


def main() -> None:
    parser = HfArgumentParser((Arguments, DataConfig), description="Convert, stage 1, stage 2, compare, save.")
    parser.set_defaults(dataset="mnist-digits")
    args, data_config = parser.parse_args_into_dataclasses()
    if args.smoke:
        args.attention_steps, args.feature_steps, args.batch_size = 20, 20, 8
        args.eval_images, args.knn_images = 40, 100
    set_seed(0)

    teacher = load_teacher(args.teacher)
    processor = AutoImageProcessor.from_pretrained(args.teacher)
    data = DataModule(data_config, teacher.config, processor)
    if data.raw_eval is None:
        raise UsageError("eval_split=None, but there is no split test or validation: pass, say, 'train[-500:]'.")
    train_dataset, eval_loader = data.train_dataset(seed=0), data.loader(data.eval_dataset(args.eval_images))
    common = {"per_device_train_batch_size": args.batch_size, "save_strategy": "no"}

    student = convert(teacher)
    print(parity_report(teacher, student))
    before, *_ = compare_features(teacher, student, eval_loader)

    AttentionAlignmentTrainer(
        model=student,
        teacher_model=teacher,
        args=AttentionAlignmentConfig(args.output_dir, max_steps=args.attention_steps, **common),
        train_dataset=train_dataset,
    ).train()
    between, *_ = compare_features(teacher, student, eval_loader)

    trainer = FeatureAlignmentTrainer(
        model=student,
        teacher_model=teacher,
        args=FeatureAlignmentConfig(args.output_dir, max_steps=args.feature_steps, **common),
        train_dataset=train_dataset,
        processing_class=processor,
    )
    trainer.train()
    bank_loader = data.loader(data.bank_dataset(args.knn_images)) if data.has_training_labels else None
    after = evaluate_pair(teacher, student, bank_loader, eval_loader, probe=False)

    trainer.save_model()
    Path(args.output_dir, "evaluation.json").write_text(json.dumps(after, indent=2) + "\n")
    trainer.create_model_card()

    cosines = " -> ".join(f"{figures['patches_cosine']:.3f}" for figures in (before, between, after))
    knn = "" if bank_loader is None else "; k-NN {student_knn_accuracy:.1%}, teacher {teacher_knn_accuracy:.1%}"
    print(
        f"{args.output_dir}: cosine of the patches to the teacher's {cosines} (converted, stage 1, stage 2)"
        f"{knn.format(**after)}; {after['num_eval_images']} held-out images"
    )


if __name__ == "__main__":
    main()
