"""Linear-attention ViTs: each class is its stock class, whose attention modules get a feature map.

Module and parameter names are the stock ones (`q_proj`, `k_proj`, `v_proj` in every attention), so that teacher
weights, PEFT targets and hooks fit. `attn_implementation="sdpa"` or `"eager"` puts a model in softmax mode: it then
equals its teacher as long as the weights do.
"""

import transformers
from transformers import PretrainedConfig, PreTrainedModel

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
)
from .families import FAMILIES, get_family
from .mixins import AdaLABackboneMixin, AdaLAMixin, AdaLASegmentationMixin


class AdaLAViTModel(AdaLAMixin, transformers.ViTModel):
    """`ViTModel` with linear attention. Opens AdaLA checkpoints and stock softmax checkpoints alike."""

    config: AdaLAViTConfig


class AdaLAViTForImageClassification(AdaLAMixin, transformers.ViTForImageClassification):
    """`ViTForImageClassification` with linear attention."""

    config: AdaLAViTConfig


class AdaLAViTForMaskedImageModeling(AdaLAMixin, transformers.ViTForMaskedImageModeling):
    """`ViTForMaskedImageModeling` (SimMIM decoder) with linear attention."""

    config: AdaLAViTConfig


class AdaLAViTBackbone(AdaLABackboneMixin, AdaLAMixin, transformers.ViTModel):
    """Feature maps of chosen stages of a ViT with linear attention."""

    config: AdaLAViTConfig


class AdaLAViTForSemanticSegmentation(AdaLASegmentationMixin, AdaLAMixin, transformers.ViTPreTrainedModel):
    """Semantic segmentation model: ViT with linear attention and a linear head."""

    config: AdaLAViTConfig
    backbone_class = AdaLAViTBackbone


class AdaLADeiTModel(AdaLAMixin, transformers.DeiTModel):
    """`DeiTModel` with linear attention."""

    config: AdaLADeiTConfig


class AdaLADeiTForImageClassification(AdaLAMixin, transformers.DeiTForImageClassification):
    """`DeiTForImageClassification` with linear attention."""

    config: AdaLADeiTConfig


class AdaLADeiTForImageClassificationWithTeacher(AdaLAMixin, transformers.DeiTForImageClassificationWithTeacher):
    """`DeiTForImageClassificationWithTeacher` with linear attention."""

    config: AdaLADeiTConfig


class AdaLADeiTForMaskedImageModeling(AdaLAMixin, transformers.DeiTForMaskedImageModeling):
    """`DeiTForMaskedImageModeling` (SimMIM decoder) with linear attention."""

    config: AdaLADeiTConfig


class AdaLADeiTBackbone(AdaLABackboneMixin, AdaLAMixin, transformers.DeiTModel):
    """Feature maps of chosen stages of a DeiT with linear attention."""

    config: AdaLADeiTConfig


class AdaLADeiTForSemanticSegmentation(AdaLASegmentationMixin, AdaLAMixin, transformers.DeiTPreTrainedModel):
    """Semantic segmentation model: DeiT with linear attention and a linear head."""

    config: AdaLADeiTConfig
    backbone_class = AdaLADeiTBackbone


class AdaLAIJepaModel(AdaLAMixin, transformers.IJepaModel):
    """`IJepaModel` with linear attention."""

    config: AdaLAIJepaConfig


class AdaLAIJepaForImageClassification(AdaLAMixin, transformers.IJepaForImageClassification):
    """`IJepaForImageClassification` with linear attention."""

    config: AdaLAIJepaConfig


class AdaLAIJepaBackbone(AdaLABackboneMixin, AdaLAMixin, transformers.IJepaModel):
    """Feature maps of chosen stages of an I-JEPA encoder with linear attention."""

    config: AdaLAIJepaConfig


class AdaLAIJepaForSemanticSegmentation(AdaLASegmentationMixin, AdaLAMixin, transformers.IJepaPreTrainedModel):
    """Semantic segmentation model: I-JEPA encoder with linear attention and a linear head."""

    config: AdaLAIJepaConfig
    backbone_class = AdaLAIJepaBackbone


class AdaLADinov2Model(AdaLAMixin, transformers.Dinov2Model):
    """`Dinov2Model` with linear attention."""

    config: AdaLADinov2Config


class AdaLADinov2ForImageClassification(AdaLAMixin, transformers.Dinov2ForImageClassification):
    """`Dinov2ForImageClassification` with linear attention."""

    config: AdaLADinov2Config


class AdaLADinov2Backbone(AdaLAMixin, transformers.Dinov2Backbone):
    """`Dinov2Backbone` with linear attention."""

    config: AdaLADinov2Config


class AdaLADinov2ForSemanticSegmentation(AdaLASegmentationMixin, AdaLAMixin, transformers.Dinov2PreTrainedModel):
    """Semantic segmentation model: DINOv2 with linear attention and a linear head."""

    config: AdaLADinov2Config
    backbone_class = AdaLADinov2Backbone


class AdaLADinov2WithRegistersModel(AdaLAMixin, transformers.Dinov2WithRegistersModel):
    """`Dinov2WithRegistersModel` with linear attention."""

    config: AdaLADinov2WithRegistersConfig


class AdaLADinov2WithRegistersForImageClassification(
    AdaLAMixin, transformers.Dinov2WithRegistersForImageClassification
):
    """`Dinov2WithRegistersForImageClassification` with linear attention."""

    config: AdaLADinov2WithRegistersConfig


class AdaLADinov2WithRegistersBackbone(AdaLAMixin, transformers.Dinov2WithRegistersBackbone):
    """`Dinov2WithRegistersBackbone` with linear attention."""

    config: AdaLADinov2WithRegistersConfig


class AdaLADinov2WithRegistersForSemanticSegmentation(
    AdaLASegmentationMixin, AdaLAMixin, transformers.Dinov2WithRegistersPreTrainedModel
):
    """Semantic segmentation model: DINOv2 with registers with linear attention and a linear head."""

    config: AdaLADinov2WithRegistersConfig
    backbone_class = AdaLADinov2WithRegistersBackbone


class AdaLADINOv3ViTModel(AdaLAMixin, transformers.DINOv3ViTModel):
    """`DINOv3ViTModel` with linear attention."""

    config: AdaLADINOv3ViTConfig


class AdaLADINOv3ViTBackbone(AdaLAMixin, transformers.DINOv3ViTBackbone):
    """`DINOv3ViTBackbone` with linear attention."""

    config: AdaLADINOv3ViTConfig


class AdaLADINOv3ViTForSemanticSegmentation(AdaLASegmentationMixin, AdaLAMixin, transformers.DINOv3ViTPreTrainedModel):
    """Semantic segmentation model: DINOv3 with linear attention and a linear head."""

    config: AdaLADINOv3ViTConfig
    base_model_prefix = "dinov3_vit"  # the stock prefix is the name of a module inside
    backbone_class = AdaLADINOv3ViTBackbone


class AdaLACLIPVisionModel(AdaLAMixin, transformers.CLIPVisionModel):
    """`CLIPVisionModel` with linear attention."""

    config: AdaLACLIPVisionConfig


class AdaLACLIPVisionModelWithProjection(AdaLAMixin, transformers.CLIPVisionModelWithProjection):
    """`CLIPVisionModelWithProjection` with linear attention."""

    config: AdaLACLIPVisionConfig


class AdaLACLIPVisionBackbone(AdaLABackboneMixin, AdaLAMixin, transformers.CLIPVisionModel):
    """Feature maps of chosen stages of a CLIP vision tower with linear attention."""

    config: AdaLACLIPVisionConfig


class AdaLACLIPVisionForSemanticSegmentation(AdaLASegmentationMixin, AdaLAMixin, transformers.CLIPPreTrainedModel):
    """Semantic segmentation model: CLIP vision tower with linear attention and a linear head."""

    config: AdaLACLIPVisionConfig
    backbone_class = AdaLACLIPVisionBackbone


class AdaLACLIPModel(AdaLAMixin, transformers.CLIPModel):
    """`CLIPModel` with linear attention in the vision tower."""

    config: AdaLACLIPConfig


class AdaLACLIPForImageClassification(AdaLAMixin, transformers.CLIPForImageClassification):
    """`CLIPForImageClassification` with linear attention in the vision tower."""

    config: AdaLACLIPConfig


class AdaLASiglipVisionModel(AdaLAMixin, transformers.SiglipVisionModel):
    """`SiglipVisionModel` with linear attention."""

    config: AdaLASiglipVisionConfig


class AdaLASiglipVisionBackbone(AdaLABackboneMixin, AdaLAMixin, transformers.SiglipVisionModel):
    """Feature maps of chosen stages of a SigLIP vision tower with linear attention."""

    config: AdaLASiglipVisionConfig


class AdaLASiglipVisionForSemanticSegmentation(AdaLASegmentationMixin, AdaLAMixin, transformers.SiglipPreTrainedModel):
    """Semantic segmentation model: SigLIP vision tower with linear attention and a linear head."""

    config: AdaLASiglipVisionConfig
    backbone_class = AdaLASiglipVisionBackbone


class AdaLASiglipModel(AdaLAMixin, transformers.SiglipModel):
    """`SiglipModel` with linear attention in the vision tower."""

    config: AdaLASiglipConfig


class AdaLASiglipForImageClassification(AdaLAMixin, transformers.SiglipForImageClassification):
    """`SiglipForImageClassification` with linear attention in the vision tower."""

    config: AdaLASiglipConfig


class AdaLASiglip2VisionModel(AdaLAMixin, transformers.Siglip2VisionModel):
    """`Siglip2VisionModel` with linear attention."""

    config: AdaLASiglip2VisionConfig


class AdaLASiglip2VisionBackbone(AdaLABackboneMixin, AdaLAMixin, transformers.Siglip2VisionModel):
    """Feature maps of chosen stages of a SigLIP 2 vision tower with linear attention."""

    config: AdaLASiglip2VisionConfig


class AdaLASiglip2VisionForSemanticSegmentation(
    AdaLASegmentationMixin, AdaLAMixin, transformers.Siglip2PreTrainedModel
):
    """Semantic segmentation model: SigLIP 2 vision tower with linear attention and a linear head."""

    config: AdaLASiglip2VisionConfig
    backbone_class = AdaLASiglip2VisionBackbone


class AdaLASiglip2Model(AdaLAMixin, transformers.Siglip2Model):
    """`Siglip2Model` with linear attention in the vision tower."""

    config: AdaLASiglip2Config


class AdaLASiglip2ForImageClassification(AdaLAMixin, transformers.Siglip2ForImageClassification):
    """`Siglip2ForImageClassification` with linear attention in the vision tower."""

    config: AdaLASiglip2Config


# by family, then by head
MODELS: dict[str, dict[str, type[PreTrainedModel]]] = {
    "vit": {
        "Model": AdaLAViTModel,
        "ForImageClassification": AdaLAViTForImageClassification,
        "ForMaskedImageModeling": AdaLAViTForMaskedImageModeling,
        "Backbone": AdaLAViTBackbone,
        "ForSemanticSegmentation": AdaLAViTForSemanticSegmentation,
    },
    "deit": {
        "Model": AdaLADeiTModel,
        "ForImageClassification": AdaLADeiTForImageClassification,
        "ForImageClassificationWithTeacher": AdaLADeiTForImageClassificationWithTeacher,
        "ForMaskedImageModeling": AdaLADeiTForMaskedImageModeling,
        "Backbone": AdaLADeiTBackbone,
        "ForSemanticSegmentation": AdaLADeiTForSemanticSegmentation,
    },
    "ijepa": {
        "Model": AdaLAIJepaModel,
        "ForImageClassification": AdaLAIJepaForImageClassification,
        "Backbone": AdaLAIJepaBackbone,
        "ForSemanticSegmentation": AdaLAIJepaForSemanticSegmentation,
    },
    "dinov2": {
        "Model": AdaLADinov2Model,
        "ForImageClassification": AdaLADinov2ForImageClassification,
        "Backbone": AdaLADinov2Backbone,
        "ForSemanticSegmentation": AdaLADinov2ForSemanticSegmentation,
    },
    "dinov2_with_registers": {
        "Model": AdaLADinov2WithRegistersModel,
        "ForImageClassification": AdaLADinov2WithRegistersForImageClassification,
        "Backbone": AdaLADinov2WithRegistersBackbone,
        "ForSemanticSegmentation": AdaLADinov2WithRegistersForSemanticSegmentation,
    },
    "dinov3_vit": {
        "Model": AdaLADINOv3ViTModel,
        "Backbone": AdaLADINOv3ViTBackbone,
        "ForSemanticSegmentation": AdaLADINOv3ViTForSemanticSegmentation,
    },
    "clip_vision_model": {
        "Model": AdaLACLIPVisionModel,
        "ModelWithProjection": AdaLACLIPVisionModelWithProjection,
        "Backbone": AdaLACLIPVisionBackbone,
        "ForSemanticSegmentation": AdaLACLIPVisionForSemanticSegmentation,
    },
    "clip": {
        "Model": AdaLACLIPModel,
        "ForImageClassification": AdaLACLIPForImageClassification,
    },
    "siglip_vision_model": {
        "Model": AdaLASiglipVisionModel,
        "Backbone": AdaLASiglipVisionBackbone,
        "ForSemanticSegmentation": AdaLASiglipVisionForSemanticSegmentation,
    },
    "siglip": {
        "Model": AdaLASiglipModel,
        "ForImageClassification": AdaLASiglipForImageClassification,
    },
    "siglip2_vision_model": {
        "Model": AdaLASiglip2VisionModel,
        "Backbone": AdaLASiglip2VisionBackbone,
        "ForSemanticSegmentation": AdaLASiglip2VisionForSemanticSegmentation,
    },
    "siglip2": {
        "Model": AdaLASiglip2Model,
        "ForImageClassification": AdaLASiglip2ForImageClassification,
    },
}


def models_of(config: PretrainedConfig) -> dict[str, type[PreTrainedModel]]:
    """Return the linear classes for a stock or an AdaLA configuration by head, as `"Backbone"`; see `get_family`."""
    return MODELS[get_family(config.model_type).stock]


def stock_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel] | None:
    """Return the class of Transformers that a linear class extends, or `None` for a head that only we have."""
    ours_alone = issubclass(model_class, AdaLABackboneMixin | AdaLASegmentationMixin)
    return None if ours_alone else model_class.__bases__[-1]


def head_of(config: PretrainedConfig, class_name: str) -> str | None:
    """Return the head of a linear or a stock class by its name, or `None` for a class without linear counterpart."""
    for head, linear in models_of(config).items():
        if class_name in (linear.__name__, getattr(stock_class(linear), "__name__", None)):
            return head
    return None


AUTO_CLASSES = {
    "Model": "AutoModel",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForMaskedImageModeling": "AutoModelForMaskedImageModeling",
    "ForSemanticSegmentation": "AutoModelForSemanticSegmentation",
    "Backbone": "AutoBackbone",
}


def auto_classes(family: str) -> dict[str, type[PreTrainedModel]]:
    """Return the linear classes of a family by the Auto class that opens each."""
    classes = {AUTO_CLASSES[head]: linear for head, linear in MODELS[family].items() if head in AUTO_CLASSES}
    zero_shot = {"AutoModelForZeroShotImageClassification": MODELS[family]["Model"]}
    return classes if FAMILIES[family].vision is None else classes | zero_shot


# Transformers would name only the class that is being saved, so that a pushed classifier would not open with AutoModel
for _name, _classes in MODELS.items():
    _opened = {"AutoConfig": _classes["Model"].config_class, **auto_classes(_name)}
    for _class in _classes.values():
        _class.auto_map = {name: f"{cls.__module__.split('.')[-1]}.{cls.__name__}" for name, cls in _opened.items()}

__all__ = ["MODELS"]
__all__ += [_class.__name__ for _classes in MODELS.values() for _class in _classes.values()]
