"""Linear-attention Vision Transformers for Hugging Face Transformers. Importing it registers the Auto classes.

The files beside this one travel with every checkpoint, for `trust_remote_code`; those in folders never do.
"""

__version__ = "0.1.0"

from . import modeling_adala
from .configuration_adala import (
    AdaLACLIPConfig,
    AdaLACLIPVisionConfig,
    AdaLADeiTConfig,
    AdaLADinov2Config,
    AdaLADinov2WithRegistersConfig,
    AdaLADINOv3ViTConfig,
    AdaLAIJepaConfig,
    AdaLASiglip2Config,
    AdaLASiglip2VisionConfig,
    AdaLASiglipConfig,
    AdaLASiglipVisionConfig,
    AdaLAViTConfig,
    LinearAttentionConfig,
)
from .conversion.convert import ParityReport, convert, parity_report
from .conversion.loading import load_classifier, load_image_processor, load_segmenter, load_student, load_teacher
from .conversion.registration import register
from .errors import AdaLAError, CheckpointError, DataError, UsageError
from .feature_maps import FEATURE_MAPS, build_feature_map
from .inspection.attention import attention_map
from .inspection.check_linear import LinearReport, check_linear
from .inspection.towers import native_size
from .linear_attention import attention_weights, linear_attention, linear_attention_reference
from .modeling_adala import *  # noqa: F403

register()

__all__ = [
    "FEATURE_MAPS",
    "AdaLAError",
    "CheckpointError",
    "DataError",
    "LinearReport",
    "ParityReport",
    "UsageError",
    "attention_map",
    "attention_weights",
    "build_feature_map",
    "check_linear",
    "convert",
    "linear_attention",
    "linear_attention_reference",
    "load_classifier",
    "load_image_processor",
    "load_segmenter",
    "load_student",
    "load_teacher",
    "native_size",
    "parity_report",
    "AdaLACLIPConfig",
    "AdaLACLIPVisionConfig",
    "AdaLADINOv3ViTConfig",
    "AdaLADeiTConfig",
    "AdaLADinov2Config",
    "AdaLADinov2WithRegistersConfig",
    "AdaLAIJepaConfig",
    "AdaLASiglip2Config",
    "AdaLASiglip2VisionConfig",
    "AdaLASiglipConfig",
    "AdaLASiglipVisionConfig",
    "AdaLAViTConfig",
    "LinearAttentionConfig",
    *modeling_adala.__all__,
]
