"""The three stages of linearization on `transformers.Trainer`, their data, metrics and the recipe that joins them."""

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
