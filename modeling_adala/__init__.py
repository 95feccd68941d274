"""Linear-attention Vision Transformers for Hugging Face Transformers. Importing it registers the Auto classes."""

__version__ = "0.1.0"

from .configuration_adala import AdaLADinov2Config, AdaLAViTConfig
from .conversion import ParityReport, convert
from .errors import AdaLAError, CheckpointError, DataError, UsageError
from .linear_attention import (
    FEATURE_MAPS,
    attention_weights,
    build_feature_map,
    linear_attention,
    linear_attention_reference,
)
from .modeling_adala import (
    AdaLADinov2Backbone,
    AdaLADinov2ForImageClassification,
    AdaLADinov2Model,
    AdaLAViTForImageClassification,
    AdaLAViTForMaskedImageModeling,
    AdaLAViTModel,
    attention_map,
)

__all__ = [
    "FEATURE_MAPS",
    "AdaLADinov2Backbone",
    "AdaLADinov2Config",
    "AdaLADinov2ForImageClassification",
    "AdaLADinov2Model",
    "AdaLAError",
    "AdaLAViTConfig",
    "AdaLAViTForImageClassification",
    "AdaLAViTForMaskedImageModeling",
    "AdaLAViTModel",
    "CheckpointError",
    "DataError",
    "ParityReport",
    "UsageError",
    "attention_map",
    "attention_weights",
    "build_feature_map",
    "convert",
    "linear_attention",
    "linear_attention_reference",
]
