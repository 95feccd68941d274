"""Base of stages 1 and 2: a frozen teacher, and a student that learns to match it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import AutocastKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig, PreTrainedModel

from modeling_adala.attention_interface import is_new_parameter
from modeling_adala.configuration_adala import vision_config
from modeling_adala.conversion.loading import load_teacher
from modeling_adala.errors import AdaLAError, UsageError
from modeling_adala.families import get_family

from .base_trainer import AdaLATrainer, base_model
from .teacher import with_cast_weights

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class AlignmentTrainer(AdaLATrainer):
    """Base of stages 1 and 2: a frozen softmax teacher beside the student, and no labels.

    The teacher is an attribute of the trainer and never of the model, so that no checkpoint can contain it.

    Args:
        model (`str`, `PathLike` or `PreTrainedModel`): The student, or its name or folder for `load_student`.
        teacher_model (`str` or `PreTrainedModel`): The softmax model it was converted from; frozen here.
        args (*optional*): The stage's configuration. Default: one with its default `output_dir`.
        peft_config (`peft.PeftConfig`, *optional*): Train adapters instead of the weights.
        evaluator (`Callable`, *optional*): Called with the student at each evaluation, in eval mode and without
            gradients, in every process. The figures that it returns, `dict[str, float]`, are logged with the prefix
            of the evaluation, such as `eval_`. See `FeatureEvaluator`.
        kwargs: As for `Trainer`.

    Raises:
        UsageError: If teacher and student do not belong together, or for `compute_metrics`.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher_model: str | PreTrainedModel,
        args: Any,
        *,
        evaluator: Callable[[nn.Module], Mapping[str, float]] | None = None,
        **kwargs,
    ):
        if kwargs.get("compute_metrics") is not None:
            raise UsageError(
                "compute_metrics: stages 1 and 2 predict nothing to compute metrics from; pass an evaluator, such as"
                " FeatureEvaluator(teacher, dataset)."
            )
        self.evaluator = evaluator
        teacher = load_teacher(teacher_model)
        check_pair(teacher, model)
        super().__init__(model=model, args=args, **kwargs)
        autocast_dtype = AUTOCAST_DTYPES.get(self.accelerator.mixed_precision) if self.accelerator.native_amp else None
        if autocast_dtype is not None:
            teacher = with_cast_weights(teacher, autocast_dtype)
        # not through accelerator.prepare_model: that would make evaluate() skip preparing the student
        self.teacher_model = teacher.to(self.args.device)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        # now, in epoch 0: on the way, a resumed run would measure the augmentation of a later epoch
        if not all(variance.isfinite().all() for variance in _flatten(self.variances())):
            raise AdaLAError(
                "teacher_model gives features that are not finite on the calibration images; check its weights and the"
                " normalization (image_mean, image_std) of its image processor."
            )
        return super().train(resume_from_checkpoint, **kwargs)

    def own_learning_rates(self) -> list[tuple[set, float]]:
        """Return the parameters that the teacher lacks, all that train in PEFT's wrapper, and `new_learning_rate`."""
        adapted = base_model(self.model) is not self.model
        new = {p for name, p in self.model.named_parameters() if adapted or is_new_parameter(name)}
        return [] if self.args.new_learning_rate is None else [(new, self.args.new_learning_rate)]

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.evaluator is not None:
            with torch.no_grad(), self.compute_loss_context_manager():
                figures = self.evaluator(self.model)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def variances(self) -> list:
        """Return the variances that the losses are relative to, measured once on the calibration images."""
        raise NotImplementedError

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True):
        # accelerate's autocast sits on the student's forward, and neither the teacher nor a redirected forward is it;
        # every weight is used once, so that a cache of cast weights would only hold memory
        return self.accelerator.autocast(AutocastKwargs(cache_enabled=False))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        # the stock step computes no loss for a model without labels, and would gather all hidden states
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def calibration_batches(self) -> Iterable[Tensor]:
        """Yield the `pixel_values` of `calibration_images` training images; see `sample_batches`."""
        size = self.args.per_device_train_batch_size
        for batch in self.sample_batches(self.args.calibration_images, size):
            yield batch["pixel_values"].to(self.args.device)

    def run_as_forward(self, model: nn.Module, method: Callable[..., Any], *args: Any) -> Any:
        """Run `method(student, *args)` as the forward of the wrapped model, so that DDP's and FSDP's hooks fire.

        Calling into `model.module` directly would skip them: gradients would silently stay unsynchronized. Adapters
        are active in `student`, which is the model without PEFT's wrapper.
        """
        student = self.accelerator.unwrap_model(model)
        with forward_replaced(student, lambda *inputs: method(base_model(student), *inputs)):
            return model(*args)


@contextmanager
def forward_replaced(module: nn.Module, method: Callable[..., Any]) -> Iterator[None]:
    """Make the next call of a module run `method` on its positional arguments; from there on `forward` is its own."""
    original = module.__dict__.get("forward")

    def forward(*inputs: Any, **_: Any) -> Any:  # hooks of the student may add arguments, such as its patch grid
        restore()
        return method(*inputs)

    def restore():
        if original is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = original

    module.forward = forward
    try:
        yield
    finally:
        restore()


def run_inside(block: nn.Module, call: Callable[[], Any]) -> Any:
    """Return what `call` returns, run as the forward of a block that FSDP shards: it gathers its parameters there."""
    if not isinstance(block, FSDPModule):
        return call()
    with forward_replaced(block, call):
        return nn.Module.__call__(block)  # not Transformers' own, which would run it under gradient checkpointing


def check_pair(teacher: PreTrainedModel, student: nn.Module) -> None:
    """Raise `UsageError` unless the student is the linear counterpart of the teacher, layer for layer."""
    check_configs(teacher.config, base_model(student).config)


def check_configs(teacher: PretrainedConfig, student: PretrainedConfig) -> None:
    """Raise `UsageError` unless a configuration is that of the linear counterpart of a teacher's."""
    ours, theirs = vision_config(student), vision_config(teacher)
    expected = get_family(theirs.model_type).adala
    if ours.model_type != expected:
        raise UsageError(
            f"model is of type {ours.model_type!r} and teacher_model of type {theirs.model_type!r}; convert this"
            f" teacher to get a student of type {expected!r}."
        )
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "num_channels"):
        if getattr(ours, name) != getattr(theirs, name):
            raise UsageError(
                f"model and teacher_model differ in {name} ({getattr(ours, name)} and {getattr(theirs, name)}); pass"
                " the teacher that the student was converted from."
            )


def _flatten(variances: list) -> Iterator[Tensor]:
    for variance in variances:
        yield from variance.values() if isinstance(variance, dict) else [variance]
