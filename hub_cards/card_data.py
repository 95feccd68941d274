"""The facts of a model card, read from the records beside the weights, and the metadata that follow from them."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers import PretrainedConfig

from modeling_adala.configuration_adala import vision_config
from modeling_adala.conversion.loading import load_config
from modeling_adala.errors import CheckpointError
from modeling_adala.families import is_adala
from modeling_adala.modeling_adala import head_of, models_of

from .exports import OnnxExport
from .records import (
    EVALUATION,
    FIGURES,
    SPEED,
    find_license,
    hub_id,
    license_of,
    mapping,
    number,
    one_line,
    read_json,
    read_manifest,
)
from .records import run_directory as run_directory_of

TAGS = ["linear-attention", "vit-adala", "distillation"]
# pictures that a report draws, and their titles
PICTURES = {
    "features.png": "Patch features as PCA colors, one basis (the teacher's) for all",
    "speed.png": "Forward pass over resolution",
    "alignment.png": "Stage 1: error of each block's attention over the steps",
    "blocks.png": "Error after each block, student running free",
}


@dataclass(frozen=True)
class Head:
    """Task of a class on the Hub, and the Auto class that opens it."""

    pipeline_tag: str | None
    auto_class: str


# by the end of the class name, so that a new family needs no line here; the first match counts
HEADS = {
    "ForImageClassification": Head("image-classification", "AutoModelForImageClassification"),
    "ForSemanticSegmentation": Head("image-segmentation", "AutoModelForSemanticSegmentation"),
    "ForMaskedImageModeling": Head(None, "AutoModelForMaskedImageModeling"),
    "Backbone": Head("image-feature-extraction", "AutoBackbone"),
    "Model": Head("image-feature-extraction", "AutoModel"),
}
IMAGE_AND_TEXT = Head("zero-shot-image-classification", "AutoModel")


@dataclass(frozen=True)
class AdaLACardData:
    """Recorded facts of a checkpoint; anything that is not on record is `None` or empty.

    Texts are as recorded and must be escaped before they are shown (`hub_cards.card` does).

    Args:
        config (`PretrainedConfig`): Configuration of the checkpoint.
        manifest (`dict`): See `read_manifest`.
        evaluation (`dict[str, float]`): Figures of this checkpoint and of its teacher, on the same images.
        protocol (`dict`): Data of those figures: `dataset`, `dataset_id`, `eval_split`, `image_size`, or `None`.
        history (`dict[str, dict]`): Figures by evaluation: `converted`, then each stage up to this one.
        speed (`dict`): Content of `speed.json`.
        license (`dict[str, str]`): `license`, `license_name`, `license_link`: the teacher's, unless one is stated.
        stated (`dict`): `language`, `license` and `tags` as the caller stated them.
        pictures (`list[Path]`): Files that the card shows, by their names; they belong beside it.
        has_processor (`bool`): The folder holds an image processor.
        exports (`list[OnnxExport]`): ONNX graphs that are beside the weights.
        repo_id (`str`, *optional*): Repository of the checkpoint on the Hub.
    """

    config: PretrainedConfig
    manifest: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    history: dict[str, dict[str, float]] = field(default_factory=dict)
    speed: dict[str, Any] = field(default_factory=dict)
    license: dict[str, str] = field(default_factory=dict)
    stated: dict[str, Any] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)
    has_processor: bool = False
    exports: list[OnnxExport] = field(default_factory=list)
    repo_id: str | None = None

    @classmethod
    def from_checkpoint(
        cls,
        directory: str | Path,
        repo_id: str | None = None,
        *,
        config: PretrainedConfig | None = None,
        **stated: Any,
    ) -> "AdaLACardData":
        """Gather the facts of a checkpoint folder: from the folder itself, then from the run that it belongs to.

        Args:
            directory (`str` or `Path`): With a `config.json`. The files of `hub_cards.records` and pictures are read
                if they are there; those of the parent folder only if its manifest names this folder's stage.
            repo_id (`str`, *optional*): Repository of the checkpoint on the Hub.
            config (`PretrainedConfig`, *optional*): The folder's configuration, if it is open already.
            stated (*optional*): `language`, `license` and `tags` for the metadata, on top of the records.

        Raises:
            CheckpointError: If it is not an AdaLA checkpoint.
            DataError, UsageError: If its configuration cannot be opened.
        """
        directory = Path(directory)
        config = load_config(str(directory)) if config is None else config
        _class_name(config, directory)
        run_directory = run_directory_of(directory)
        places = [directory, *([run_directory] if run_directory else [])]
        manifest = read_manifest(directory)
        known = mapping(manifest.get("evaluations"))
        evaluations = {name: _figures(mapping(figures)) for name, figures in known.items()}
        stages = list(mapping(manifest.get("stages")))
        evaluation, protocol = _evaluation(directory, manifest, evaluations, _stage(config, manifest))
        teacher, revision = _teacher(config)
        pictures = [place / name for name in PICTURES for place in reversed(places) if _is_own_file(place / name)]
        return cls(
            config=config,
            manifest=manifest,
            evaluation=evaluation,
            protocol={name: one_line(protocol.get(name)) for name in ("dataset", "dataset_id", "eval_split")}
            | {"image_size": protocol.get("image_size")},
            history={name: evaluations[name] for name in ("converted", *stages) if evaluations.get(name)},
            speed=next((found for place in places if (found := read_json(place / SPEED))), {}),
            license=license_of(stated)
            or license_of(manifest.get("teacher_license"))
            or find_license(teacher, revision),
            stated=stated,
            pictures=list({path.name: path for path in pictures}.values()),
            has_processor=(directory / "preprocessor_config.json").is_file(),
            repo_id=hub_id(repo_id),
        )

    @property
    def vision(self) -> PretrainedConfig:
        """Configuration of the vision tower, which is the linear one."""
        return vision_config(self.config)

    @property
    def stage(self) -> str | None:
        """Last stage of its training."""
        return _stage(self.config, self.manifest)

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        return {name: mapping(facts) for name, facts in mapping(self.manifest.get("stages")).items()}

    @property
    def class_name(self) -> str:
        return _class_name(self.config, "config.json")

    @property
    def head(self) -> Head:
        name = head_of(self.config, self.class_name)
        if name == "Model" and hasattr(self.config, "text_config"):
            return IMAGE_AND_TEXT
        # no Auto class opens the others, such as CLIP's projection: the class itself does
        return HEADS.get(name or "", Head("image-feature-extraction", self.class_name))

    @property
    def labels(self) -> list[str]:
        """Class names of a classifier or segmenter; empty if it has none but `LABEL_0`, `LABEL_1`, ..."""
        labels = [str(label) for label in (self.config.id2label or {}).values()]
        names_nothing = all(re.fullmatch(r"LABEL_\d+", label) for label in labels)
        has_labels = head_of(self.config, self.class_name) in ("ForImageClassification", "ForSemanticSegmentation")
        return labels if has_labels and not names_nothing else []

    @property
    def teacher(self) -> str | None:
        return _teacher(self.config)[0]

    @property
    def teacher_revision(self) -> str | None:
        return _teacher(self.config)[1]

    @property
    def base_model(self) -> str | None:
        """Return the teacher's Hub id; `None` for a teacher without a commit, which came from a folder."""
        return hub_id(self.teacher) if self.teacher_revision else None

    @property
    def name(self) -> str:
        """Return the name of the repository, or a description of the model."""
        if self.repo_id:
            return self.repo_id.split("/")[-1]
        return f"{last_part(self.teacher)} with linear attention" if self.teacher else self.class_name

    @property
    def has_remote_code(self) -> bool:
        """Return whether the checkpoint opens without the package; on the Hub it always does."""
        return self.repo_id is not None or self.head.auto_class in mapping(getattr(self.config, "auto_map", None))

    @property
    def datasets(self) -> list[str]:
        """Hub ids of the training data."""
        records = (self.manifest, *self.stages.values())
        return list(dict.fromkeys(name for facts in records if (name := hub_id(facts.get("dataset_id")))))

    def metadata(self) -> ModelCardData:
        """Return the YAML block of the card."""
        results = self._eval_results()
        fields: dict[str, Any] = {"base_model_relation": "finetune"} if self.base_model else {}
        return ModelCardData(
            **fields | self.license,
            language=self.stated.get("language"),
            base_model=self.base_model,
            library_name="transformers",
            pipeline_tag=self.head.pipeline_tag,
            tags=[*TAGS, *(self.stated.get("tags") or [])],
            datasets=self.datasets or None,
            metrics=list(dict.fromkeys(str(result.metric_type) for result in results)) or None,
            model_name=self.name,
            eval_results=results or None,
        )

    def _eval_results(self) -> list[EvalResult]:
        name = dataset_name(self.protocol)
        if name is None:
            return []
        return [
            EvalResult(
                task_type=metric.task,
                dataset_type=hub_id(self.protocol.get("dataset_id")) or "custom",
                dataset_name=name,
                dataset_split=self.protocol.get("eval_split"),
                metric_type=metric.type,
                metric_name=metric.name,
                metric_value=self.evaluation[metric.student],
            )
            for metric in FIGURES
            if metric.type and metric.student in self.evaluation
        ]


def _evaluation(
    directory: Path, manifest: dict[str, Any], evaluations: dict[str, dict], stage: str | None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the figures of a checkpoint and their record: its own evaluation, its run's, or its trainer's."""
    own = read_json(directory / EVALUATION)
    if own:
        return _figures(own), own
    if evaluations.get(stage or ""):
        teacher = {f"teacher_{name}": value for name, value in evaluations.get("teacher", {}).items()}
        return teacher | evaluations[stage or ""], manifest
    facts = mapping(mapping(manifest.get("stages")).get(stage or ""))
    return _figures(mapping(facts.get("evaluation"))), facts


def _figures(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name in record if (value := number(record[name])) is not None}


def _stage(config: PretrainedConfig, manifest: dict[str, Any]) -> str | None:
    # a trainer records its stage when it starts to save, and only a finished one is in the config
    recorded = list(mapping(manifest.get("stages")))
    return recorded[-1] if recorded else one_line(vision_config(config).adala_stage)


def _teacher(config: PretrainedConfig) -> tuple[str | None, str | None]:
    vision = vision_config(config)
    return one_line(vision.teacher_name_or_path), one_line(vision.teacher_revision)


def _class_name(config: PretrainedConfig, where: str | Path) -> str:
    names = [cls.__name__ for cls in models_of(config).values()]
    found = (config.architectures or [None])[0]
    if not is_adala(config) or found not in names:
        raise CheckpointError(
            f"{str(where)!r} is of type {config.model_type!r} and class {found!r}, not an AdaLA checkpoint; pass a"
            f" folder that save_pretrained of one of {', '.join(names)} wrote."
        )
    return found


def dataset_name(facts: dict[str, Any]) -> str | None:
    """Return the name of a record's data: the Hub id, or the name of the folder or file."""
    name = one_line(facts.get("dataset"))
    return hub_id(facts.get("dataset_id")) or (last_part(name) if name else None)


def last_part(path: str | None) -> str:
    """Return the last component of a path; its parent folders may be private."""
    return re.split(r"[/\\]", (path or "").rstrip("/\\"))[-1] or str(path)


def _is_own_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
