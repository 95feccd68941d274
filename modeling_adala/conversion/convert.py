"""Teacher to student: the same weights under linear attention, and the proof that nothing else changed."""

import copy
import dataclasses
import logging
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..attention_interface import is_new_parameter
from ..configuration_adala import LinearAttentionConfig, from_stock_dict, vision_config
from ..errors import AdaLAError, CheckpointError, UsageError
from ..families import get_family, is_adala
from ..inspection.towers import (
    attention_implementation,
    eval_mode,
    forward_features,
    native_size,
    patch_size,
    vision_tower,
)
from ..modeling_adala import MODELS, head_of, models_of, stock_class
from .loading import check_teacher, load_teacher, load_teacher_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParityReport:
    """Student in softmax mode beside its teacher: the conversion is right if they agree.

    Args:
        differences (`dict[str, float]`): Largest absolute difference of `last_hidden_state` per image size
            (`"heightxwidth"`), in float32 on random pixels.
        tolerance (`float`): What still counts as equal.
    """

    differences: dict[str, float]
    tolerance: float = 1e-5

    @property
    def max_difference(self) -> float:
        return max(self.differences.values(), key=lambda value: math.inf if math.isnan(value) else value)

    @property
    def passed(self) -> bool:
        return self.max_difference < self.tolerance

    def check(self) -> None:
        """Raise `AdaLAError` if they do not agree, and log the differences otherwise."""
        if not self.passed:
            raise AdaLAError(f"{self}: the student does not carry the teacher's weights; please report this.")
        logger.info(str(self))

    def __str__(self) -> str:
        sizes = ", ".join(f"{size}: {difference:.1e}" for size, difference in self.differences.items())
        return f"parity {'passed' if self.passed else 'FAILED'} (softmax mode against teacher, max abs diff {sizes})"


def convert(
    teacher: str | os.PathLike | PreTrainedModel,
    config: LinearAttentionConfig | None = None,
    *,
    head: str | None = None,
    check_parity: bool = True,
    **options: Any,
) -> PreTrainedModel:
    """Return the linear-attention student of a softmax teacher, in float32: the teacher's weights, linear attention.

    The student is untrained: its features are of little use before stages 1 and 2.

    Args:
        teacher (`str` or `PreTrainedModel`): Softmax model of a supported family: Hub id, local folder, or a model,
            which is left as it is. Stock, or one of ours with softmax in every layer.
        config (`LinearAttentionConfig`, *optional*): Options of linear attention. Default: its defaults.
        head (`str`, *optional*): `"Model"`, `"ForImageClassification"`, `"Backbone"`, `"ForSemanticSegmentation"`, ...
            Default: the teacher's own. What the teacher has no weights for starts at random.
        check_parity (`bool`, *optional*, defaults to `True`): Compare the student in softmax mode with the teacher;
            `parity_report` gives the figures.
        options: Single fields of `LinearAttentionConfig`, which override those of `config`.

    Raises:
        UsageError: for an unsupported family or wrong options.
        DataError, CheckpointError: if the teacher cannot be opened, or its weights are not finite.
        AdaLAError: if the student in softmax mode does not equal the teacher.

    Example:

    ```python
    student = convert("facebook/dinov2-small", feature_map="elu", softmax_layers=[-1])
    ```
    """
    linear = _linear_config(config, options)
    teacher = os.fspath(teacher) if isinstance(teacher, os.PathLike) else teacher
    if isinstance(teacher, str):  # wrong options should fail before the weights are read
        teacher_config = load_teacher_config(teacher)
        student_config(teacher_config, linear)
        model = load_teacher(teacher, head, config=teacher_config)
    else:
        model = check_teacher(teacher)
    head = head or _head_of(model)
    own_config = student_config(model.config, linear)
    student = models_of(own_config)[head](own_config)
    pooler = get_family(own_config.model_type).pooler
    if getattr(model, pooler, student) is None:  # `ViTModel(add_pooling_layer=False)`
        setattr(student, pooler, None)
    _copy_weights(model, student)
    student.eval()
    if check_parity:
        parity_report(model, student).check()
    return student


def student_config(
    teacher_config: PretrainedConfig, config: LinearAttentionConfig | None = None, **options: Any
) -> PretrainedConfig:
    """Return the AdaLA configuration of a teacher: every stock field, the linear-attention options, the provenance."""
    config_class = models_of(teacher_config)["Model"].config_class
    fields = copy.deepcopy(teacher_config.to_dict())
    if is_adala(teacher_config):
        for part in (fields, fields.get("vision_config", fields)):
            part["model_type"] = get_family(part["model_type"]).stock
    for name in ("architectures", "transformers_version", "auto_map", "dtype"):
        fields.pop(name, None)
    options = dataclasses.asdict(_linear_config(config, options))
    options |= {"teacher_revision": getattr(teacher_config, "_commit_hash", None), "adala_stage": "converted"}
    return config_class(**from_stock_dict(config_class, fields, teacher_config.name_or_path or None, **options))


@torch.no_grad()
def parity_report(teacher: PreTrainedModel, student: PreTrainedModel) -> ParityReport:
    """Compare the student in softmax mode with its teacher at the native and at a rectangular size, in float32.

    Both are left as they are.

    Raises:
        CheckpointError: if the teacher's own features are not finite.

    Example:

    ```python
    report = parity_report(teacher, convert(teacher))
    print(report)  # parity passed (softmax mode against teacher, ...)
    ```
    """
    teacher, student = (m if m.dtype == torch.float32 else copy.deepcopy(m).float() for m in (teacher, student))
    config, differences = vision_config(teacher.config), {}
    rows, columns = patch_size(config)
    generator = torch.Generator().manual_seed(0)
    own = vision_tower(teacher).config._attn_implementation
    softmax = own if own in ("eager", "sdpa") else "sdpa"  # the others may not know float32
    with (
        eval_mode(teacher),
        eval_mode(student),
        attention_implementation(teacher, softmax),
        attention_implementation(student, softmax),
    ):
        for height, width in (native_size(config), (4 * rows, 6 * columns)):
            pixels = torch.randn(1, config.num_channels, height, width, generator=generator)
            expected, found = (forward_features(model, pixels.to(model.device)) for model in (teacher, student))
            if not expected.isfinite().all():
                raise CheckpointError(
                    f"teacher {teacher.config.name_or_path or type(teacher).__name__!r} gives non-finite features for"
                    f" random images of {height}x{width} pixels: its weights are damaged. Get a fresh copy from its"
                    " source."
                )
            differences[f"{height}x{width}"] = (expected - found.to(expected.device)).abs().max().item()
    return ParityReport(differences)


def _linear_config(config: LinearAttentionConfig | None, options: dict[str, Any]) -> LinearAttentionConfig:
    fields = [field.name for field in dataclasses.fields(LinearAttentionConfig)]
    for name in options:
        if name not in fields:
            raise UsageError(f"linear attention has no option {name!r}; choose one of {', '.join(fields)}.")
    options = {name: value for name, value in options.items() if value is not None}
    return dataclasses.replace(config or LinearAttentionConfig(), **options)


def _head_of(teacher: PreTrainedModel) -> str:
    name = type(teacher).__name__
    head = head_of(teacher.config, name)
    if head is None:
        stock = [stock_class(linear) for classes in MODELS.values() for linear in classes.values()]
        known = dict.fromkeys(model_class.__name__ for model_class in stock if model_class is not None)
        raise UsageError(f"teacher class {name} has no linear counterpart; choose one of {', '.join(known)}.")
    return head


def _copy_weights(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    same_head = head_of(student.config, type(student).__name__) == _head_of(teacher)
    target, source = (student, teacher) if same_head else (vision_tower(student), vision_tower(teacher))
    missing, unexpected = target.load_state_dict(source.state_dict(), strict=False)
    missing = [key for key in missing if not is_new_parameter(key)]
    pooler = f"{get_family(teacher.config.model_type).pooler}."  # which a backbone leaves out
    unexpected = [key for key in unexpected if same_head or not key.startswith(pooler)]
    if missing or unexpected:
        raise AdaLAError(f"conversion lost weights: missing {missing}, unexpected {unexpected}; please report this.")
