"""Stage 1: every linear block learns, alone, to give what its softmax block gives on the same input."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_adala.configuration_adala import vision_config
from modeling_adala.errors import UsageError
from modeling_adala.families import attention_modules, forward_tower

from .attention_alignment_config import AttentionAlignmentConfig
from .base_trainer import AlignmentTrainer, freeze_all_but
from .losses import attention_alignment_loss, teacher_variance

TRAINED = (".q_proj.", ".k_proj.", ".v_proj.", ".feature_map.")


class AttentionAlignmentTrainer(AlignmentTrainer):
    """Trains query, key and value projections (and learned feature maps) against the teacher's attention outputs.

    The teacher runs once, in softmax mode and frozen. Each student attention gets the teacher's input of its block and
    matches the teacher's output after `o_proj`, before LayerScale and residual; the student's MLPs do not run
    (ViT-AdaLA, arXiv 2603.16063, stage 1). That the match is after `o_proj` is our reading, as in IronViT; `o_proj`
    itself stays frozen.

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
        calls, targets = self.teacher_attention(inputs["pixel_values"])
        outputs = self.run_as_forward(model, self.student_attention, calls)
        components = attention_alignment_loss(outputs, targets, self.variances())
        loss = components["loss"] / len(self.layers)
        for layer, error in zip(self.layers, components["blocks"], strict=True):
            self.record(f"block_{layer}", error)
        return (loss, None) if return_outputs else loss

    @torch.no_grad()
    def teacher_attention(self, pixel_values: Tensor) -> tuple[list[tuple[tuple, dict]], list[Tensor]]:
        """Arguments and output `(batch, tokens, hidden_size)` of the teacher's attention, for each linear block.

        The arguments are the hidden states and what a family adds to them, such as DINOv3's rotary positions.
        """
        taps: dict[int, tuple[tuple[tuple, dict], Tensor]] = {}

        def tap(layer: int):
            def hook(module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
                taps[layer] = ((args, kwargs), output[0])

            return hook

        modules = attention_modules(self.teacher_model)
        handles = [modules[i].register_forward_hook(tap(i), with_kwargs=True) for i in self.layers]
        try:
            forward_tower(self.teacher_model, pixel_values)
        finally:
            for handle in handles:
                handle.remove()
        return [taps[i][0] for i in self.layers], [taps[i][1] for i in self.layers]

    def student_attention(self, student: PreTrainedModel, calls: list[tuple[tuple, dict]]) -> list[Tensor]:
        """Output of each linear student attention on the teacher's arguments of that block."""
        modules = attention_modules(student)
        return [modules[i](*args, **kwargs)[0] for i, (args, kwargs) in zip(self.layers, calls, strict=True)]

    def variances(self) -> list[Tensor]:
        """Variance of each block's teacher output over the calibration images."""
        if self._variances is None:
            with self.compute_loss_context_manager():
                batches = [self.teacher_attention(pixels)[1] for pixels in self.calibration_batches()]
            self._variances = [teacher_variance(torch.cat(outputs)) for outputs in zip(*batches, strict=True)]
        return self._variances


def _linear_prefixes(model: PreTrainedModel) -> tuple[str, ...]:
    """What the parameter names of the linear attention modules start with."""
    paths = {id(module): path for path, module in model.named_modules()}
    modules = attention_modules(model)
    return tuple(f"{paths[id(modules[layer])]}." for layer in vision_config(model.config).linear_layers)
