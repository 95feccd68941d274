"""Evaluating semantic segmentation: whole images or windows, scored at the resolution of each mask."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from tqdm.auto import tqdm
from transformers import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    EvalPrediction,
    PreTrainedModel,
    SegformerImageProcessorPil,
)

from modeling_adala.errors import DataError

from ..data.segmentation_data import IGNORE_INDEX
from .metrics import MeanIoU

Windows = tuple[tuple[int, int], tuple[int, int]]


def is_segmenter(model: nn.Module) -> bool:
    """Return whether a model is one that `AutoModelForSemanticSegmentation` opens."""
    config = type(getattr(model, "config", None))
    return config in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING and isinstance(
        model, MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING[config]
    )


def segment(model: nn.Module, pixel_values: Tensor, windows: Windows | None = None) -> Tensor:
    """Return the class scores of whole images, or of sliding windows that are averaged where they overlap.

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
    """Return an image processor that feeds a segmenter as it was trained, and turns its scores into masks.

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


def score_masks(logits: Tensor, masks: Tensor | list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and the label map of each image, at the resolution of its mask.

    Args:
        logits (`Tensor`): `(batch, num_labels, rows, columns)` of any resolution; interpolated bilinearly.
        masks (`Tensor` or `list[Tensor]`): int64, a (height, width) for each image.

    Returns:
        `tuple`: Cross-entropy `(batch,)`, a mean over the pixels that count, and int64 maps (height, width).
    """
    losses, maps = [], []
    for scores, mask in zip(logits, masks, strict=True):
        scores = _resize(scores[None], tuple(mask.shape))
        loss = cross_entropy(scores, mask[None], ignore_index=IGNORE_INDEX, reduction="sum")
        losses.append(loss / (mask != IGNORE_INDEX).sum().clamp(min=1))
        maps.append(scores.argmax(dim=1)[0])
    return torch.stack(losses), maps


class SegmentationMetrics:
    """`compute_metrics` for `Trainer` with `batch_eval_metrics`, by `MeanIoU`, whose sums stay small.

    Called with the sums `(batch, num_labels, num_labels)` of the images of a batch as predictions. With
    `compute_result`, returns `mean_iou`, `pixel_accuracy`, `mean_accuracy` (over classes) and `iou_<label>` of every
    class that occurs, over the whole split, and starts anew.

    Args:
        labels (`list[str]`): Class names.
    """

    def __init__(self, labels: list[str]) -> None:
        self.labels, self.metric = labels, MeanIoU(len(labels), IGNORE_INDEX)

    def __call__(self, eval_prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        sums = torch.as_tensor(eval_prediction.predictions).cpu().numpy()
        self.metric.add_sums(sums.sum(axis=0), len(sums))
        return self.compute() if compute_result else {}

    def compute(self) -> dict[str, float]:
        """Return the figures over all that was added."""
        result = self.metric.compute()
        scores = {"mean_iou": result["mean_iou"], "pixel_accuracy": result["overall_accuracy"]}
        scores["mean_accuracy"] = result["mean_accuracy"]
        classes = zip(self.labels, result["per_category_iou"], strict=True)
        # a class that does not occur has no IoU, and JSON has no nan
        return scores | {f"iou_{label}": iou for label, iou in classes if not np.isnan(iou)}


@torch.no_grad()
def evaluate_segmentation(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Any]],
    *,
    windows: Windows | None = None,
    autocast_dtype: torch.dtype | None = None,
    disable_progress: bool | None = None,
) -> dict[str, float]:
    """Return mean IoU, IoU by class and pixel accuracy over a whole split, at the resolution of its masks.

    Args:
        model (`PreTrainedModel`): Its `config.id2label` names the classes.
        batches (`Iterable`): `pixel_values` and `labels`, as `collate_images` makes them.
        windows (*optional*): As for [`segment`].
        autocast_dtype (`torch.dtype`, *optional*): Default: no autocast.
        disable_progress (`bool`, *optional*): Default: a progress bar only in a terminal.

    Returns:
        `dict`: Those of [`SegmentationMetrics`], and `loss`, a mean over the images.

    Raises:
        DataError: If there are no batches.
    """
    model.eval()
    losses = []
    metrics = SegmentationMetrics([model.config.id2label[index] for index in range(model.config.num_labels)])
    for batch in tqdm(batches, desc="mean IoU", disable=disable_progress, leave=False):
        autocast: AbstractContextManager = nullcontext()
        if autocast_dtype is not None:
            autocast = torch.autocast(model.device.type, dtype=autocast_dtype)
        with autocast:
            logits = segment(model, batch["pixel_values"].to(model.device), windows)
        loss, maps = score_masks(logits, [mask.to(model.device) for mask in batch["labels"]])
        losses.append(loss.cpu())
        metrics.metric.add_batch(predictions=maps, references=batch["labels"])
    if not losses:
        raise DataError("there are 0 images to evaluate on; choose another split with --eval-split.")
    return {"loss": torch.cat(losses).mean().item()} | metrics.compute()


def _starts(length: int, window: int, stride: int) -> list[int]:
    return [*range(0, length - window, stride), length - window]


def _resize(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    return interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
