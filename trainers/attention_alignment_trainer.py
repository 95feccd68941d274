"""Stage 1: every linear block learns, alone, to give what its softmax block gives on the same input."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling_adala.configuration_adala import vision_config
from modeling_adala.errors import UsageError
from modeling_adala.families import attention_modules

from .attention_alignment_config import AttentionAlignmentConfig
from .base_trainer import AlignmentTrainer, freeze_all_but
from .early_gradients import EarlyGradients
from .losses import TeacherVariance, attention_alignment_loss
from .teacher import visit_attention

TRAINED = (".q_proj.", ".k_proj.", ".v_proj.", ".feature_map.")


class AttentionAlignmentTrainer(AlignmentTrainer):
    """Trains query, key and value projections (and learned feature maps) against the teacher's attention outputs.

    The teacher runs once, in softmax mode and frozen, up to the last linear block. Each student attention gets the
    teacher's input of its block and matches the teacher's output after `o_proj`, before LayerScale and residual; the
    student's MLPs do not run (ViT-AdaLA, arXiv 2603.16063, stage 1). That the match is after `o_proj` is our reading,
    as in IronViT; `o_proj` itself stays frozen.

    Logged: `loss` (mean over the blocks) and `block_<i>`, each relative to the block's own variance.

    Example:

    ```python
    student, _ = convert("facebook/dinov2-small")
    trainer = AttentionAlignmentTrainer(
        model=student,
        teacher_model="facebook/dinov2-small",
        args=AttentionAlignmentConfig(output_dir="out/1-attention-alignment"),
        train_dataset=dataset,  # items with `pixel_values`
    )
    trainer.train()
    ```
    """

    stage = "attention-alignment"

    def __init__(
        self,
        model: PreTrainedModel,
        teacher_model: str | PreTrainedModel,
        args: AttentionAlignmentConfig,
        **kwargs: Any,
    ):
        linear_layers = vision_config(model.config).linear_layers
        if not linear_layers:
            raise UsageError(
                "softmax_layers names every layer, so that none is left to align; leave some of them out."
            )
        linear = _linear_prefixes(model)
        freeze_all_but(model, lambda name: any(part in name for part in TRAINED) and name.startswith(linear))
        super().__init__(model=model, teacher_model=teacher_model, args=args, **kwargs)
        self.layers: list[int] = linear_layers
        self._variances: list[Tensor] | None = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, errors = self.run_as_forward(model, self.align_blocks, inputs["pixel_values"])
        for layer, error in zip(self.layers, errors, strict=True):
            self.record(f"block_{layer}", error)
        return (loss, None) if return_outputs else loss

    def align_blocks(self, student: PreTrainedModel, pixel_values: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Mean loss of the linear blocks, and the loss of each, detached.

        Each block is compared while the teacher stands at it, and back-propagated at once: blocks share no parameters
        and no activations, so that the activations of one block are all that is ever kept. See `EarlyGradients`.
        """
        modules, training = attention_modules(student), torch.is_grad_enabled()
        variances = dict(zip(self.layers, self.variances(), strict=True))
        scaler = self.accelerator.scaler
        gradients = EarlyGradients(scale=None if scaler is None else scaler.scale)
        errors: list[Tensor] = []

        def visit(layer: int, args: tuple, kwargs: dict[str, Any], target: Tensor) -> None:
            with torch.set_grad_enabled(training):
                output = modules[layer](*args, **kwargs)[0]
                error = attention_alignment_loss(output, target, variances[layer])
                trained = [parameter for parameter in modules[layer].parameters() if parameter.requires_grad]
                gradients.add(error / len(self.layers), trained)
            errors.append(error.detach())

        visit_attention(self.teacher_model, pixel_values, self.layers, visit)
        return gradients.loss(), errors

    def variances(self) -> list[Tensor]:
        """Variance of each linear block's teacher output over the calibration images."""
        if self._variances is None:
            measured = {layer: TeacherVariance() for layer in self.layers}
            with self.compute_loss_context_manager():
                for pixel_values in self.calibration_batches():
                    visit_attention(
                        self.teacher_model,
                        pixel_values,
                        self.layers,
                        lambda layer, args, kwargs, target: measured[layer].add(target),
                    )
            self._variances = [variance.value() for variance in measured.values()]
        return self._variances


def _linear_prefixes(model: PreTrainedModel) -> tuple[str, ...]:
    """What the parameter names of the linear attention modules start with."""
    paths = {id(module): path for path, module in model.named_modules()}
    modules = attention_modules(model)
    return tuple(f"{paths[id(modules[layer])]}." for layer in vision_config(model.config).linear_layers)
