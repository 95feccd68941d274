"""The three stages of linearization on `transformers.Trainer`, their data, metrics and the recipe that joins them.

Names are imported on first use: reading data does not take the trainers, and neither takes what draws the report.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention_alignment_config import AttentionAlignmentConfig
    from .attention_alignment_trainer import AttentionAlignmentTrainer
    from .data.data_config import DataConfig, DataModule
    from .data.digits import DIGITS_TEACHER, load_digits
    from .data.image_dataset import ImageDataset, StreamingImageDataset, collate_images
    from .data.segmentation_data import SegmentationData, SegmentationDataset
    from .data.sources import load_images
    from .data.transforms import ImageTransform, SegmentationTransform
    from .evaluation.dense_probe import DenseProbe
    from .evaluation.metrics import Accuracy, FeatureCosine, FeatureRelativeError, KNNAccuracy, MeanIoU
    from .evaluation.probes import FeatureEvaluator, compare_features, evaluate_pair
    from .evaluation.segmentation import evaluate_segmentation
    from .evaluation.softmax_layers import keep_softmax, rank_softmax_layers
    from .feature_alignment_config import FeatureAlignmentConfig
    from .feature_alignment_trainer import FeatureAlignmentTrainer
    from .losses import attention_alignment_loss, feature_alignment_loss
    from .runs.recipe import run_recipe
    from .runs.recipe_config import RecipeConfig
    from .supervised_config import SupervisedConfig
    from .supervised_trainer import SupervisedTrainer

_MODULES = {
    "attention_alignment_config": ["AttentionAlignmentConfig"],
    "attention_alignment_trainer": ["AttentionAlignmentTrainer"],
    "data.image_dataset": ["ImageDataset", "StreamingImageDataset", "collate_images"],
    "data.data_config": ["DataConfig", "DataModule"],
    "data.digits": ["DIGITS_TEACHER", "load_digits"],
    "feature_alignment_config": ["FeatureAlignmentConfig"],
    "feature_alignment_trainer": ["FeatureAlignmentTrainer"],
    "losses": ["attention_alignment_loss", "feature_alignment_loss"],
    "evaluation.dense_probe": ["DenseProbe"],
    "evaluation.metrics": ["Accuracy", "FeatureCosine", "FeatureRelativeError", "KNNAccuracy", "MeanIoU"],
    "runs.recipe": ["run_recipe"],
    "runs.recipe_config": ["RecipeConfig"],
    "evaluation.probes": ["FeatureEvaluator", "compare_features", "evaluate_pair"],
    "evaluation.segmentation": ["evaluate_segmentation"],
    "evaluation.softmax_layers": ["keep_softmax", "rank_softmax_layers"],
    "data.segmentation_data": ["SegmentationData", "SegmentationDataset"],
    "data.sources": ["load_images"],
    "supervised_config": ["SupervisedConfig"],
    "supervised_trainer": ["SupervisedTrainer"],
    "data.transforms": ["ImageTransform", "SegmentationTransform"],
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "DIGITS_TEACHER",
    "Accuracy",
    "AttentionAlignmentConfig",
    "AttentionAlignmentTrainer",
    "DataConfig",
    "DataModule",
    "DenseProbe",
    "FeatureAlignmentConfig",
    "FeatureAlignmentTrainer",
    "FeatureCosine",
    "FeatureEvaluator",
    "FeatureRelativeError",
    "ImageDataset",
    "ImageTransform",
    "KNNAccuracy",
    "MeanIoU",
    "RecipeConfig",
    "SegmentationData",
    "SegmentationDataset",
    "SegmentationTransform",
    "StreamingImageDataset",
    "SupervisedConfig",
    "SupervisedTrainer",
    "attention_alignment_loss",
    "collate_images",
    "compare_features",
    "evaluate_pair",
    "evaluate_segmentation",
    "feature_alignment_loss",
    "keep_softmax",
    "load_digits",
    "load_images",
    "rank_softmax_layers",
    "run_recipe",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
