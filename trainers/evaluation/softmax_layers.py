"""Softmax layers by measurement: the few blocks whose linear attention costs the most go back to softmax.

Which ones these are differs from model to model, and neither depth nor the error of stage 1 tells it reliably
(docs/experiments.md), so each is tried: one at a time goes back, with the teacher's projections, and the student's own
final features are compared with the teacher's.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_adala.configuration_adala import vision_config
from modeling_adala.inspection.towers import attention_modules, eval_mode, forward_features

from .metrics import FeatureRelativeError

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class SoftmaxTrial:
    """Trial of a student with some of its linear layers back in softmax; both models are left as they are.

    Args:
        student (`PreTrainedModel`): Student after stage 1.
        teacher (`PreTrainedModel`): Its teacher, on the same device.
        batches (`Iterable[Tensor]`): `pixel_values`; some dozens of images tell.
        source (`PreTrainedModel`, *optional*): Model whose projections a layer gets back. Default: the teacher, unless
            its weights are rounded.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        batches: Iterable[Tensor],
        source: PreTrainedModel | None = None,
    ) -> None:
        self.student, self.source, self.pixels = student, source or teacher, list(batches)
        with torch.no_grad():
            self.targets = [forward_features(teacher, batch) for batch in self.pixels]

    @torch.no_grad()
    def error(self, layers: Sequence[int] = ()) -> float:
        """Return the relative error of the student's final features with these layers in softmax."""
        metric = FeatureRelativeError()
        with eval_mode(self.student), in_softmax(self.student, layers, self.source):
            for batch, target in zip(self.pixels, self.targets, strict=True):
                features = forward_features(self.student, batch)
                metric.add_batch(predictions=features.flatten(0, 1), references=target.flatten(0, 1))
        return metric.compute()["relative_error"]

    def ranking(self) -> dict[int, float]:
        """Return the error with each linear layer alone in softmax, ascending; `-1` is the student as it is."""
        linear = vision_config(self.student.config).linear_layers
        errors = {-1: self.error(), **{layer: self.error([layer]) for layer in linear}}
        return dict(sorted(errors.items(), key=lambda item: item[1]))


def rank_softmax_layers(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[Tensor],
    source: PreTrainedModel | None = None,
) -> dict[int, float]:
    """Return the relative error of the student's final features with each linear layer back in softmax, best first.

    Args:
        student, teacher, batches, source: As for `SoftmaxTrial`.

    Returns:
        `dict[int, float]`: Error by layer, ascending; `-1` is the student as it is.

    Example:

    ```python
    ranking = rank_softmax_layers(student, teacher, [torch.randn(8, 3, 28, 28)])  # or real images
    keep_softmax(student, teacher, [layer for layer in ranking if layer >= 0][:1])
    ```
    """
    return SoftmaxTrial(student, teacher, batches, source).ranking()


def choose_softmax_layers(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[Tensor],
    count: int,
    source: PreTrainedModel | None = None,
) -> tuple[list[int], dict[int, float], float]:
    """Put the `count` layers back to softmax that gain the most by it.

    Returns:
        `tuple`: These layers; the ranking, as from `rank_softmax_layers`; and the error with the best two together.
    """
    trial = SoftmaxTrial(student, teacher, batches, source)
    ranking = trial.ranking()
    best = [layer for layer in ranking if layer >= 0]
    pair = trial.error(best[:2])
    keep_softmax(student, source or teacher, best[:count])
    return best[:count], ranking, pair


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
def in_softmax(
    student: PreTrainedModel, layers: Sequence[int], source: PreTrainedModel | None = None
) -> Iterator[None]:
    """Put layers of a student in softmax for a while, with the projections of `source` if given."""
    modules: Any = attention_modules(student)
    maps = {layer: modules[layer].feature_map for layer in layers}
    states = {layer: copy.deepcopy(modules[layer].state_dict()) for layer in layers if source is not None}
    try:
        for layer in layers:
            modules[layer].feature_map = None
            if source is not None:
                _copy_projections(attention_modules(source)[layer], modules[layer])
        yield
    finally:
        for layer in layers:
            modules[layer].feature_map = maps[layer]
        for layer, state in states.items():
            modules[layer].load_state_dict(state)


def _copy_projections(source: nn.Module, target: nn.Module) -> None:
    for name in PROJECTIONS:
        getattr(target, name).load_state_dict(getattr(source, name).state_dict())
