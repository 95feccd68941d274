"""A whole run in one YAML: teacher, data, the linear student, the settings of each stage."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from modeling_adala.errors import UsageError

from .base_config import AdaLATrainingArguments
from .data_config import DataConfig
from .stages import STAGES, Stage


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
        knn_images (`int`, *optional*, defaults to 5000): Training images that k-NN and linear probe learn from.
        eval_images (`int`, *optional*): Evaluation images. Default: all.
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
    knn_images: int = field(default=5000, metadata={"help": "Training images for k-NN and linear probe."})
    eval_images: int | None = field(default=None, metadata={"help": "Evaluation images. Default: all."})
    control: bool = field(default=False, metadata={"help": "Also train by stage 2 alone for the same wall time."})
    seed: int = field(default=42, metadata={"help": "Seed of everything random."})

    def __post_init__(self):
        super().__post_init__()
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
            self.stage_arguments(stage)

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
        except (TypeError, ValueError) as error:
            raise UsageError(f"{section}: {error}") from error

    @property
    def feature_options(self) -> dict[str, Any]:
        """What `convert` takes."""
        names = ("feature_map", "feature_map_kwargs", "softmax_layers")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    def to_yaml(self) -> str:
        return yaml.safe_dump(asdict(self), sort_keys=False)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "RecipeConfig":
        """Reads a recipe; `overrides` win.

        Raises:
            UsageError: if the file is missing, is no mapping, or holds an unknown setting.
        """
        try:
            content = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"recipe {str(path)!r} could not be read: {str(error).splitlines()[0]}.") from error
        if not isinstance(content, dict):
            raise UsageError(f"recipe {str(path)!r} must hold 'name: value' lines.")
        content |= overrides
        unknown = sorted(set(content) - {item.name for item in fields(cls)})
        if unknown:
            raise UsageError(f"recipe {str(path)!r}: {unknown[0]!r} is no setting; see vit-adala run --help.")
        return cls(**content)
