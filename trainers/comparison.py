"""Teacher beside student, on the student's own forward pass: the figures that a run is judged by."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling_adala.families import forward_tower, token_groups, vision_tower
from modeling_adala.mixins import image_inputs

from .base_config import has_fast_bf16
from .data_config import DataModule
from .evaluation import FeatureBank, evaluate_pair, extract_features
from .metric_functions import accuracy, relative_error


class Comparison:
    """Evaluates any number of students against one teacher; the teacher's k-NN features are computed once.

    Args:
        teacher (`PreTrainedModel`): Softmax model.
        data (`DataModule`): Evaluation images, and training images for k-NN and linear probe.
        knn_images (`int`): How many of those.
        eval_images (`int`, *optional*): How many evaluation images. Default: all.
        probe (`bool`): Whether to fit linear probes.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        data: DataModule,
        *,
        knn_images: int = 2000,
        eval_images: int | None = None,
        probe: bool = True,
        disable_progress: bool | None = None,
    ):
        self.teacher, self.probe, self.disable_progress = teacher, probe, disable_progress
        self.eval_loader = data.loader(data.eval_dataset(eval_images))
        images = min(eval_images or data.num_eval_images, data.num_eval_images)
        self.quick_loader = data.loader(data.eval_dataset(min(images, max(500, images // 10))))
        self.bank_loader = data.loader(data.bank_dataset(knn_images)) if data.labels else None
        self.autocast_dtype = torch.bfloat16 if has_fast_bf16() else None
        self._bank: FeatureBank | None = None

    def __call__(self, student: PreTrainedModel, quick: bool = False) -> dict[str, Any]:
        """All figures of `evaluate_pair`, `head_accuracy` of a student with a classifier, and `block_errors`.

        With `quick`, on a tenth of the evaluation images (at least 500) and without the linear probe. Returns an empty
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
        return results | {"block_errors": self.block_errors(student)}

    @torch.no_grad()
    def classifier_accuracy(self, model: PreTrainedModel) -> float | None:
        """Accuracy of the model's own head; `None` without a head or labels."""
        if not hasattr(model, "classifier") or self.eval_loader is None:
            return None
        predictions, labels = [], []
        model.eval()
        for batch in self.eval_loader:
            if "labels" not in batch:
                return None
            inputs = image_inputs(vision_tower(model).config, batch["pixel_values"].to(model.device))
            with self._autocast(model.device):
                predictions.append(model(**inputs).logits.argmax(-1).cpu())
            labels.append(batch["labels"])
        return accuracy(torch.cat(predictions), torch.cat(labels))

    @torch.no_grad()
    def block_errors(self, student: PreTrainedModel) -> list[float]:
        """Relative error of the patch tokens after each block, on the first evaluation batch."""
        if self.eval_loader is None:
            return []
        pixels = next(iter(self.eval_loader))["pixel_values"]
        patches = token_groups(self.teacher.config)["patches"]
        states: list[list[Tensor]] = []
        for model in (self.teacher, student.eval()):
            with self._autocast(model.device):
                outputs = forward_tower(model, pixels.to(model.device), output_hidden_states=True)
            states.append([state[:, patches].float().flatten(0, 1) for state in outputs.hidden_states[1:]])
        return [relative_error(ours, theirs) for theirs, ours in zip(*states, strict=True)]

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)
