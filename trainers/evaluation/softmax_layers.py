"""Softmax layers by measurement: the few blocks whose linear attention costs the most go back to softmax.

Which ones these are differs from model to model, and neither depth nor the error of stage 1 tells it reliably
(docs/experiments.md), so each is tried: one at a time goes back, with the teacher's projections, and the student's own
final features are compared with the teacher's.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_adala.configuration_adala import vision_config
from modeling_adala.inspection.towers import attention_modules, eval_mode, forward_features

from .metrics import FeatureRelativeError

logger = logging.getLogger(__name__)

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@torch.no_grad()
def rank_softmax_layers(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[Tensor],
    source: PreTrainedModel | None = None,
) -> dict[int, float]:
    """Return the relative error of the student's final features with each linear layer back in softmax, best first.

    Both models are left as they are.

    Args:
        student (`PreTrainedModel`): Student after stage 1.
        teacher (`PreTrainedModel`): Its teacher, on the same device.
        batches (`Iterable[Tensor]`): `pixel_values`; some dozens of images tell.
        source (`PreTrainedModel`, *optional*): Model whose projections a layer gets back. Default: the teacher, unless
            its weights are rounded.

    Returns:
        `dict[int, float]`: Error by layer, ascending; `-1` is the student as it is.

    Example:

    ```python
    ranking = rank_softmax_layers(student, teacher, trainer.calibration_batches())
    keep_softmax(student, teacher, [layer for layer in ranking if layer >= 0][:1])
    ```
    """
    pixels = list(batches)
    targets = [forward_features(teacher, batch) for batch in pixels]

    def error() -> float:
        metric = FeatureRelativeError()
        for batch, target in zip(pixels, targets, strict=True):
            features = forward_features(student, batch)
            metric.add_batch(predictions=features.flatten(0, 1), references=target.flatten(0, 1))
        return metric.compute()["relative_error"]

    with eval_mode(student):
        errors = {-1: error()}
        for layer in vision_config(student.config).linear_layers:
            with _in_softmax(student, source or teacher, layer):
                errors[layer] = error()
    return dict(sorted(errors.items(), key=lambda item: item[1]))


@torch.no_grad()
def keep_softmax(student: PreTrainedModel, teacher: PreTrainedModel, layers: Sequence[int]) -> None:
    """Put layers of a student back to softmax for good, with the teacher's query, key and value projections."""
    config = vision_config(student.config)
    for layer in layers:
        module: Any = attention_modules(student)[layer]
        module.feature_map = None
        if hasattr(module, "local_mixing"):
            del module.local_mixing
        _copy_projections(attention_modules(teacher)[layer], module)
    config.softmax_layers = sorted({*config.softmax_layers, *layers})


@contextmanager
def _in_softmax(student: PreTrainedModel, source: PreTrainedModel, layer: int) -> Iterator[None]:
    ours: Any = attention_modules(student)[layer]
    feature_map, theirs = ours.feature_map, attention_modules(source)[layer]
    saved = {name: getattr(ours, name).state_dict() for name in PROJECTIONS}
    saved = {name: {key: tensor.clone() for key, tensor in state.items()} for name, state in saved.items()}
    try:
        ours.feature_map = None
        _copy_projections(theirs, ours)
        yield
    finally:
        ours.feature_map = feature_map
        for name, state in saved.items():
            getattr(ours, name).load_state_dict(state)


def _copy_projections(source: nn.Module, target: nn.Module) -> None:
    for name in PROJECTIONS:
        getattr(target, name).load_state_dict(getattr(source, name).state_dict())
