"""Tiny teachers, data and comparisons that the tests of training share."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

LABELS = [str(digit) for digit in range(10)]
# the default 0.02 would leave attention uniform: softmax and linear layers would then agree from the start
TINY = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "num_channels": 1,
    "initializer_range": 0.3,
}
# plain float32 on the CPU, nothing printed, nothing reported
QUIET = {"bf16": False, "use_cpu": True, "disable_tqdm": True, "report_to": "none"}


def tiny_vit(layers: int = 2, head: bool = True, seed: int = 0, new_head: bool = False, **config) -> PreTrainedModel:
    """A random stock ViT for 28x28 gray images, with ten labels `"0"` to `"9"`, or headless with a pooler.

    The bias of its head is random, too, unless that is new: stage 3 fits a new head first.
    """
    torch.manual_seed(seed)
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}
    sizes = TINY | {"num_hidden_layers": layers, "intermediate_size": 64} | config
    if not head:
        return ViTModel(ViTConfig(**sizes))
    model = ViTForImageClassification(ViTConfig(**sizes, **labels))
    if not new_head:
        bias = model.classifier.bias.data
        bias.copy_(0.01 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def tiny_dinov2(layers: int = 2, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return Dinov2Model(Dinov2Config(**TINY, num_hidden_layers=layers, mlp_ratio=2, layerscale_value=0.5))


def save_teacher(directory: Path, **config) -> str:
    """The folder of a stock checkpoint with its image processor, as a user would have it."""
    tiny_vit(**config).save_pretrained(directory)
    processor = ViTImageProcessorPil(size={"height": 28, "width": 28}, image_mean=[0.5], image_std=[0.5])
    processor.save_pretrained(directory)
    return str(directory)


class NoiseImages(Dataset):
    """Random images, the label written into the first row. With `augment`, every epoch has its own noise on top."""

    def __init__(self, count: int = 16, labels: bool = True, augment: bool = False, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.pixels = torch.randn(count, 1, 28, 28, generator=generator)
        self.labels = torch.randint(10, (count,), generator=generator) if labels else None
        if labels:
            self.pixels[torch.arange(count), 0, 0, self.labels] += 10
        self.augment, self.epoch = augment, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict:
        pixels = self.pixels[index]
        if self.augment:
            generator = torch.Generator().manual_seed(1000 * self.epoch + index)
            pixels = pixels + torch.randn(pixels.shape, generator=generator)
        example = {"pixel_values": pixels}
        return example if self.labels is None else example | {"labels": int(self.labels[index])}


class Interrupted(Exception):
    """Stands for whatever ends a run early."""


class InterruptAt(TrainerCallback):
    """Ends training after `step`, like a kill between two checkpoints."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Interrupted


class KeepGradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step, and of no other."""

    def __init__(self):
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def copy_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that are not bit for bit what they were."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def unfolded(names: Iterable[str]) -> set[str]:
    """Names of the tensors that are left when stage 2 or 3 has folded the feature maps into the projections."""
    return {name for name in names if ".feature_map." not in name}


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 0.0) -> None:
    """Same names and, within `atol` (default: bit for bit), same values."""
    assert actual.keys() == expected.keys()
    apart = {}
    for name in expected:
        difference = (actual[name].double() - expected[name].double()).abs().max().item()
        if not difference <= atol:
            apart[name] = difference
    assert not apart, f"{len(apart)} of {len(expected)} tensors differ: {apart}"


def names_with(parts: Iterable[str], names: Iterable[str]) -> set[str]:
    return {name for name in names if any(part in name for part in parts)}
