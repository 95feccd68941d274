"""Comparison of student and teacher on the student's own forward pass: the figures that a run is judged by."""

import logging
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_adala.inspection.towers import (
    forward_tower,
    state_of,
    token_groups,
    transformer_blocks,
    vision_tower,
)
from modeling_adala.mixins import image_inputs

from ..base_config import evaluation_autocast, evaluation_dtype
from ..data.data_config import DataModule
from ..data.labels import head_ids
from ..data.segmentation_data import SegmentationData
from .dense_probe import DenseProbe
from .metrics import Accuracy, FeatureRelativeError
from .probes import FeatureBank, evaluate_pair, extract_features

logger = logging.getLogger(__name__)


class Comparison:
    """Comparison of any number of students with one teacher, whose k-NN features are computed once.

    Args:
        teacher (`PreTrainedModel`): Softmax model.
        data (`DataModule`): Evaluation images, and training images for k-NN and linear probe.
        knn_images (`int`): How many of those.
        eval_images (`int`, *optional*): How many evaluation images. Default: all.
        probe (`bool`): Whether to fit linear probes.
        masks (`SegmentationData`, *optional*): The same images with their masks, for the segmentation probe.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        data: DataModule,
        *,
        knn_images: int = 2000,
        eval_images: int | None = None,
        probe: bool = True,
        masks: SegmentationData | None = None,
        disable_progress: bool | None = None,
    ):
        self.teacher, self.probe, self.disable_progress = teacher, probe, disable_progress
        self.labels, self._told = data.labels, False
        self.eval_loader = data.loader(data.eval_dataset(eval_images))
        images = min(eval_images or data.num_eval_images, data.num_eval_images)
        self.quick_loader = data.loader(data.eval_dataset(min(images, max(500, images // 10))))
        self.bank_loader = data.loader(data.bank_dataset(knn_images)) if data.has_training_labels else None
        self.autocast_dtype = evaluation_dtype()
        self._bank: FeatureBank | None = None
        options: Any = {"autocast_dtype": self.autocast_dtype, "disable_progress": disable_progress}
        self.dense_probe: DenseProbe | None = None
        if masks is not None and masks.raw_eval is not None and probe:
            self.dense_probe = DenseProbe(teacher, masks, train_images=knn_images, eval_images=eval_images, **options)

    def __call__(self, student: PreTrainedModel, quick: bool = False) -> dict[str, Any]:
        """Return the figures of `evaluate_pair`, `head_accuracy` of a student with a classifier, and `block_errors`.

        With masks, also those of `DenseProbe`.

        With `quick`, on a tenth of the evaluation images (at least 500) and without linear probes. Returns an empty
        dictionary where there are no images to evaluate on.
        """
        loader = self.quick_loader if quick else self.eval_loader
        if loader is None:
            return {}
        student = student.to(self.teacher.device)
        options: dict[str, Any] = {"autocast_dtype": self.autocast_dtype, "disable_progress": self.disable_progress}
        if self._bank is None and self.bank_loader is not None:
            self._bank = extract_features(self.teacher, self.bank_loader, description="teacher, k-NN", **options)
        results = evaluate_pair(
            self.teacher,
            student,
            self.bank_loader,
            loader,
            probe=self.probe and not quick,
            teacher_train_bank=self._bank,
            **options,
        )
        head_accuracy = self.classifier_accuracy(student)
        if head_accuracy is not None:
            results["head_accuracy"] = head_accuracy
        if self.dense_probe is not None and not quick:
            results |= self.dense_probe(student)
        return results | {"block_errors": self.block_errors(student)}

    @torch.no_grad()
    def classifier_accuracy(self, model: PreTrainedModel) -> float | None:
        """Return the accuracy of the model's own head; `None` without a head, or without labels of its classes."""
        if not hasattr(model, "classifier") or self.eval_loader is None or self.labels is None:
            return None
        ids = head_ids(model.config.id2label, self.labels)
        if ids is None and not self._told:
            self._told = True
            logger.warning(
                "no head accuracy: the classes of the data (%s) are not all among those of the model's id2label (%s)",
                _shortened(self.labels),
                _shortened(list(model.config.id2label.values())),
            )
        if ids is None:
            return None
        accuracy = Accuracy()
        model.eval()
        for batch in self.eval_loader:
            if "labels" not in batch:
                return None
            inputs = image_inputs(vision_tower(model).config, batch["pixel_values"].to(model.device))
            with evaluation_autocast(model.device.type):
                logits = model(**inputs).logits
            accuracy.add_batch(predictions=logits, references=torch.tensor(ids)[batch["labels"]])
        return accuracy.compute()["accuracy"]

    def block_errors(self, student: PreTrainedModel) -> list[float]:
        """Return the relative error of the patch tokens after each block, on the first evaluation batch."""
        if self.eval_loader is None:
            return []
        pixels = next(iter(self.eval_loader))["pixel_values"].to(self.teacher.device)
        with evaluation_autocast(pixels.device.type):
            return block_errors(self.teacher, student, pixels)


@torch.no_grad()
def block_errors(teacher: PreTrainedModel, student: PreTrainedModel, pixel_values: Tensor) -> list[float]:
    """Return the relative error of the student's patch tokens after each block, each model on its own forward pass.

    The blocks of both run in turn, so that the states of two blocks are all that is ever kept: those of all blocks,
    of both models, would not fit for large images.

    Args:
        teacher (`PreTrainedModel`): Softmax model.
        student (`PreTrainedModel`): Model converted from it, on the same device.
        pixel_values (`Tensor`): `(batch, channels, height, width)`.
    """
    for model in (teacher, student):
        model.eval()
    patches, blocks = token_groups(teacher.config)["patches"], transformer_blocks(student)
    calls: list[tuple[tuple, dict]] = []  # what each of the student's blocks gets besides the state
    state: list[Tensor] = []  # the student's, after as many blocks as the teacher has run
    errors: list[float] = []

    def remember(block: nn.Module, args: tuple, kwargs: dict) -> None:
        if not state:
            state.append(args[0] if args else kwargs["hidden_states"])
        calls.append((args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))

    def compare(block: nn.Module, args: tuple, output: Any) -> None:
        rest, kwargs = calls[len(errors)]
        state[0] = state_of(blocks[len(errors)](state[0], *rest, **kwargs))
        ours, theirs = (x[:, patches] for x in (state[0], state_of(output)))
        errors.append(FeatureRelativeError().compute(predictions=ours, references=theirs)["relative_error"])

    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_pre_hook(remember, with_kwargs=True))
        forward_tower(student, pixel_values)
    with ExitStack() as hooks:
        for block in transformer_blocks(teacher):
            hooks.enter_context(block.register_forward_hook(compare))
        forward_tower(teacher, pixel_values)
    return errors


def _shortened(names: list[str]) -> str:
    return f"{len(names):,}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
