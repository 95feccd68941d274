"""Tells Transformers about us: the attention implementation `"adala"`, Auto classes, names of weights on disk.

This file travels with the weights (`trust_remote_code`): torch, transformers and flat siblings only.
"""

import transformers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoBackbone,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForSemanticSegmentation,
    AutoModelForZeroShotImageClassification,
    DINOv3ViTConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import is_torchvision_available, is_vision_available

from .attention_interface import adala_attention_forward, adala_attention_mask
from .upstream import WeightRenaming, get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

AUTO_CLASSES = {
    "Model": AutoModel,
    "ForImageClassification": AutoModelForImageClassification,
    "ForMaskedImageModeling": AutoModelForMaskedImageModeling,
    "ForSemanticSegmentation": AutoModelForSemanticSegmentation,
    "Backbone": AutoBackbone,
}
# DINOv3's own image processor exists for torchvision only; ViT's does the same.
IMAGE_PROCESSORS = {
    "ViT": "ViTImageProcessor",
    "DeiT": "DeiTImageProcessor",
    "IJepa": "ViTImageProcessor",
    "Dinov2": "BitImageProcessor",
    "DINOv3": "ViTImageProcessor",
    "CLIP": "CLIPImageProcessor",
    "Siglip2": "Siglip2ImageProcessor",
    "Siglip": "SiglipImageProcessor",
}


def head_of(model_class: type[PreTrainedModel]) -> str:
    """What a class name says after its family: `"Model"`, `"ForImageClassification"`, `"Backbone"`, ..."""
    prefix = model_class.config_class.__name__.removesuffix("Config")
    return model_class.__name__.removeprefix(prefix)


# Without a mask function of that name, Transformers drops a user's mask without a word.
AttentionInterface.register("adala", adala_attention_forward)
AttentionMaskInterface.register("adala", adala_attention_mask)


def register(model_class: type[PreTrainedModel]) -> None:
    """Registers an AdaLA class with the Auto classes of its head, and its configuration's image processor."""
    config_class, head = model_class.config_class, head_of(model_class)
    if head in AUTO_CLASSES:
        AUTO_CLASSES[head].register(config_class, model_class, exist_ok=True)
        model_class.register_for_auto_class(AUTO_CLASSES[head])  # its checkpoints carry this code
    if head == "Model" and "text_config" in config_class.sub_configs:
        AutoModelForZeroShotImageClassification.register(config_class, model_class, exist_ok=True)
    _register_names_on_disk(model_class)
    if is_vision_available():  # without Pillow there is no image processor
        _register_image_processor(config_class)


def _register_image_processor(config_class: type[PretrainedConfig]) -> None:
    family = config_class.__name__.removeprefix("AdaLA")
    processor = IMAGE_PROCESSORS[next(name for name in IMAGE_PROCESSORS if family.startswith(name))]
    processors = {"pil": getattr(transformers, f"{processor}Pil")}
    if is_torchvision_available():  # asking for the torchvision one without it prints a warning
        processors["torchvision"] = getattr(transformers, processor)
    AutoImageProcessor.register(config_class, image_processor_classes=processors, exist_ok=True)


def _register_names_on_disk(model_class: type[PreTrainedModel]) -> None:
    # Checkpoints hold the old names of each family, and the renaming is looked up by class name or model type. Without
    # this a stock checkpoint loads with its attention and MLP weights left random, and only a printed report says so.
    stock_class = next(base for base in model_class.__mro__ if base.__module__.startswith("transformers.models."))
    if issubclass(model_class.config_class, DINOv3ViTConfig):
        # the stock pattern (5.23) has an unescaped dot, and inside a head it takes `layer_scale1` for a layer as well
        renaming = [WeightRenaming(r"(?<!model\.)layer\.", r"model.layer.")]
        register_checkpoint_conversion_mapping(model_class.__name__, renaming, overwrite=True)
        return
    for name in (stock_class.__name__, model_class.config_class.model_type.removeprefix("adala_")):
        mapping = get_checkpoint_conversion_mapping(name)
        if mapping is not None:
            register_checkpoint_conversion_mapping(model_class.__name__, mapping, overwrite=True)
            return
