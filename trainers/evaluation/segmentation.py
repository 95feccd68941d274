"""Evaluating semantic segmentation: whole images or windows, scored at the resolution of each mask."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from tqdm.auto import tqdm
from transformers import EvalPrediction, PreTrainedModel, SegformerImageProcessorPil

from modeling_adala.errors import DataError

from ..data.segmentation_data import IGNORE_INDEX
from .metric_functions import as_tensor, confusion_matrix, iou_from_confusion

Windows = tuple[tuple[int, int], tuple[int, int]]


def is_segmenter(model: nn.Module) -> bool:
    """Whether a model is one for semantic segmentation, by the naming of Transformers."""
    return type(model).__name__.endswith("ForSemanticSegmentation")


def segment(model: nn.Module, pixel_values: Tensor, windows: Windows | None = None) -> Tensor:
    """Class scores of whole images, or of windows that slide over them and are averaged where they overlap.

    Args:
        model (`nn.Module`): A semantic segmentation model.
        pixel_values (`Tensor`): `(batch, channels, height, width)`.
        windows (*optional*): Size and stride of the windows, both (height, width). Default: whole images. The last
            window of a row or column moves back inside the image.

    Returns:
        `Tensor`: `(batch, num_labels, rows, columns)`: of whole images as the model gives them, of windows one score
        per pixel.
    """
    if windows is None:
        return model(pixel_values).logits
    (height, width), (down, right) = windows
    total: Tensor | None = None
    count = pixel_values.new_zeros(pixel_values.shape[-2:])
    for top in _starts(pixel_values.shape[-2], height, down):
        for left in _starts(pixel_values.shape[-1], width, right):
            place = ..., slice(top, top + height), slice(left, left + width)
            logits = _resize(model(pixel_values[place]).logits, (height, width))
            if total is None:
                total = logits.new_zeros((*logits.shape[:2], *pixel_values.shape[-2:]))
            total[place] += logits
            count[place] += 1
    return cast(Tensor, total) / count


def segmentation_processor(image_processor: Any, image_size: tuple[int, int]) -> SegformerImageProcessorPil:
    """An image processor that feeds a segmenter as it was trained, and turns its scores into masks.

    A family's own lacks `post_process_semantic_segmentation`, which `pipeline("image-segmentation")` calls.

    Args:
        image_processor (`BaseImageProcessor` or `None`): Of the family: its mean and standard deviation are kept.
        image_size (`tuple[int, int]`): Height and width in pixels.
    """
    height, width = image_size
    known = {name: getattr(image_processor, name, None) for name in ("image_mean", "image_std")}
    known = {name: value for name, value in known.items() if value is not None}
    normalize = "image_mean" in known and getattr(image_processor, "do_normalize", True)
    return SegformerImageProcessorPil(size={"height": height, "width": width}, do_normalize=normalize, **known)


def score_masks(logits: Tensor, masks: Tensor | list[Tensor]) -> tuple[Tensor, Tensor]:
    """Loss and confusion matrix of each image, at the resolution of its mask.

    Args:
        logits (`Tensor`): `(batch, num_labels, rows, columns)` of any resolution; interpolated bilinearly.
        masks (`Tensor` or `list[Tensor]`): int64, a (height, width) for each image.

    Returns:
        Cross-entropy `(batch,)`, a mean over the pixels that count, and int64 confusion matrices
        `(batch, num_labels, num_labels)`, rows true, columns predicted.
    """
    losses, confusions = [], []
    for scores, mask in zip(logits, masks, strict=True):
        scores = _resize(scores[None], tuple(mask.shape))
        loss = cross_entropy(scores, mask[None], ignore_index=IGNORE_INDEX, reduction="sum")
        losses.append(loss / (mask != IGNORE_INDEX).sum().clamp(min=1))
        confusion = confusion_matrix(scores.argmax(dim=1)[0], mask, len(scores[0]), IGNORE_INDEX)
        confusions.append(torch.from_numpy(confusion).to(logits.device))
    return torch.stack(losses), torch.stack(confusions)


def segmentation_metrics(confusion: np.ndarray, labels: list[str]) -> dict[str, float]:
    """`mean_iou`, `pixel_accuracy`, `mean_accuracy` (over classes) and `iou_<label>` of every class that occurs.

    Args:
        confusion: Counts `(num_labels, num_labels)`, rows true, columns predicted.
        labels: Class names.
    """
    result = iou_from_confusion(confusion)
    classes = {f"iou_{label}": iou for label, iou in zip(labels, result["per_category_iou"], strict=True)}
    totals = {"mean_iou": "mean_iou", "pixel_accuracy": "overall_accuracy", "mean_accuracy": "mean_accuracy"}
    # a class that is nowhere has no IoU, and nan is no JSON
    return {name: result[key] for name, key in totals.items()} | {k: v for k, v in classes.items() if not np.isnan(v)}


class SegmentationMetrics:
    """`compute_metrics` for `Trainer` with `batch_eval_metrics`: sums confusion matrices, so memory stays constant.

    Called with the confusion matrices `(batch, num_labels, num_labels)` of a batch as predictions; returns
    `segmentation_metrics` over the whole split with `compute_result`, and starts anew.

    Args:
        labels: Class names.
    """

    def __init__(self, labels: list[str]) -> None:
        self.labels = labels
        self.confusion: np.ndarray | int = 0

    def __call__(self, eval_prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        self.confusion = self.confusion + as_tensor(eval_prediction.predictions).sum(dim=0).cpu().numpy()
        if not compute_result:
            return {}
        confusion, self.confusion = self.confusion, 0
        return segmentation_metrics(confusion, self.labels)


@torch.no_grad()
def evaluate_segmentation(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Any]],
    *,
    windows: Windows | None = None,
    autocast_dtype: torch.dtype | None = None,
    disable_progress: bool | None = None,
) -> dict[str, float]:
    """Mean IoU, IoU by class and pixel accuracy over a whole split, at the resolution of its masks.

    Args:
        model (`PreTrainedModel`): Its `config.id2label` names the classes.
        batches (`Iterable`): `pixel_values` and `labels`, as `collate_images` makes them.
        windows (*optional*): As for [`segment`].
        autocast_dtype (`torch.dtype`, *optional*): Default: no autocast.
        disable_progress (`bool`, *optional*): Default: a progress bar only in a terminal.

    Returns:
        That of [`segmentation_metrics`], and `loss`, a mean over the images.

    Raises:
        DataError: there are no batches.
    """
    model.eval()
    losses, total = [], None
    for batch in tqdm(batches, desc="mean IoU", disable=disable_progress, leave=False):
        autocast: AbstractContextManager = nullcontext()
        if autocast_dtype is not None:
            autocast = torch.autocast(model.device.type, dtype=autocast_dtype)
        with autocast:
            logits = segment(model, batch["pixel_values"].to(model.device), windows)
        loss, confusion = score_masks(logits, [mask.to(model.device) for mask in batch["labels"]])
        losses.append(loss.cpu())
        total = confusion.sum(dim=0) if total is None else total + confusion.sum(dim=0)
    if total is None:
        raise DataError("there are 0 images to evaluate on: choose another split with --eval-split")
    labels = [model.config.id2label[index] for index in range(len(total))]
    return {"loss": torch.cat(losses).mean().item()} | segmentation_metrics(total.cpu().numpy(), labels)


def _starts(length: int, window: int, stride: int) -> list[int]:
    return [*range(0, length - window, stride), length - window]


def _resize(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    return interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
