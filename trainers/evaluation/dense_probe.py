"""Frozen segmentation probe: the share of a dense task that a linear map reads off a model's patch features.

Batch norm and a 1x1 convolution on frozen patch features, DINOv2's linear protocol (Oquab et al. 2023, arXiv
2304.07193, section 7.4). The features are extracted once, so that a probe takes seconds and is converged, where
fine-tuning for the same time is not.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from modeling_adala.attention_interface import patch_grid
from modeling_adala.configuration_adala import vision_config
from modeling_adala.errors import AdaLAError, DataError
from modeling_adala.inspection.towers import token_groups

from ..data.segmentation_data import IGNORE_INDEX, SegmentationData
from ..softmax_regression import fit_softmax_regression
from .probes import evaluating, features_of
from .segmentation import SegmentationMetrics, score_masks

# images at a time, which bounds the memory of the class scores
CHUNK = 64


@dataclass(frozen=True)
class PatchBank:
    """Patch features and masks of a data set, on the CPU.

    Args:
        features (`Tensor`): Final patch features, `(images, hidden_size, rows, columns)`, float32.
        masks (`list[Tensor]`): Class indices, int64 `(height, width)` for each image.
    """

    features: Tensor
    masks: list[Tensor]

    def __len__(self) -> int:
        return len(self.masks)


def class_shares(masks: Iterable[Tensor], num_labels: int, grid: tuple[int, int]) -> Tensor:
    """Return the share of each patch that each class covers, `(images, num_labels, rows, columns)`.

    Patches without any class are all zeros.

    Args:
        masks (`Iterable[Tensor]`): Class indices, int64 `(height, width)` for each image.
        num_labels (`int`): Number of classes.
        grid (`tuple[int, int]`): Rows and columns of patches.
    """
    shares = []
    for mask in masks:
        one_hot = F.one_hot(mask.where(mask != IGNORE_INDEX, num_labels), num_labels + 1)[..., :num_labels]
        shares.append(F.adaptive_avg_pool2d(one_hot.permute(2, 0, 1).float(), grid))
    return torch.stack(shares)


def extract_patches(
    model: Any,
    batches: Iterable[dict[str, Any]],
    *,
    autocast_dtype: torch.dtype | None = None,
    description: str = "patch features",
    disable_progress: bool | None = None,
) -> PatchBank:
    """Run a model over images with masks and keep its patch features.

    Args:
        model (`PreTrainedModel`): Stock or AdaLA model; runs in eval mode.
        batches (`Iterable`): `pixel_values` and `labels`, as `collate_images` makes them.
        autocast_dtype (`torch.dtype`, *optional*): Such as `torch.bfloat16`. Default: no autocast.
        description (`str`, *optional*, defaults to `"patch features"`): Name on the progress bar.
        disable_progress (`bool`, *optional*): Default: a progress bar only in a terminal.

    Raises:
        DataError: If there are no batches.
        AdaLAError: If the features are not finite.
    """
    features, masks = list[Tensor](), list[Tensor]()
    config: Any = model.config
    patches = token_groups(config)["patches"]
    with evaluating(model):
        for batch in tqdm(batches, desc=description, disable=disable_progress, leave=False):
            tokens = features_of(model, batch, autocast_dtype)[:, patches]
            grid = patch_grid(vision_config(config), batch["pixel_values"])
            features.append(tokens.float().transpose(1, 2).unflatten(2, grid).cpu())
            masks += list(batch["labels"])
    if not features:
        raise DataError("there are 0 images to probe on; choose another split with --eval-split.")
    bank = PatchBank(torch.cat(features), masks)
    if not bank.features.isfinite().all():
        raise AdaLAError(f"{description}: features are not finite; the training diverged, or float16 overflows.")
    return bank


def fit_probe(train: PatchBank, classes: int, *, iterations: int = 100, weight_decay: float = 1e-4) -> nn.Sequential:
    """Return batch norm and a 1x1 convolution, fitted to a bank.

    The target of a patch is the share that each class has of it; see `fit_softmax_regression`.

    Args:
        train (`PatchBank`): To learn from.
        classes (`int`): How many there are.
        iterations (`int`, *optional*, defaults to 100): L-BFGS iterations at most.
        weight_decay (`float`, *optional*, defaults to 1e-4): Weight of half the squared norm of the convolution.
    """
    channels = train.features.shape[1]
    norm, convolution = nn.BatchNorm2d(channels, affine=False), nn.Conv2d(channels, classes, kernel_size=1)
    norm.momentum = None  # its statistics are those of all patches
    with torch.no_grad():
        chunks = norm(train.features).split(CHUNK)
    norm.eval()
    grid = train.features.shape[-2], train.features.shape[-1]
    shares = class_shares(train.masks, classes, grid).split(CHUNK)
    fit_softmax_regression(convolution, chunks, shares, iterations=iterations, weight_decay=weight_decay)
    return nn.Sequential(norm, convolution)


@torch.no_grad()
def score_probe(probe: nn.Module, test: PatchBank, labels: list[str]) -> dict[str, float]:
    """Return the figures of `SegmentationMetrics`, `mean_iou` and the others, at the resolution of the masks."""
    metrics = SegmentationMetrics(labels)
    for features, mask in zip(test.features, test.masks, strict=True):
        metrics.metric.add_batch(predictions=score_masks(probe(features[None]), [mask])[1], references=[mask])
    return metrics.compute()


class DenseProbe:
    """Frozen segmentation probe of any number of students beside their teacher, which is probed once.

    Args:
        teacher (`PreTrainedModel`): Softmax model.
        data (`SegmentationData`): Images with masks; training images are taken without augmentation.
        train_images (`int`, *optional*, defaults to 2000): Training images at most, which a probe learns from.
        eval_images (`int`, *optional*): Images to score on. Default: all of the evaluation split.
        autocast_dtype, disable_progress (*optional*): As for `extract_patches`.

    Raises:
        DataError: Without an evaluation split.

    Example:

    ```python
    probe = DenseProbe(teacher, SegmentationData(DataConfig("path/to/masks", label_column="mask"), teacher.config))
    print(probe(student)["mean_iou_retained"])
    ```
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        data: SegmentationData,
        *,
        train_images: int = 2000,
        eval_images: int | None = None,
        autocast_dtype: torch.dtype | None = None,
        disable_progress: bool | None = None,
    ) -> None:
        self.teacher, self.labels = teacher, data.labels
        self.splits = data.loader(data.bank_dataset(train_images)), data.loader(data.eval_dataset(eval_images))
        if None in self.splits:
            raise DataError("a segmentation probe needs a training and an evaluation split; pass --eval-split.")
        self.options: Any = {"autocast_dtype": autocast_dtype, "disable_progress": disable_progress}
        self._teacher_scores: dict[str, float] | None = None

    def __call__(self, student: PreTrainedModel) -> dict[str, float]:
        """Return `student_mean_iou`, `teacher_mean_iou`, `mean_iou_retained`, and the same of `pixel_accuracy`."""
        if self._teacher_scores is None:
            self._teacher_scores = self.scores(self.teacher, "teacher")
        ours, theirs, results = self.scores(student, "student"), self._teacher_scores, {}
        for key in ("mean_iou", "pixel_accuracy"):
            results[f"student_{key}"], results[f"teacher_{key}"] = ours[key], theirs[key]
            results[f"{key}_retained"] = ours[key] / theirs[key]
        return results

    def scores(self, model: PreTrainedModel, name: str) -> dict[str, float]:
        """Return all figures of the probe on one model, whose `name` is shown on the progress bar."""
        train, test = (
            extract_patches(model, loader or (), description=name, **self.options) for loader in self.splits
        )
        return score_probe(fit_probe(train, len(self.labels)), test, self.labels)
