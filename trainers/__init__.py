"""The three stages of linearization on `transformers.Trainer`, their data, metrics and the recipe that joins them.

Names are imported on first use: reading data does not take the trainers, and neither takes what draws the report.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention_alignment_config import AttentionAlignmentConfig
    from .attention_alignment_trainer import AttentionAlignmentTrainer
    from .data import ImageDataset, StreamingImageDataset, collate_images
    from .data_config import DataConfig, DataModule
    from .feature_alignment_config import FeatureAlignmentConfig
    from .feature_alignment_trainer import FeatureAlignmentTrainer
    from .losses import attention_alignment_loss, feature_alignment_loss
    from .metrics import Accuracy, FeatureCosine, FeatureRelativeError, KNNAccuracy, MeanIoU
    from .recipe import run_recipe
    from .recipe_config import RecipeConfig
    from .segmentation import evaluate_segmentation
    from .segmentation_data import SegmentationData, SegmentationDataset
    from .sources import load_images
    from .supervised_config import SupervisedConfig
    from .supervised_trainer import SupervisedTrainer
    from .transforms import ImageTransform, SegmentationTransform

_MODULES = {
    "attention_alignment_config": ["AttentionAlignmentConfig"],
    "attention_alignment_trainer": ["AttentionAlignmentTrainer"],
    "data": ["ImageDataset", "StreamingImageDataset", "collate_images"],
    "data_config": ["DataConfig", "DataModule"],
    "feature_alignment_config": ["FeatureAlignmentConfig"],
    "feature_alignment_trainer": ["FeatureAlignmentTrainer"],
    "losses": ["attention_alignment_loss", "feature_alignment_loss"],
    "metrics": ["Accuracy", "FeatureCosine", "FeatureRelativeError", "KNNAccuracy", "MeanIoU"],
    "recipe": ["run_recipe"],
    "recipe_config": ["RecipeConfig"],
    "segmentation": ["evaluate_segmentation"],
    "segmentation_data": ["SegmentationData", "SegmentationDataset"],
    "sources": ["load_images"],
    "supervised_config": ["SupervisedConfig"],
    "supervised_trainer": ["SupervisedTrainer"],
    "transforms": ["ImageTransform", "SegmentationTransform"],
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Accuracy",
    "AttentionAlignmentConfig",
    "AttentionAlignmentTrainer",
    "DataConfig",
    "DataModule",
    "FeatureAlignmentConfig",
    "FeatureAlignmentTrainer",
    "FeatureCosine",
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
    "evaluate_segmentation",
    "feature_alignment_loss",
    "load_images",
    "run_recipe",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
