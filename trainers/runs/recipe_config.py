"""A whole run in one YAML: teacher, data, the linear student, the settings of each stage."""

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from modeling_adala.configuration_adala import LinearAttentionConfig
from modeling_adala.errors import UsageError

from ..base_config import COUNT, RANGES, AdaLATrainingArguments
from ..data.data_config import DataConfig, check_streaming
from ..data.sources import describe
from .plain_yaml import dump_yaml, read_yaml
from .presets import PRESETS, with_preset
from .settings import automatic_layers, build, did_you_mean, fit_type
from .stages import STAGES, Stage


@dataclass
class RecipeConfig(LinearAttentionConfig, DataConfig):
    """Settings of `run_recipe`, on top of `LinearAttentionConfig` and `DataConfig`.

    `recipe` names the preset that a YAML file or `from_settings` started from: `"default"`, or `"paper"` for plain
    linear attention and the final features alone (see `PRESETS`).

    Args:
        teacher (`str`): Softmax checkpoint: Hub id or local folder.
        output_dir (`str`, *optional*, defaults to `"out"`): Everything the run leaves behind.
        softmax_layers (`list[int]` or `str`, *optional*): Also `"auto:K"`: K layers that are chosen after stage 1, by
            measurement.
        stages (`list[str]`, *optional*): Default: stages 1 and 2, and stage 3 where the data have labels and
            `supervised` is given.
        attention_alignment, feature_alignment, supervised (`dict`, *optional*): Settings of each stage's config class.
        supervised_teacher (`bool`, *optional*, defaults to `False`): Stage 3 learns from the teacher, too, beside the
            labels; see `SupervisedTrainer`.
        knn_images (`int`, *optional*, defaults to 2000): Training images that k-NN and linear probe learn from.
        eval_images (`int`, *optional*): Evaluation images. Default: all. The untrained student and the stages before
            the last are evaluated on a tenth of them, at least 500.
        control (`bool`, *optional*, defaults to `False`): Also train a student by stage 2 alone for the wall time of
            stages 1 and 2, and report it beside the student.
        seed (`int`, *optional*, defaults to 42)

    Example:

    ```python
    config = RecipeConfig(teacher="facebook/dinov2-small", dataset="path/to/images", output_dir="out/mine")
    ```
    """

    recipe: str = field(default="default", init=False, metadata={"section": True})
    teacher: str = field(default="", metadata={"help": "Softmax checkpoint: Hub id or folder."})
    output_dir: str = field(default="out", metadata={"help": "Everything the run leaves behind."})
    stages: list[str] = field(
        default_factory=list, metadata={"help": f"Any of {', '.join(STAGES)}, in order. Default: 1 and 2."}
    )
    attention_alignment: dict = field(default_factory=dict, metadata={"section": True})
    feature_alignment: dict = field(default_factory=dict, metadata={"section": True})
    supervised: dict = field(default_factory=dict, metadata={"section": True})
    supervised_teacher: bool = field(
        default=False, metadata={"help": "Stage 3 learns from the teacher, too, beside the labels."}
    )
    knn_images: int = field(
        default=2000, metadata={"help": "Training images for k-NN and linear probe.", "range": COUNT}
    )
    eval_images: int | None = field(
        default=None, metadata={"help": "Evaluation images. Default: all.", "range": COUNT}
    )
    control: bool = field(default=False, metadata={"help": "Also train by stage 2 alone for the same wall time."})
    seed: int = field(default=42, metadata={"help": "Seed of everything random.", "range": RANGES["seed"]})

    def __post_init__(self):
        super().__post_init__()
        if not self.teacher:
            raise UsageError("teacher is missing; pass a Hub id or the folder of a softmax checkpoint.")
        if not self.stages:
            self.stages = list(STAGES)[: 3 if self.supervised else 2]
        unknown = [name for name in self.stages if name not in STAGES]
        if unknown:
            raise UsageError(f"stages={self.stages}: {unknown[0]!r} is unknown; choose from {', '.join(STAGES)}.")
        if self.stages != sorted(self.stages, key=list(STAGES).index) or len(set(self.stages)) < len(self.stages):
            raise UsageError(f"stages={self.stages} must come once each and in the order {', '.join(STAGES)}.")
        for stage in STAGES.values():  # a typo in the settings of stage 3 should not show after stages 1 and 2
            check_streaming(self, self.stage_arguments(stage).max_steps)
            section, hints = section_of(stage), get_type_hints(stage.config_class)
            settings = getattr(self, section).items()
            setattr(self, section, {name: fit_type(name, value, hints[name]) for name, value in settings})

    @property
    def linear_attention(self) -> LinearAttentionConfig:
        """Return the options for `convert`."""
        return LinearAttentionConfig(**{item.name: getattr(self, item.name) for item in fields(LinearAttentionConfig)})

    def stage_arguments(self, stage: Stage) -> AdaLATrainingArguments:
        """Return the stage's configuration, writing to its folder in `output_dir`.

        Raises:
            UsageError: For a setting that the stage does not have or a value that it refuses.
        """
        section = section_of(stage)
        settings = {"seed": self.seed, **getattr(self, section)}
        if "output_dir" in settings:
            raise UsageError(f"{section}.output_dir is set by the recipe; set the recipe's own output_dir.")
        settings["output_dir"] = str(Path(self.output_dir) / stage.directory)
        args = stage.config_class.from_settings(settings, where=f"{section}.")
        if args.eval_strategy != "no" and stage.name != "supervised":
            strategy = args.eval_strategy.value
            raise UsageError(
                f"{section}.eval_strategy={strategy!r}: a recipe evaluates after the stage; leave it out."
            )
        return args

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values; a dataset object is described by its type and fingerprint."""
        settings = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in ("teacher", "dataset"):
            text = describe(settings[name])
            settings[name] = os.path.realpath(text) if os.path.exists(text) else text
        return settings

    def to_yaml(self) -> str:
        """Return a recipe that `from_yaml` reads again; one in memory names its dataset, but cannot hold it."""
        settings = {item.name: getattr(self, item.name) for item in fields(self)}
        settings["dataset"] = describe(self.dataset)
        return dump_yaml(settings)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "RecipeConfig":
        """Read a recipe; `overrides` win, in a section setting by setting.

        Raises:
            UsageError: If the file cannot be read, is not a mapping, or holds an unknown setting.
        """
        content = read_yaml(path)
        unknown = sorted(set(content) - {item.name for item in fields(cls)}, key=str)
        if unknown:
            hint = did_you_mean(str(unknown[0]), [item.name for item in fields(cls)])
            raise UsageError(f"recipe {str(path)!r}: unknown setting {unknown[0]!r}{hint}; see vit-adala run --help.")
        for name, value in overrides.items():
            merges = isinstance(value, dict) and isinstance(content.get(name), dict)
            content[name] = {**content[name], **value} if merges else value
        return cls.from_settings(content)

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "RecipeConfig":
        """Return a recipe from plain values, `recipe: paper` and `softmax_layers: auto:K` among them.

        Raises:
            UsageError: For an unknown preset or setting, or a value that does not fit.
        """
        preset = settings.get("recipe", "default")
        if preset not in PRESETS:
            hint = did_you_mean(str(preset), PRESETS)
            raise UsageError(f"recipe={preset!r} is unknown{hint}; choose from {', '.join(PRESETS)}.")
        settings = with_preset(settings)
        settings.pop("recipe", None)
        count = automatic_layers(settings.get("softmax_layers"))
        if count:
            stage = {**settings.get("attention_alignment", {}), "auto_softmax_layers": count}
            settings = {**settings, "attention_alignment": stage}
            del settings["softmax_layers"]
        config = build(cls, settings)
        config.recipe = preset
        return config


def section_of(stage: Stage) -> str:
    """Return the name of the stage's section in a recipe."""
    return stage.name.replace("-", "_")
