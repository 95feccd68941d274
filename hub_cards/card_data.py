"""The facts behind a model card, read from what lies beside the weights, and the metadata that follow from them."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers import PretrainedConfig

from modeling_adala.configuration_adala import vision_config
from modeling_adala.conversion.loading import load_config
from modeling_adala.errors import CheckpointError
from modeling_adala.modeling_adala import models_of

from .records import (
    find_license,
    hub_id,
    license_of,
    mapping,
    number,
    one_line,
    read_json,
    read_manifest,
    read_metrics,
)
from .records import run_directory as run_directory_of

TAGS = ["linear-attention", "vit-adala", "distillation"]
# Pictures that a report draws, and what they show.
PICTURES = {
    "features.png": "Patch features as PCA colors, one basis (the teacher's) for all",
    "speed.png": "Forward pass over resolution",
    "alignment.png": "Stage 1: error of each block's attention over the steps",
    "blocks.png": "Error after each block, student running free",
}


@dataclass(frozen=True)
class Head:
    """What a class is for: its task on the Hub, and the Auto class that opens it."""

    pipeline_tag: str | None
    auto_class: str


# By the end of the class name, so that a new family needs no line here; the first that fits counts.
HEADS = {
    "ForImageClassification": Head("image-classification", "AutoModelForImageClassification"),
    "ForSemanticSegmentation": Head("image-segmentation", "AutoModelForSemanticSegmentation"),
    "ForMaskedImageModeling": Head(None, "AutoModelForMaskedImageModeling"),
    "Backbone": Head("image-feature-extraction", "AutoBackbone"),
    "Model": Head("image-feature-extraction", "AutoModel"),
}
IMAGE_AND_TEXT = Head("zero-shot-image-classification", "AutoModel")


@dataclass(frozen=True)
class Metric:
    """A figure of merit: where it is recorded for student and teacher, its name, its type on the Hub, its format."""

    student: str
    teacher: str | None
    name: str
    type: str | None = None
    task: str = "image-classification"
    form: str = "{:.1%}"


METRICS = (
    Metric("head_accuracy", "teacher_head_accuracy", "Accuracy", "accuracy"),
    Metric("head_mean_iou", "teacher_head_mean_iou", "Mean IoU", "mean_iou", "image-segmentation"),
    Metric("student_knn_accuracy", "teacher_knn_accuracy", "k-NN accuracy", "accuracy"),
    Metric("student_linear_probe_accuracy", "teacher_linear_probe_accuracy", "Linear probe accuracy", "accuracy"),
    Metric("cls_cosine", None, "Cosine to the teacher, class token", form="{:.4f}"),
    Metric("patch_mean_cosine", None, "Cosine to the teacher, mean patch", form="{:.4f}"),
    Metric("relative_error", None, "Relative error of the features", form="{:.3f}"),
)


@dataclass(frozen=True)
class AdaLACardData:
    """What is on record of a checkpoint, and nothing else: what no file says is `None` or empty.

    Texts are as recorded and must be escaped before they go anywhere (`hub_cards.card` does).

    Args:
        config (`PretrainedConfig`): The checkpoint's.
        manifest (`dict`): `manifest.json`: data, machine, versions, and under `stages` the facts of this checkpoint's
            stage and those before it.
        evaluation (`dict[str, float]`): This checkpoint's figures beside its teacher's, on the same images.
        protocol (`dict`): What those were taken on: `dataset`, `dataset_id`, `eval_split`, `image_size`, or `None`.
        history (`dict[str, dict]`): Figures by evaluation: `swapped`, then each stage up to this one.
        speed (`dict`): `speed.json`: `machine`, `batch_size`, `autocast`, and `rows` with seconds per image.
        license (`dict[str, str]`): `license`, `license_name`, `license_link`: the teacher's, unless one is stated.
        stated (`dict`): What no file says but somebody did: `language`, `license`, `tags`.
        pictures (`list[Path]`): Files that the card shows under their names; they belong beside it.
        has_processor (`bool`): Whether the folder holds an image processor.
        repo_id (`str`, *optional*): Where the checkpoint is, or will be, on the Hub.
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
    repo_id: str | None = None

    @classmethod
    def from_checkpoint(cls, directory: str | Path, repo_id: str | None = None, **stated: Any) -> "AdaLACardData":
        """Gathers the facts of a checkpoint folder: from the folder itself, then from the run that it belongs to.

        Args:
            directory (`str` or `Path`): With a `config.json`. `manifest.json`, `metrics.jsonl`, `speed.json`,
                `evaluation.json` (from `vit-adala evaluate --json`) and pictures are read where they are there; those
                of the parent folder only if the manifest there names this folder's stage.
            repo_id (`str`, *optional*): Where the checkpoint will be on the Hub.
            stated (*optional*): `language`, `license` and `tags` for the metadata, on top of what is on record.

        Raises:
            CheckpointError: if it is no AdaLA checkpoint.
            DataError, UsageError: if its config cannot be opened.
        """
        directory = Path(directory)
        config = load_config(str(directory))
        _class_name(config, directory)
        run_directory = run_directory_of(directory)
        places = [directory, *([run_directory] if run_directory else [])]
        manifest = read_manifest(directory)
        lines = [line for place in places for line in read_metrics(place / "metrics.jsonl")]
        evaluations = {line["evaluation"]: _figures(line) for line in lines if one_line(line.get("evaluation"))}
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
            history={name: evaluations[name] for name in ("swapped", *stages) if evaluations.get(name)},
            speed=next((found for place in places if (found := read_json(place / "speed.json"))), {}),
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
        """The configuration of the vision tower, which is the linear one."""
        return vision_config(self.config)

    @property
    def stage(self) -> str | None:
        """The last stage of its training."""
        return _stage(self.config, self.manifest)

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        return {name: mapping(facts) for name, facts in mapping(self.manifest.get("stages")).items()}

    @property
    def class_name(self) -> str:
        return _class_name(self.config, "config.json")

    @property
    def head(self) -> Head:
        if hasattr(self.config, "text_config") and self.class_name.endswith("Model"):
            return IMAGE_AND_TEXT
        found = (head for end, head in HEADS.items() if self.class_name.endswith(end))
        # no Auto class opens the others, such as CLIP's projection: the class itself does
        return next(found, Head("image-feature-extraction", self.class_name))

    @property
    def labels(self) -> list[str]:
        """Class names of a classifier or segmenter; empty if nobody gave it any."""
        labels = [str(label) for label in (self.config.id2label or {}).values()]
        names_nothing = all(re.fullmatch(r"LABEL_\d+", label) for label in labels)
        return [] if names_nothing or not self.class_name.endswith(tuple(list(HEADS)[:2])) else labels

    @property
    def teacher(self) -> str | None:
        return _teacher(self.config)[0]

    @property
    def teacher_revision(self) -> str | None:
        return _teacher(self.config)[1]

    @property
    def base_model(self) -> str | None:
        """The teacher's Hub id. A teacher without a commit came from a folder, whatever its path looks like."""
        return hub_id(self.teacher) if self.teacher_revision else None

    @property
    def name(self) -> str:
        """The repo's name, or what is in it."""
        if self.repo_id:
            return self.repo_id.split("/")[-1]
        return f"{last_part(self.teacher)} with linear attention" if self.teacher else self.class_name

    @property
    def has_remote_code(self) -> bool:
        """Whether the checkpoint opens without the package, by Python files beside it; on the Hub they always are."""
        return self.repo_id is not None or self.head.auto_class in mapping(getattr(self.config, "auto_map", None))

    @property
    def datasets(self) -> list[str]:
        """Hub ids of the training data."""
        records = (self.manifest, *self.stages.values())
        return list(dict.fromkeys(name for facts in records if (name := hub_id(facts.get("dataset_id")))))

    def metadata(self) -> ModelCardData:
        """The YAML block of the card."""
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
            for metric in METRICS
            if metric.type and metric.student in self.evaluation
        ]


def _evaluation(
    directory: Path, manifest: dict[str, Any], evaluations: dict[str, dict], stage: str | None
) -> tuple[dict[str, float], dict[str, Any]]:
    """The last word on a checkpoint: an evaluation of its own, that of its run, or that of its trainer."""
    own = read_json(directory / "evaluation.json")
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
    if not config.model_type.startswith("adala_") or found not in names:
        raise CheckpointError(
            f"{str(where)!r} is of type {config.model_type!r} and class {found!r}, no AdaLA checkpoint; pass a folder"
            f" that save_pretrained of one of {', '.join(names)} wrote."
        )
    return found


def dataset_name(facts: dict[str, Any]) -> str | None:
    """How a card calls the data of a record: by the Hub id, or by the name of the folder or file."""
    name = one_line(facts.get("dataset"))
    return hub_id(facts.get("dataset_id")) or (last_part(name) if name else None)


def last_part(path: str | None) -> str:
    """The name of what a path leads to: the folders above it are nobody's business."""
    return re.split(r"[/\\]", (path or "").rstrip("/\\"))[-1] or str(path)


def _is_own_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
