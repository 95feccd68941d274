"""Stage 3: labels, and a teacher beside them where there is one. Plain `transformers.Trainer` does without it."""

import copy
import logging
import time
from collections.abc import Callable
from os import PathLike, fspath
from typing import Any, cast

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from modeling_adala.attention_interface import is_new_parameter
from modeling_adala.conversion.loading import load_classifier, load_config, load_student, load_teacher
from modeling_adala.errors import UsageError
from modeling_adala.families import find_family, is_adala
from modeling_adala.inspection.towers import image_inputs, vision_tower

from .base_trainer import AdaLATrainer, add_adapters, base_model, freeze_all_but
from .data.labels import class_names
from .data.segmentation_data import IGNORE_INDEX
from .evaluation.metrics import MeanIoU, compute_accuracy
from .evaluation.segmentation import SegmentationMetrics, is_segmenter, score_masks, segment
from .head_fit import fit_head, head_layers, is_new
from .supervised_config import SupervisedConfig
from .teacher_term import TeacherTerm, forward_inputs

logger = logging.getLogger(__name__)


class SupervisedTrainer(AdaLATrainer):
    """Trainer that fine-tunes a model, linear or softmax, for image classification or semantic segmentation.

    Evaluation reports accuracy, or mean IoU, IoU by class and pixel accuracy: over the whole split, at the resolution
    of each mask, on whole images or on windows.

    Args:
        model (`str`, `PathLike` or `PreTrainedModel`): Model for image classification or semantic segmentation, AdaLA
            or stock; or the name or folder of a classifier or backbone for `load_classifier`, with the classes of
            `train_dataset` where it names them, else those of the checkpoint.
        args (`SupervisedConfig`, *optional*): Settings. Default: one with its default `output_dir`.
        teacher_model (`str`, `PathLike` or `PreTrainedModel`, *optional*): Softmax model of the same shape to learn
            from beside the labels: fine-tuned for the same classes, or pretrained, for its features alone. Its terms
            are logged as `teacher_logits` and `teacher_features`; see `TeacherTerm`.
        peft_config (`peft.PeftConfig`, *optional*): Train adapters instead of the backbone's weights. The head is
            trained whole, with `head_learning_rate`: it is added to `modules_to_save`.
        compute_metrics (`Callable`, *optional*): As for `Trainer`. Default: as above. For segmentation, it gets the
            confusion matrices of a batch `(batch, num_labels, num_labels)` as predictions, and `compute_result`.
        kwargs: As for `Trainer`; items hold `pixel_values` and `labels`.

    Example:

    ```python
    trainer = SupervisedTrainer(
        model="out/2-feature-alignment",  # opened with a new head for the classes of the dataset
        args=SupervisedConfig(output_dir="out/3", max_steps=1),
        train_dataset=dataset,
    )
    trainer.train()
    ```
    """

    stage = "supervised"

    def __init__(
        self,
        model: str | PathLike | nn.Module,
        args: SupervisedConfig | None = None,
        *,
        teacher_model: str | PathLike | PreTrainedModel | None = None,
        peft_config: Any | None = None,
        compute_metrics: Callable | None = None,
        **kwargs: Any,
    ):
        args = SupervisedConfig() if args is None else copy.copy(args)
        if isinstance(model, str | PathLike):
            labels = class_names(kwargs.get("train_dataset")) or _labels_of(load_config(fspath(model)))
            model = cast(nn.Module, load_classifier(fspath(model), labels))
        if peft_config is not None:
            if args.freeze_backbone:
                raise UsageError("freeze_backbone=True with peft_config leaves adapters untrained; pass one of them.")
            model = add_adapters(model, _with_head(peft_config, model))
        bare, tower = base_model(model), vision_tower(base_model(model))
        self.head = set(bare.parameters()) - set(tower.parameters())
        if bare is model:
            names = {name for name, parameter in model.named_parameters() if parameter in self.head}
            # the class token's mask twin never sees a gradient in classification
            freeze_all_but(
                model, lambda name: "mask_token" not in name and (name in names or not args.freeze_backbone)
            )
        self.segments = is_segmenter(bare)
        if self.segments:
            args.batch_eval_metrics = True
            compute_metrics = compute_metrics or SegmentationMetrics(_labels_of(bare.config))
        self.teacher_term: TeacherTerm | None = None
        args.check_teacher(teacher_model is not None)
        if teacher_model is not None:
            self.teacher_term = _teacher_term(teacher_model, bare, args)
        super().__init__(model=model, args=args, compute_metrics=compute_metrics or compute_accuracy, **kwargs)

    def prepare_start(self) -> None:
        """Fit a new head, or any with `refit_head`, to the features of the backbone; see `fit_head`."""
        bare, start = base_model(self.model), time.perf_counter()
        layers, count = head_layers(bare), self.args.head_fit_images
        if layers is None or not count or not (self.args.refit_head or is_new(layers[1])):
            return
        batches = self.sample_batches(count, self.args.per_device_train_batch_size)
        shown = tqdm(batches, desc="fitting the head", leave=False, disable=self.args.disable_tqdm)
        images = fit_head(bare, shown, autocast=self.compute_loss_context_manager())
        logger.warning("stage 3: head fitted to %d images in %.0f s", images, time.perf_counter() - start)

    def own_learning_rates(self) -> list[tuple[set, float]]:
        """Return the head's parameters and those that the teacher lacks, with the rates of `args`."""
        rates = [(self.head, self.args.head_learning_rate)]
        if self.args.new_learning_rate is not None:
            new = {parameter for name, parameter in self.model.named_parameters() if is_new_parameter(name)}
            rates.append((new, self.args.new_learning_rate))
        return rates

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        bare, pixels = base_model(self.model), inputs["pixel_values"]
        if self.teacher_term is not None and model.training:
            inputs = inputs | forward_inputs(bare, pixels)
            with self.teacher_term.watching(bare) as seen:
                loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            self.record("labels", loss)
            for name, term in self.teacher_term(pixels, outputs["logits"], seen[0]).items():
                self.record(name, term)
                loss = loss + term
            return (loss, outputs) if return_outputs else loss
        family = find_family(getattr(bare.config, "model_type", ""))
        if family is not None and not self.segments:  # segmentation models take any size by themselves
            inputs = inputs | image_inputs(vision_tower(bare).config, pixels)
        return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if not self.segments:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        # a confusion matrix per image: unlike scores and masks, of one size, small, and right to gather and to add up
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = segment(model, inputs["pixel_values"], self.args.windows)
        losses, maps = score_masks(logits, inputs["labels"])
        if prediction_loss_only:
            return losses.mean(), None, None
        metric = MeanIoU(logits.shape[1], IGNORE_INDEX)
        pairs = zip(maps, inputs["labels"], strict=True)
        confusions = torch.stack([torch.from_numpy(metric.sums([ours], [mask])) for ours, mask in pairs])
        confusions = confusions.to(logits.device)
        return losses.mean(), confusions, confusions.sum(dim=-1)


def _teacher_term(
    teacher: str | PathLike | PreTrainedModel, student: PreTrainedModel, args: SupervisedConfig
) -> TeacherTerm:
    """Open the teacher, and fill in the weights that `args` leaves open."""
    if teacher is student:
        raise UsageError("teacher_model is the model that is trained; pass another one, such as its softmax teacher.")
    if isinstance(teacher, str | PathLike):
        name = fspath(teacher)
        teacher = load_student(name) if is_adala(load_config(name)) else load_teacher(name)
    if args.teacher_features_weight is None:
        args.teacher_features_weight = 1.0
    logits_weight = 1.0 if args.teacher_logits_weight is None else args.teacher_logits_weight
    term = TeacherTerm(teacher.eval().requires_grad_(False), student, logits_weight, args.teacher_features_weight)
    if args.teacher_logits_weight and not term.logits_weight:
        raise UsageError(
            f"teacher_logits_weight={args.teacher_logits_weight:g} needs a teacher with a head of these classes; pass"
            " one that was fine-tuned on them, or leave it out."
        )
    args.teacher_logits_weight = term.logits_weight
    return term


def _labels_of(config: PretrainedConfig) -> list[str]:
    return [config.id2label[index] for index in range(len(config.id2label))]


def _with_head(peft_config: Any, model: nn.Module) -> Any:
    """Return the configuration with all modules outside the vision tower in `modules_to_save`."""
    tower, peft_config = vision_tower(model), copy.copy(peft_config)
    heads = [name for name, child in model.named_children() if all(part is not tower for part in child.modules())]
    peft_config.modules_to_save = sorted({*(getattr(peft_config, "modules_to_save", None) or []), *heads})
    return peft_config
