"""Passes that benchmarks/training.py times: steps of stages 1 and 2, their bounds, and a first attempt at stage 1.

A module of its own, so that a fresh process can import it to measure peak memory.
"""

import copy
import functools
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging

from modeling_adala.configuration_adala import vision_config
from modeling_adala.conversion.convert import convert
from modeling_adala.conversion.loading import load_config, load_teacher
from modeling_adala.inspection.towers import attention_modules, forward_tower
from trainers.alignment_trainer import AlignmentTrainer
from trainers.attention_alignment_trainer import AttentionAlignmentTrainer
from trainers.base_config import evaluation_autocast
from trainers.base_trainer import freeze_all_but
from trainers.data.image_dataset import ImageDataset
from trainers.data.transforms import ImageTransform
from trainers.feature_alignment_trainer import FeatureAlignmentTrainer
from trainers.runs.stages import STAGES

from .common import device

TEACHER, STUDENT, STAGE_1, STAGE_2 = "teacher forward", "student forward", "stage 1", "stage 2"
HOOKS = "hooks on everything"
# a photograph as datasets have them, which a loader decodes and crops
PHOTO = (375, 500)


@dataclass(frozen=True)
class Setting:
    """Teacher checkpoint, feature map of the student, image side in pixels, and images per step."""

    teacher: str
    feature_map: str
    size: int
    batch: int

    def __str__(self) -> str:
        return self.feature_map


def models(setting: Setting) -> tuple[PreTrainedModel, PreTrainedModel]:
    transformers_logging.disable_progress_bar()
    teacher = load_teacher(setting.teacher)
    student = convert(copy.deepcopy(teacher), check_parity=False, feature_map=setting.feature_map)
    return teacher.to(device()), student.to(device())


@functools.cache
def photos(setting: Setting, count: int) -> ImageDataset:
    """Return JPEG photographs of smooth noise, cropped at random for training."""
    channels = vision_config(load_config(setting.teacher)).num_channels
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize(PHOTO[::-1], Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append({"bytes": buffer.getvalue(), "path": None})
    rows = datasets.Dataset.from_dict({"image": files}, datasets.Features({"image": datasets.Image()}))
    return ImageDataset(rows, ImageTransform(setting.size, 0.45, 0.23, num_channels=channels, train=True))


def batch_of(setting: Setting) -> Tensor:
    dataset = photos(setting, setting.batch)
    return torch.stack([dataset[index]["pixel_values"] for index in range(len(dataset))]).to(device())


def trainer_of(name: str, setting: Setting, steps: int, **settings: Any) -> AlignmentTrainer:
    """Return the trainer of stage 1 or 2 in its own precision, on photographs, at a tiny learning rate."""
    teacher, student = models(setting)
    stage = STAGES["attention-alignment" if name == STAGE_1 else "feature-alignment"]
    args = stage.config_class(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=setting.batch,
        calibration_images=setting.batch,
        learning_rate=1e-6,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    dataset = photos(setting, max(64, setting.batch))
    kinds = {STAGE_1: AttentionAlignmentTrainer, STAGE_2: FeatureAlignmentTrainer}
    trainer = kinds[name](student, teacher, args, train_dataset=dataset)
    trainer.remove_callback(PrinterCallback)
    return trainer


def step_of(name: str, setting: Setting) -> Callable[[], Any]:
    """Return one optimizer step of a stage on one batch, as `Trainer`'s loop makes it, without the loop."""
    trainer = trainer_of(name, setting, steps=1)
    trainer.train()  # builds the optimizer, measures the variances
    pixel_values = batch_of(setting)

    def step() -> None:
        trainer.training_step(trainer.model_wrapped, {"pixel_values": pixel_values}, None)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.model.zero_grad()

    return step


def teacher_forward(setting: Setting) -> Callable[[], Any]:
    """Return a pass of the teacher alone under the trainers' autocast."""
    return _forward(models(setting)[0], setting)


def student_forward(setting: Setting) -> Callable[[], Any]:
    """Return a pass of the student alone, without gradients."""
    return _forward(models(setting)[1], setting)


def hook_everything(setting: Setting) -> Callable[[], Any]:
    """Return a naive step of stage 1: both models in full, a hook on every attention, one backward pass."""
    teacher, student = models(setting)
    freeze_all_but(
        student, lambda name: any(part in name for part in (".q_proj.", ".k_proj.", ".v_proj.", "feature_map"))
    )
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-6)
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: tuple) -> None:
        inputs.append(args[0])
        targets.append(output[0])

    for module in attention_modules(teacher):
        module.register_forward_hook(keep)
    for layer, module in enumerate(attention_modules(student)):
        module.register_forward_pre_hook(lambda module, args, layer=layer: (inputs[layer], *args[1:]))
        module.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    pixel_values = batch_of(setting)

    def step() -> None:
        with _autocast():
            with torch.no_grad():
                forward_tower(teacher, pixel_values)
            forward_tower(student, pixel_values)
            losses = [
                F.mse_loss(ours.float(), theirs.float()) / theirs.float().var()
                for ours, theirs in zip(outputs, targets, strict=True)
            ]
        torch.stack(losses).mean().backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for kept in (inputs, targets, outputs):
            kept.clear()

    return step


def prepare(name: str, setting: Setting) -> Callable[[], Any]:
    """Return the pass or step of this name, warmed up."""
    if name in (STAGE_1, STAGE_2):
        run = step_of(name, setting)
    else:
        run = {TEACHER: teacher_forward, STUDENT: student_forward, HOOKS: hook_everything}[name](setting)
    run()
    return run


def _forward(model: PreTrainedModel, setting: Setting) -> Callable[[], Any]:
    pixel_values = batch_of(setting)

    @torch.no_grad()
    def forward() -> None:
        with _autocast():
            forward_tower(model, pixel_values)

    return forward


def _autocast() -> torch.autocast:
    """Return the trainers' default autocast."""
    return evaluation_autocast(device())
