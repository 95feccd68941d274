"""The teacher beside the labels: what stage 3 can learn from a softmax model of the same shape."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from modeling_adala.errors import UsageError
from modeling_adala.inspection.towers import (
    final_features,
    forward_features,
    hold_positions,
    image_inputs,
    token_groups,
    vision_tower,
)
from modeling_adala.modeling_adala import head_of

from .alignment_trainer import check_pair
from .losses import TeacherVariance, feature_alignment_loss

CLASSIFYING = ("ForImageClassification", "ForImageClassificationWithTeacher", "ForSemanticSegmentation")


class TeacherTerm:
    """Loss of a student's class scores and final features beside those of a teacher.

    - Scores: Kullback-Leibler divergence of the class probabilities, for each image or each patch. Only where the
      teacher has a head of the same classes.
    - Features: `feature_alignment_loss`, relative to the teacher's variance in the batch.

    Args:
        teacher (`PreTrainedModel`): Frozen: a classifier or segmenter, or a backbone for the features alone.
        student (`PreTrainedModel`): The model that is trained, without wrappers.
        logits_weight (`float`), features_weight (`float`): Weights of the two beside the labels.

    Raises:
        UsageError: If the two do not belong together, or nothing is left to compare.
    """

    def __init__(
        self, teacher: PreTrainedModel, student: PreTrainedModel, logits_weight: float, features_weight: float
    ) -> None:
        check_pair(teacher, student)
        same_classes = teacher.config.id2label == student.config.id2label
        has_head = head_of(teacher.config, type(teacher).__name__) in CLASSIFYING
        self.teacher, self.logits_weight = teacher, logits_weight if has_head and same_classes else 0.0
        self.features_weight, self.groups = features_weight, token_groups(teacher.config)
        if not (self.logits_weight or features_weight):
            raise UsageError(
                "teacher_model leaves nothing to learn from: teacher_features_weight is 0, and the teacher has no head"
                " of these classes; pass a weight above 0, or a teacher that was fine-tuned on them."
            )

    @contextmanager
    def watching(self, student: PreTrainedModel) -> Iterator[list[Tensor]]:
        """Yield a list that holds the student's final features once its forward pass has run."""
        tower, seen = vision_tower(student), list[Tensor]()
        hold_positions(student)

        # inside the forward pass, where sharded weights are whole
        def see(module: nn.Module, args: tuple, output: Any) -> None:
            seen.append(final_features(tower, output))

        handle = tower.register_forward_hook(see)
        try:
            yield seen
        finally:
            handle.remove()

    def __call__(self, pixel_values: Tensor, logits: Tensor, features: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms by name.

        Args:
            pixel_values (`Tensor`): `(batch, channels, height, width)`.
            logits (`Tensor`): The student's, `(batch, classes)` or `(batch, classes, rows, columns)`.
            features (`Tensor`): The student's, `(batch, tokens, hidden_size)`.
        """
        wanted, scores = self._run_teacher(pixel_values)
        terms = {}
        if scores is not None:
            ours, theirs = (x.float().log_softmax(dim=1) for x in (logits, scores))
            divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1).mean()
            terms["teacher_logits"] = self.logits_weight * divergence
        if self.features_weight:
            variances = dict[str, Tensor]()
            for name, group in self.groups.items():
                variance = TeacherVariance()
                variance.add(wanted[:, group])
                variances[name] = variance.value().to(wanted.device)
            weights = dict.fromkeys(self.groups, 1.0)
            losses = feature_alignment_loss(features, wanted, self.groups, variances, weights)
            terms["teacher_features"] = self.features_weight * losses["loss"]
        return terms

    @torch.no_grad()
    def _run_teacher(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        teacher = self.teacher.to(pixel_values.device)
        if not self.logits_weight:
            return forward_features(teacher, pixel_values), None
        with self.watching(teacher) as seen:
            logits = teacher(**forward_inputs(teacher, pixel_values)).logits
        return seen[0], logits


def forward_inputs(model: PreTrainedModel, pixel_values: Tensor) -> dict[str, Any]:
    """Return the arguments with which a classifier or segmenter takes images of any size, features included."""
    if head_of(model.config, type(model).__name__) == "ForSemanticSegmentation":
        return {"pixel_values": pixel_values, "output_hidden_states": True}
    return image_inputs(vision_tower(model).config, pixel_values)
