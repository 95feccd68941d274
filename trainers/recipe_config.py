"""A whole run in one YAML: teacher, data, the linear student, the settings of each stage."""

import contextlib
import copy
import os
import types
from dataclasses import dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from modeling_adala.errors import UsageError

from .base_config import AdaLATrainingArguments
from .data_config import DataConfig, check_counts, check_streaming
from .stages import STAGES, Stage

_PLAIN = (str, int, float, bool, list, dict, date, type(None))
_KINDS = {str: "text", int: "an integer", float: "a number", bool: "true or false", list: "a list", dict: "a mapping"}


@dataclass
class RecipeConfig(DataConfig):
    """Settings of `run_recipe`, on top of `DataConfig`.

    Args:
        teacher (`str`): Softmax checkpoint: Hub id or local folder.
        output_dir (`str`, *optional*, defaults to `"out"`): Everything the run leaves behind.
        feature_map, feature_map_kwargs, softmax_layers (*optional*): See `AdaLAConfigMixin`.
        stages (`list[str]`, *optional*): Default: stages 1 and 2, and stage 3 where the data have labels and
            `supervised` is given.
        attention_alignment, feature_alignment, supervised (`dict`, *optional*): Settings of each stage's config class.
        knn_images (`int`, *optional*, defaults to 2000): Training images that k-NN and linear probe learn from.
        eval_images (`int`, *optional*): Evaluation images. Default: all. The untrained student and the stages before
            the last are evaluated on a tenth of them, at least 500.
        control (`bool`, *optional*, defaults to `False`): Also train a student by stage 2 alone for the wall time of
            stages 1 and 2, and report it beside the student.
        seed (`int`, *optional*, defaults to 42)
    """

    teacher: str = field(default="", metadata={"help": "Softmax checkpoint: Hub id or folder."})
    output_dir: str = field(default="out", metadata={"help": "Everything the run leaves behind."})
    feature_map: str | None = field(default=None, metadata={"help": "phi of the linear attention."})
    feature_map_kwargs: dict = field(default_factory=dict, metadata={"help": "Options of the feature map, as JSON."})
    softmax_layers: list[int] = field(default_factory=list, metadata={"help": "Layers that keep softmax."})
    stages: list[str] = field(
        default_factory=list, metadata={"help": f"Any of {', '.join(STAGES)}, in order. Default: 1 and 2."}
    )
    attention_alignment: dict = field(default_factory=dict, metadata={"help": "Settings of stage 1."})
    feature_alignment: dict = field(default_factory=dict, metadata={"help": "Settings of stage 2."})
    supervised: dict = field(default_factory=dict, metadata={"help": "Settings of stage 3."})
    knn_images: int = field(default=2000, metadata={"help": "Training images for k-NN and linear probe."})
    eval_images: int | None = field(default=None, metadata={"help": "Evaluation images. Default: all."})
    control: bool = field(default=False, metadata={"help": "Also train by stage 2 alone for the same wall time."})
    seed: int = field(default=42, metadata={"help": "Seed of everything random."})

    def __post_init__(self):
        self._fit_types()
        super().__post_init__()
        check_counts(knn_images=self.knn_images, eval_images=self.eval_images)
        if not self.teacher:
            raise UsageError("teacher is missing; pass a Hub id or the folder of a softmax checkpoint.")
        if not self.stages:
            self.stages = list(STAGES)[: 3 if self.supervised else 2]
        unknown = [name for name in self.stages if name not in STAGES]
        if unknown:
            raise UsageError(f"stages={self.stages}: choose from {', '.join(STAGES)}.")
        if self.stages != sorted(self.stages, key=list(STAGES).index) or len(set(self.stages)) < len(self.stages):
            raise UsageError(f"stages={self.stages} must come once each and in the order {', '.join(STAGES)}.")
        for stage in STAGES.values():  # a typo in the settings of stage 3 should not show after stages 1 and 2
            check_streaming(self, self.stage_arguments(stage).max_steps)

    def _fit_types(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            setattr(self, item.name, fit_type(item.name, getattr(self, item.name), hints[item.name]))
        for stage in STAGES.values():
            section, hints = stage.name.replace("-", "_"), get_type_hints(stage.config_class)
            settings = getattr(self, section).items()
            fitted = {name: fit_type(f"{section}.{name}", value, hints.get(name, Any)) for name, value in settings}
            setattr(self, section, fitted)

    def stage_arguments(self, stage: Stage) -> AdaLATrainingArguments:
        """The stage's configuration, writing to its folder in `output_dir`.

        Raises:
            UsageError: for a setting that the stage does not have or a value that it refuses.
        """
        section = stage.name.replace("-", "_")
        settings = {"seed": self.seed, **getattr(self, section)}
        names = {item.name for item in fields(stage.config_class) if item.init}
        unknown = sorted(set(settings) - names)
        if unknown:
            raise UsageError(f"{section}.{unknown[0]} is no setting of {stage.config_class.__name__}.")
        if "output_dir" in settings:
            raise UsageError(f"{section}.output_dir is set by the recipe; set the recipe's own output_dir.")
        try:
            return stage.config_class(output_dir=str(Path(self.output_dir) / stage.directory), **settings)
        except (TypeError, ValueError, ImportError) as error:
            raise UsageError(f"{section}: {error}") from error

    @property
    def feature_options(self) -> dict[str, Any]:
        """What `convert` takes."""
        names = ("feature_map", "feature_map_kwargs", "softmax_layers")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values; a dataset object is described by its type and fingerprint."""
        settings = {
            item.name: copy.deepcopy(getattr(self, item.name)) for item in fields(self) if item.name != "dataset"
        }
        dataset: Any = self.dataset
        if not isinstance(dataset, str):
            dataset = f"{type(dataset).__name__} in memory"
        elif os.path.exists(dataset):
            dataset = os.path.realpath(dataset)
        teacher = os.path.realpath(self.teacher) if os.path.exists(self.teacher) else self.teacher
        return {**settings, "teacher": teacher, "dataset": dataset}

    def to_yaml(self) -> str:
        """Return a recipe that `from_yaml` reads again; one in memory names its dataset, but cannot hold it."""
        settings = {item.name: getattr(self, item.name) for item in fields(self)}
        if not isinstance(self.dataset, str):
            settings["dataset"] = self.to_dict()["dataset"]
        return yaml.safe_dump(settings, sort_keys=False)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "RecipeConfig":
        """Reads a recipe; `overrides` win, in a section setting by setting.

        Raises:
            UsageError: if the file is missing, is no mapping, or holds an unknown setting.
        """
        try:
            content = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"recipe {str(path)!r} could not be read: {str(error).splitlines()[0]}.") from error
        if not isinstance(content, dict):
            raise UsageError(f"recipe {str(path)!r} must hold 'name: value' lines.")
        for name, value in overrides.items():
            merges = isinstance(value, dict) and isinstance(content.get(name), dict)
            content[name] = {**content[name], **value} if merges else value
        unknown = sorted(set(content) - {item.name for item in fields(cls)}, key=str)
        if unknown:
            raise UsageError(f"recipe {str(path)!r}: {unknown[0]!r} is no setting; see vit-adala run --help.")
        return cls(**content)


def fit_type(name: str, value: Any, hint: Any) -> Any:
    """A value as YAML or the command line gives it, as the type that a field declares.

    YAML 1.1 takes 1e-4 for text; a list of one needs no brackets, an empty section no braces. Objects that no YAML
    holds, such as a dataset, pass, and so does what a field of another type is given.

    Raises:
        UsageError: naming the setting and what it must be.
    """
    allowed = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [get_origin(kind) or kind for kind in allowed]
    if type(value) not in _PLAIN or not all(kind in _KINDS or kind is type(None) for kind in kinds):
        return value
    if type(value) not in kinds and value is None and {list, dict} & set(kinds):
        return list() if list in kinds else dict()
    if type(value) not in kinds and list in kinds:
        value = [part.strip() for part in value.split(",")] if isinstance(value, str) else [value]
    if isinstance(value, list) and list in kinds:
        elements = get_args(allowed[kinds.index(list)])
        return [fit_type(name, element, elements[0]) for element in value] if elements else value
    if type(value) in kinds:
        return value
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            if float in kinds:
                return float(value)
            if int in kinds and float(value).is_integer():
                return int(float(value))
    expected = " or ".join(_KINDS[kind] for kind in kinds if kind in _KINDS)
    raise UsageError(f"{name}={value!r} must be {expected}{'; put it in quotes' if str in kinds else ''}.")
