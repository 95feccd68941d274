"""Stage 1: every linear attention learns, independently, to match its softmax counterpart on the same input."""

import logging
from functools import partial
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from modeling_adala.attention_interface import patch_grid
from modeling_adala.configuration_adala import vision_config
from modeling_adala.conversion.loading import load_student, load_teacher
from modeling_adala.errors import UsageError
from modeling_adala.inspection.towers import attention_modules, transformer_blocks

from .alignment_trainer import AlignmentTrainer, run_inside
from .attention_alignment_config import AttentionAlignmentConfig
from .base_trainer import add_adapters, freeze_all_but
from .early_gradients import early_gradients
from .evaluation.softmax_layers import choose_softmax_layers
from .losses import TeacherVariance, alignment_loss_before_projection, attention_alignment_loss
from .teacher import Tap, output_projection, visit_attention, without_output_projection

logger = logging.getLogger(__name__)

TRAINED = (".q_proj.", ".k_proj.", ".v_proj.", ".feature_map.", ".local_mixing.")


class AttentionAlignmentTrainer(AlignmentTrainer):
    """Trainer of query, key and value projections, feature maps and local mixing against the teacher.

    The teacher runs once, in softmax mode and frozen, up to the last linear block. Each student attention gets the
    teacher's input of its block and matches the teacher's output after `o_proj`, before LayerScale and residual; the
    student's MLPs do not run (ViT-AdaLA, arXiv 2603.16063, stage 1). That the match is after `o_proj` is our reading,
    as in IronViT; `o_proj` itself stays frozen.

    Logged: `loss` (mean over the blocks) and `block_<i>`, each relative to the block's own variance.

    Args:
        model, teacher_model, args, peft_config, evaluator, kwargs: See `AlignmentTrainer`. Adapters sit on the query,
            key and value projections; a learned feature map then stays as it is.

    Example:

    ```python
    student = convert("facebook/dinov2-small")
    trainer = AttentionAlignmentTrainer(
        model=student,
        teacher_model="facebook/dinov2-small",
        args=AttentionAlignmentConfig(output_dir="out/1-attention-alignment", max_steps=100),
        train_dataset=dataset,  # items with `pixel_values`
    )
    trainer.train()
    ```
    """

    stage = "attention-alignment"

    def __init__(
        self,
        model: str | PathLike | PreTrainedModel,
        teacher_model: str | PreTrainedModel,
        args: AttentionAlignmentConfig | None = None,
        *,
        peft_config: Any | None = None,
        **kwargs: Any,
    ):
        model = load_student(fspath(model)) if isinstance(model, str | PathLike) else model
        linear_layers = vision_config(model.config).linear_layers
        if not linear_layers:
            raise UsageError(
                "softmax_layers names every layer, so that none is left to align; leave some of them out."
            )
        linear, wrapped = _linear_prefixes(model), model
        if peft_config is not None:
            wrapped = add_adapters(model, peft_config)
        adapters = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        others = [name for name in adapters if not any(part in name for part in TRAINED)]
        if peft_config is not None and (others or not any(name.startswith(linear) for name in adapters)):
            raise UsageError(
                "peft_config: stage 1 trains the query, key and value projections and nothing else; pass"
                " target_modules=['q_proj', 'k_proj', 'v_proj'], or some of them."
            )
        freeze_all_but(
            model,
            lambda name: (
                any(part in name for part in TRAINED)
                and name.startswith(linear)
                and (peft_config is None or name in adapters)
            ),
        )
        args = AttentionAlignmentConfig() if args is None else args
        if args.auto_softmax_layers and (peft_config is not None or args.auto_softmax_layers >= len(linear_layers)):
            raise UsageError(
                f"auto_softmax_layers={args.auto_softmax_layers}: pass fewer than {len(linear_layers)}, the number of"
                " linear layers, and no peft_config: a layer goes back with the teacher's own projections."
            )
        if args.auto_softmax_layers:  # layers go back with these weights, which the base class may round
            self.exact_teacher = teacher_model = load_teacher(teacher_model)
        super().__init__(model=wrapped, teacher_model=teacher_model, args=args, **kwargs)
        if args.auto_softmax_layers and self.is_fsdp_enabled:
            raise UsageError(
                f"auto_softmax_layers={args.auto_softmax_layers} puts whole layers back, which FSDP shards; choose"
                " them in a run with DDP or one process, and pass them as softmax_layers."
            )
        self.layers: list[int] = linear_layers
        self._variances: list[Tensor] | None = None
        self._grams: dict[int, Tensor | None] | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        output = super().train(resume_from_checkpoint, **kwargs)
        if self.args.auto_softmax_layers:
            self.choose_softmax_layers(self.args.auto_softmax_layers)
        return output

    def choose_softmax_layers(self, count: int) -> dict[int, float]:
        """Put the `count` layers back to softmax that gain the most by it, log the ranking, and return it."""
        student = self.accelerator.unwrap_model(self.model)
        with self.compute_loss_context_manager():
            images = self.calibration_batches()
            chosen, ranking, pair = choose_softmax_layers(
                student, self.teacher_model, images, count, self.exact_teacher
            )
        errors = {f"softmax_{'none' if layer < 0 else layer}": error for layer, error in ranking.items()}
        self.log({**errors, "softmax_best_two": pair})
        listed = ", ".join(f"{'none' if layer < 0 else layer} {error:.4f}" for layer, error in ranking.items())
        logger.warning("softmax layers %s, by the relative error of the features with each: %s", chosen, listed)
        return ranking

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, errors = self.run_as_forward(model, self.align_blocks, inputs["pixel_values"])
        for layer, error in zip(self.layers, errors, strict=True):
            self.record(f"block_{layer}", error)
        return (loss, None) if return_outputs else loss

    def align_blocks(self, student: PreTrainedModel, pixel_values: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the mean loss of the linear blocks, and the loss of each, detached.

        Each block is compared when the teacher has run it, and back-propagated at once: blocks share no parameters
        and no activations, so that the activations of one block are all that is ever kept. See `early_gradients`. The
        output projection is frozen and the teacher's own, so that the comparison can do without applying it.
        """
        modules, blocks, training = attention_modules(student), transformer_blocks(student), torch.is_grad_enabled()
        grid = patch_grid(vision_config(student.config), pixel_values)  # which a stock teacher's blocks are not told
        variances = dict(zip(self.layers, self.variances(), strict=True))
        grams = self.grams(student)
        scale = None if self.accelerator.scaler is None else self.accelerator.scaler.scale
        losses: list[Tensor] = []

        def loss_of(layer: int, tap: Tap) -> Tensor:
            module, gram = modules[layer], grams[layer]
            if gram is None:
                output = module(*tap.args, **tap.kwargs | {"patch_grid": grid})[0]
                error = attention_alignment_loss(output, tap.output, variances[layer])
            else:
                with without_output_projection(module):
                    context = module(*tap.args, **tap.kwargs | {"patch_grid": grid})[0]
                error = alignment_loss_before_projection(context, tap.context, gram, variances[layer])
            trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
            return early_gradients(error, trained, scale)

        def visit(layer: int, tap: Tap) -> None:
            with torch.set_grad_enabled(training):
                losses.append(run_inside(blocks[layer], partial(loss_of, layer, tap)))

        visit_attention(self.teacher_model, pixel_values, self.layers, visit)
        return torch.stack(losses).mean(), [loss.detach() for loss in losses]

    @torch.no_grad()
    def grams(self, student: PreTrainedModel) -> dict[int, Tensor | None]:
        """Return W^T W of each linear block's output projection, over its outputs; `None` where the student's differs.

        In the precision in which the projection is multiplied. See `alignment_loss_before_projection`.
        """
        if self._grams is None:
            self._grams = {}
            for layer in self.layers:
                ours, theirs = (
                    output_projection(attention_modules(model)[layer]) for model in (student, self.teacher_model)
                )
                weight = _whole(ours.weight)
                with torch.autocast(weight.device.type, enabled=False):
                    gram = (weight.T @ weight / ours.out_features).to(theirs.weight.dtype)
                self._grams[layer] = gram if same_projection(ours, theirs) else None
        return self._grams

    def variances(self) -> list[Tensor]:
        """Return the variance of each linear block's teacher output over the calibration images."""
        if self._variances is None:
            measured = {layer: TeacherVariance() for layer in self.layers}
            with self.compute_loss_context_manager():
                for pixel_values in self.calibration_batches():
                    visit_attention(
                        self.teacher_model,
                        pixel_values,
                        self.layers,
                        lambda layer, tap: measured[layer].add(tap.output),
                    )
            self._variances = [variance.value() for variance in measured.values()]
        return self._variances


def same_projection(student: nn.Linear, teacher: nn.Linear) -> bool:
    """Return whether two projections are equal in the teacher's precision."""
    pairs = [(student.weight, teacher.weight), (student.bias, teacher.bias)]
    return all(
        theirs is ours is None
        or (ours is not None and theirs is not None and torch.equal(_whole(ours).to(theirs), theirs))
        for ours, theirs in pairs
    )


def _whole(parameter: Tensor) -> Tensor:
    """Return a parameter as a plain tensor, gathered where FSDP shards it."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _linear_prefixes(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the prefixes of the parameter names of the linear attention modules."""
    paths = {id(module): path for path, module in model.named_modules()}
    modules = attention_modules(model)
    return tuple(f"{paths[id(modules[layer])]}." for layer in vision_config(model.config).linear_layers)
