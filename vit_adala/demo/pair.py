"""The two models of the demo: a linear student and the softmax teacher it came from."""

import math
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from modeling_adala.attention_interface import feature_map_of
from modeling_adala.configuration_adala import in_words, vision_config
from modeling_adala.conversion.convert import convert
from modeling_adala.conversion.loading import (
    load_config,
    load_image_processor,
    load_student,
    load_teacher,
    load_teacher_config,
)
from modeling_adala.errors import UsageError
from modeling_adala.families import get_family, is_adala
from modeling_adala.inspection.flops import image_cost
from modeling_adala.inspection.towers import attention_modules, forward_features, native_size, patch_size
from trainers.alignment_trainer import check_configs
from trainers.data.digits import DIGITS_TEACHER
from trainers.data.transforms import check_image_size

from ..benchmark.models import known_teacher

QUICKSTART = "out/quickstart/3-supervised"
# patches along a side of the smallest image, and of the largest that is chosen by itself
SMALLEST, LARGEST = 8, 128
# longest forward pass of the teacher that keeps the slider responsive, in seconds
MAX_SECONDS = 1.5


@dataclass(frozen=True)
class Pair:
    """Teacher and student on the same device, and what prepares their inputs.

    Args:
        models (`dict[str, PreTrainedModel]`): `"teacher"` and `"student"`, in eval mode.
        names (`dict[str, str]`): Names of both, to show.
        processor (`BaseImageProcessor`, *optional*): Image processor; without one, pixels are fed as 0..1.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Tokenizer of the text tower. Without one, zero-shot scores
            are left out.
        max_size (`int`, *optional*): Largest side in pixels. Default: what this machine is quick at.
    """

    models: dict[str, PreTrainedModel]
    names: dict[str, str]
    processor: Any = None
    tokenizer: Any = None
    max_size: int | None = None

    @property
    def config(self) -> PretrainedConfig:
        """Configuration of the student."""
        return self.models["student"].config

    @property
    def step(self) -> int:
        """Pixels by which the side of a square image grows so that whole patches tile it."""
        return math.lcm(*patch_size(self.config))

    @cached_property
    def sides(self) -> tuple[int, int, int]:
        """Smallest, first and largest side of an image in pixels."""
        native = max(native_size(self.config)) // self.step * self.step
        smallest, largest = SMALLEST * self.step, self.max_size or self._quick_size()
        return min(smallest, native, largest), min(native, largest), largest

    def _quick_size(self) -> int:
        """Return the largest side at which a pass of the teacher takes no more than `MAX_SECONDS`."""
        known = 2 * SMALLEST * self.step
        pace = _seconds(self.models["teacher"], known) / _flops(self.config, known)
        sides = range(LARGEST * self.step, known, -self.step)
        return next((side for side in sides if pace * _flops(self.config, side) < MAX_SECONDS), known)

    def describe(self, role: str) -> str:
        """Return a line on the `"teacher"` or the `"student"`."""
        model, config = self.models[role], vision_config(self.config)
        if role == "teacher":
            size = f"{config.num_hidden_layers} layers, {config.hidden_size} wide, patch {self.step}"
            return f"softmax attention · {size} · {model.num_parameters() / 1e6:.1f} M parameters"
        linear = sum(feature_map_of(module) is not None for module in attention_modules(model))
        stage = getattr(config, "adala_stage", None) or "converted"
        state = "not trained" if stage == "converted" else f"after {stage}"
        return " · ".join((f"linear attention in {linear} layers", *in_words(config), state))


def check_models(
    name: str | None, teacher: str | None = None, max_size: int | None = None
) -> tuple[str, str | None, int | None]:
    """Return the arguments of `open_pair`, checked before any weights are read.

    Args:
        name (`str`, *optional*): Linear or softmax checkpoint. Default: the quickstart's result if it is in this
            folder, else the digits teacher that comes with the package.
        teacher (`str`, *optional*): Softmax checkpoint to show beside a linear one. Default: the one it came from.
        max_size (`int`, *optional*): Largest side in pixels. Default: what this machine is quick at.

    Raises:
        UsageError: For a pair that does not belong together, an unknown teacher, or a size that patches do not tile.
        DataError, CheckpointError: See `load_config`.
    """
    if name is None:
        name = QUICKSTART if Path(QUICKSTART).is_dir() else str(DIGITS_TEACHER)
    config = load_config(name)
    get_family(config.model_type)
    if max_size is not None:
        check_image_size(max_size, patch_size(config))
    if not is_adala(config):
        if teacher is not None:
            raise UsageError(f"teacher={teacher!r}: {name!r} is a softmax model, shown beside itself made linear.")
        return name, None, max_size
    if teacher is None:
        recorded = getattr(vision_config(config), "teacher_name_or_path", None) or ""
        teacher = known_teacher(config) or (recorded if recorded.count("/") == 1 else None)
    if teacher is None:
        origin = f"came from {recorded!r}, which is not here" if recorded else "does not say what it came from"
        raise UsageError(f"teacher: {name!r} {origin}; pass --teacher with the softmax model that it was made of.")
    check_configs(load_teacher_config(teacher), config)
    return name, teacher, max_size


def open_pair(name: str, teacher: str | None, max_size: int | None = None) -> Pair:
    """Open the models that `check_models` returned.

    Raises:
        DataError, CheckpointError: See `load_student` and `load_teacher`.
    """
    softmax = load_teacher(teacher or name)
    student = load_student(name) if teacher else convert(softmax)
    models = {"teacher": softmax, "student": student}
    models = {role: model.eval().to(PartialState().device) for role, model in models.items()}
    names = {"teacher": _short(teacher or name), "student": _short(name)}
    tokenizer = _find_tokenizer(student, [name, teacher or name])
    return Pair(models, names, load_image_processor(name), tokenizer, max_size)


def _find_tokenizer(model: PreTrainedModel, names: list[str]) -> Any:
    if not hasattr(model, "get_text_features"):
        return None
    for name in names:
        try:
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError):  # without one, the demo leaves the text tower out
            continue
    return None


def _short(name: str) -> str:
    path = Path(name)
    if not path.is_dir():
        return name
    return path.name if path == DIGITS_TEACHER else "/".join(path.resolve().parts[-2:])


def _flops(config: PretrainedConfig, side: int) -> int:
    return image_cost(config, (side, side), "sdpa").flops


@torch.no_grad()
def _seconds(model: PreTrainedModel, side: int) -> float:
    pixels = torch.randn(1, vision_config(model.config).num_channels, side, side, device=model.device)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        forward_features(model, pixels).sum().item()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
