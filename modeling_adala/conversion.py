"""Teacher to student: the same weights under linear attention, and the proof that nothing else changed."""

import copy
import logging
import math
import os
from dataclasses import dataclass

import torch
import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RevisionResolutionError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from .checkpoint_safety import check_checkpoint
from .configuration_adala import from_stock_dict, vision_config
from .errors import AdaLAError, DataError, UsageError
from .families import (
    FAMILIES,
    attention_implementation,
    forward_features,
    get_family,
    native_size,
    patch_size,
    vision_tower,
)

logger = logging.getLogger(__name__)

# what a backbone leaves out of its base model
POOLERS = ("pooler.", "head.")


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

    def __str__(self) -> str:
        sizes = ", ".join(f"{size}: {difference:.1e}" for size, difference in self.differences.items())
        return f"parity {'passed' if self.passed else 'FAILED'} (softmax mode against teacher, max abs diff {sizes})"


def load_teacher(teacher: str | os.PathLike | PreTrainedModel, head: str | None = None, **kwargs) -> PreTrainedModel:
    """Opens a stock softmax model of a supported family, frozen, in float32 and in eval mode.

    Args:
        teacher (`str` or `PreTrainedModel`): Hub id, local folder, or a model, which is frozen in place.
        head (`str`, *optional*): `"Model"`, `"ForImageClassification"`, ... Default: what the checkpoint was saved as.
            A head that only AdaLA has (`"ForSemanticSegmentation"`) opens the base model.
        kwargs: Passed to `from_pretrained`, such as `revision` or `dtype` (default: float32).

    Raises:
        UsageError: for an unsupported family, or a student given as a teacher.
        DataError: where neither a local folder nor the Hub has it.
        CheckpointError: for a local folder that `check_checkpoint` refuses.
    """
    teacher = os.fspath(teacher) if isinstance(teacher, os.PathLike) else teacher
    if isinstance(teacher, str):
        config = load_config(teacher, **{key: kwargs[key] for key in ("revision",) if key in kwargs})
        _check_is_stock(config, teacher)
        kwargs.setdefault("dtype", torch.float32)
        name, revision = teacher, kwargs.get("revision")
        teacher = _stock_class(config, head).from_pretrained(name, use_safetensors=True, **kwargs)
        teacher.config._commit_hash = commit_of(name, revision)
    else:
        _check_is_stock(teacher.config, type(teacher).__name__)
        if vision_tower(teacher).config._attn_implementation == "adala":
            raise UsageError(
                "teacher has attn_implementation='adala'; a teacher attends with softmax: set it to 'sdpa'."
            )
    return teacher.eval().requires_grad_(False)


def load_config(name_or_path: str, **kwargs) -> PretrainedConfig:
    """`AutoConfig.from_pretrained` with one-line errors. A local folder is checked first, its weights included.

    Raises:
        DataError: if nothing is there, or the Hub cannot be reached.
        CheckpointError: for a local folder that `check_checkpoint` refuses.
    """
    if os.path.isfile(os.path.join(name_or_path, "config.json")):
        check_checkpoint(name_or_path)
    try:
        return AutoConfig.from_pretrained(name_or_path, **kwargs)
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        if os.path.isfile(os.path.join(name_or_path, "config.json")):
            raise DataError(
                f"model {name_or_path!r} could not be opened: {_first_line(error)} Pass a folder that"
                " save_pretrained wrote."
            ) from error
        raise DataError(
            f"model {name_or_path!r} could not be opened: it is no local model folder, and the Hub did not deliver it"
            f" (offline, or no such id). Pass a folder with a config.json or a reachable Hub id."
        ) from error


def commit_of(name_or_path: str, revision: str | None = None) -> str | None:
    """Return the commit that a model of the Hub was just opened at, and `None` for a local folder.

    A configuration of Transformers 5.23 or later no longer says it.
    """
    if os.path.exists(name_or_path):
        return None
    try:
        return HfApi().resolve_revision(name_or_path, revision=revision, local_files_only=True).resolved
    except (RevisionResolutionError, HFValidationError):
        return None


def load_teacher_config(teacher: str) -> PretrainedConfig:
    """The configuration of a teacher, known to be one, before any time goes into its weights or the data.

    Raises:
        UsageError: for an unsupported family, or a student given as a teacher.
        DataError: if nothing is there, or the Hub cannot be reached.
    """
    config = load_config(teacher)
    _check_is_stock(config, teacher)
    return config


def convert(
    teacher: str | os.PathLike | PreTrainedModel,
    *,
    head: str | None = None,
    feature_map: str | None = None,
    feature_map_kwargs: dict | None = None,
    softmax_layers: list[int] | None = None,
    check_parity: bool = True,
) -> tuple[PreTrainedModel, ParityReport | None]:
    """Builds the linear-attention student of a softmax teacher: all weights are the teacher's, attention is linear.

    The student is untrained: its features are of little use before stages 1 and 2.

    Args:
        teacher (`str` or `PreTrainedModel`): Stock softmax model of a supported family.
        head (`str`, *optional*): `"Model"`, `"ForImageClassification"`, `"Backbone"`, `"ForSemanticSegmentation"`, ...
            Default: the teacher's own. What the teacher has no weights for starts at random.
        feature_map, feature_map_kwargs, softmax_layers (*optional*): See `AdaLAConfigMixin`.
        check_parity (`bool`, *optional*, defaults to `True`): Compare the student in softmax mode with the teacher.

    Returns:
        `tuple[PreTrainedModel, ParityReport or None]`: Student in float32, and the report.

    Raises:
        UsageError: for an unsupported family or wrong options.
        AdaLAError: if the student in softmax mode does not equal the teacher.

    Example:

    ```python
    student, report = convert("facebook/dinov2-small", feature_map="elu", softmax_layers=[-1])
    print(report)
    ```
    """
    options = {"feature_map": feature_map, "feature_map_kwargs": feature_map_kwargs, "softmax_layers": softmax_layers}
    options = {key: value for key, value in options.items() if value is not None}
    teacher = os.fspath(teacher) if isinstance(teacher, os.PathLike) else teacher
    if isinstance(teacher, str):  # wrong options should fail before the weights are read
        student_config(load_teacher_config(teacher), **options)
    model = load_teacher(teacher, head)
    head = head or _head_of(model)
    config = student_config(model.config, **options)
    student = get_family(config.model_type).classes[head](config)
    _copy_weights(model, student)
    student.eval()
    report = parity_report(model, student) if check_parity else None
    if report is not None:
        if not report.passed:
            raise AdaLAError(f"{report}: the student does not carry the teacher's weights; please report this.")
        logger.info(str(report))
    return student, report


def student_config(teacher_config: PretrainedConfig, **options) -> PretrainedConfig:
    """The AdaLA configuration of a teacher: every stock field, the linear-attention options and the provenance."""
    config_class = get_family(teacher_config.model_type).config_class
    fields = copy.deepcopy(teacher_config.to_dict())
    for name in ("architectures", "transformers_version", "auto_map", "dtype"):
        fields.pop(name, None)
    options |= {"teacher_revision": getattr(teacher_config, "_commit_hash", None), "adala_stage": "converted"}
    return config_class(**from_stock_dict(config_class, fields, teacher_config.name_or_path or None, **options))


@torch.no_grad()
def parity_report(teacher: PreTrainedModel, student: PreTrainedModel) -> ParityReport:
    """Compares the student in softmax mode with its teacher at the native and at a rectangular size, in float32."""
    teacher, student = (m if m.dtype == torch.float32 else copy.deepcopy(m).float() for m in (teacher, student))
    config, differences = vision_config(teacher.config), {}
    rows, columns = patch_size(config)
    generator = torch.Generator().manual_seed(0)
    with attention_implementation(student, vision_tower(teacher).config._attn_implementation):
        for height, width in (native_size(config), (4 * rows, 6 * columns)):
            pixels = torch.randn(1, config.num_channels, height, width, generator=generator)
            outputs = [forward_features(model, pixels.to(model.device)) for model in (teacher, student)]
            differences[f"{height}x{width}"] = (outputs[0] - outputs[1].to(outputs[0].device)).abs().max().item()
    return ParityReport(differences)


def _check_is_stock(config: PretrainedConfig, name: str) -> None:
    if config.model_type.startswith("adala_"):
        raise UsageError(f"teacher {name!r} is a linear-attention student; pass the softmax model it came from.")
    get_family(config.model_type)


def _stock_class(config: PretrainedConfig, head: str | None) -> type[PreTrainedModel]:
    family = get_family(config.model_type)
    if head is None:
        saved_as = (config.architectures or [""])[0]
        head = next((head for head, cls in family.classes.items() if cls.__name__ == f"AdaLA{saved_as}"), "Model")
    if head not in family.classes:
        raise UsageError(f"head={head!r} does not exist for {config.model_type}; choose {', '.join(family.classes)}.")
    return family.stock_class(head) or getattr(transformers, family.classes["Model"].__name__.removeprefix("AdaLA"))


def _head_of(teacher: PreTrainedModel) -> str:
    name = type(teacher).__name__
    for head, student_class in get_family(teacher.config.model_type).classes.items():
        if student_class.__name__ == f"AdaLA{name}":
            return head
    known = [cls.__name__.removeprefix("AdaLA") for family in FAMILIES.values() for cls in family.classes.values()]
    raise UsageError(f"teacher class {name} has no linear counterpart; choose one of {', '.join(known)}.")


def _copy_weights(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    same_head = type(student).__name__ == f"AdaLA{type(teacher).__name__}"
    target, source = (student, teacher) if same_head else (vision_tower(student), vision_tower(teacher))
    missing, unexpected = target.load_state_dict(source.state_dict(), strict=False)
    missing = [key for key in missing if ".feature_map." not in key]
    unexpected = [key for key in unexpected if same_head or not key.startswith(POOLERS)]
    if missing or unexpected:
        raise AdaLAError(f"conversion lost weights: missing {missing}, unexpected {unexpected}; please report this.")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
