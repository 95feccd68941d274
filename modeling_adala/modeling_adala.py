"""Linear-attention ViTs: each class is its stock class, whose attention modules get a feature map.

Module and parameter names are the stock ones (`q_proj`, `k_proj`, `v_proj` in every attention), so that teacher
weights, PEFT targets and hooks fit. `attn_implementation="sdpa"` or `"eager"` puts a model in softmax mode: it then
equals its teacher as long as the weights do.

This file travels with the weights (`trust_remote_code`): torch, transformers and flat siblings only.
"""

from typing import Any

from transformers import (
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTForMaskedImageModeling,
    DeiTModel,
    Dinov2Backbone,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersBackbone,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DINOv3ViTBackbone,
    DINOv3ViTModel,
    IJepaForImageClassification,
    IJepaModel,
    PreTrainedModel,
    Siglip2ForImageClassification,
    Siglip2Model,
    Siglip2VisionModel,
    SiglipForImageClassification,
    SiglipModel,
    SiglipVisionModel,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)
from transformers.models.clip.modeling_clip import CLIPPreTrainedModel
from transformers.models.deit.modeling_deit import DeiTPreTrainedModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2PreTrainedModel
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersPreTrainedModel
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTPreTrainedModel
from transformers.models.ijepa.modeling_ijepa import IJepaPreTrainedModel
from transformers.models.siglip.modeling_siglip import SiglipPreTrainedModel
from transformers.models.siglip2.modeling_siglip2 import Siglip2PreTrainedModel
from transformers.models.vit.modeling_vit import ViTPreTrainedModel

from .configuration_adala import (
    CONFIGS,
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
from .mixins import AdaLABackboneMixin, AdaLAMixin, AdaLASegmentationMixin
from .registration import register

# --- ViT (DINO, MAE and MSN encoders, too) ---------------------------------------------------------------------------


class AdaLAViTModel(AdaLAMixin, ViTModel):
    """`ViTModel` with linear attention. Opens AdaLA checkpoints and stock softmax checkpoints alike."""

    config: AdaLAViTConfig


class AdaLAViTForImageClassification(AdaLAMixin, ViTForImageClassification):
    """`ViTForImageClassification` with linear attention."""

    config: AdaLAViTConfig


class AdaLAViTForMaskedImageModeling(AdaLAMixin, ViTForMaskedImageModeling):
    """`ViTForMaskedImageModeling` (SimMIM decoder) with linear attention."""

    config: AdaLAViTConfig


class AdaLAViTBackbone(AdaLABackboneMixin, AdaLAMixin, ViTModel):
    """Feature maps of chosen stages of a ViT with linear attention."""

    config: AdaLAViTConfig

    def __init__(self, config: AdaLAViTConfig):
        super().__init__(config, add_pooling_layer=False)


class AdaLAViTForSemanticSegmentation(AdaLASegmentationMixin, AdaLAMixin, ViTPreTrainedModel):
    """A ViT with linear attention and the linear segmentation head."""

    config: AdaLAViTConfig
    backbone_class = AdaLAViTBackbone


# --- DeiT (distilled) ------------------------------------------------------------------------------------------------


class AdaLADeiTModel(AdaLAMixin, DeiTModel):
    """`DeiTModel` with linear attention."""

    config: AdaLADeiTConfig


class AdaLADeiTForImageClassification(AdaLAMixin, DeiTForImageClassification):
    """`DeiTForImageClassification` with linear attention."""

    config: AdaLADeiTConfig


class AdaLADeiTForImageClassificationWithTeacher(AdaLAMixin, DeiTForImageClassificationWithTeacher):
    """`DeiTForImageClassificationWithTeacher` with linear attention."""

    config: AdaLADeiTConfig


class AdaLADeiTForMaskedImageModeling(AdaLAMixin, DeiTForMaskedImageModeling):
    """`DeiTForMaskedImageModeling` (SimMIM decoder) with linear attention."""

    config: AdaLADeiTConfig


class AdaLADeiTBackbone(AdaLABackboneMixin, AdaLAMixin, DeiTModel):
    """Feature maps of chosen stages of a DeiT with linear attention."""

    config: AdaLADeiTConfig

    def __init__(self, config: AdaLADeiTConfig):
        super().__init__(config, add_pooling_layer=False)


class AdaLADeiTForSemanticSegmentation(AdaLASegmentationMixin, AdaLAMixin, DeiTPreTrainedModel):
    """A DeiT with linear attention and the linear segmentation head."""

    config: AdaLADeiTConfig
    backbone_class = AdaLADeiTBackbone


# --- I-JEPA ----------------------------------------------------------------------------------------------------------


class AdaLAIJepaModel(AdaLAMixin, IJepaModel):
    """`IJepaModel` with linear attention."""

    config: AdaLAIJepaConfig


class AdaLAIJepaForImageClassification(AdaLAMixin, IJepaForImageClassification):
    """`IJepaForImageClassification` with linear attention."""

    config: AdaLAIJepaConfig


class AdaLAIJepaBackbone(AdaLABackboneMixin, AdaLAMixin, IJepaModel):
    """Feature maps of chosen stages of an I-JEPA encoder with linear attention."""

    config: AdaLAIJepaConfig


class AdaLAIJepaForSemanticSegmentation(AdaLASegmentationMixin, AdaLAMixin, IJepaPreTrainedModel):
    """An I-JEPA encoder with linear attention and the linear segmentation head."""

    config: AdaLAIJepaConfig
    backbone_class = AdaLAIJepaBackbone


# --- DINOv2 ----------------------------------------------------------------------------------------------------------


class AdaLADinov2Model(AdaLAMixin, Dinov2Model):
    """`Dinov2Model` with linear attention."""

    config: AdaLADinov2Config


class AdaLADinov2ForImageClassification(AdaLAMixin, Dinov2ForImageClassification):
    """`Dinov2ForImageClassification` with linear attention."""

    config: AdaLADinov2Config


class AdaLADinov2Backbone(AdaLAMixin, Dinov2Backbone):
    """`Dinov2Backbone` with linear attention."""

    config: AdaLADinov2Config


class AdaLADinov2ForSemanticSegmentation(AdaLASegmentationMixin, AdaLAMixin, Dinov2PreTrainedModel):
    """A DINOv2 with linear attention and the linear segmentation head."""

    config: AdaLADinov2Config
    backbone_class = AdaLADinov2Backbone


# --- DINOv2 with registers -------------------------------------------------------------------------------------------


class AdaLADinov2WithRegistersModel(AdaLAMixin, Dinov2WithRegistersModel):
    """`Dinov2WithRegistersModel` with linear attention."""

    config: AdaLADinov2WithRegistersConfig


class AdaLADinov2WithRegistersForImageClassification(AdaLAMixin, Dinov2WithRegistersForImageClassification):
    """`Dinov2WithRegistersForImageClassification` with linear attention."""

    config: AdaLADinov2WithRegistersConfig


class AdaLADinov2WithRegistersBackbone(AdaLAMixin, Dinov2WithRegistersBackbone):
    """`Dinov2WithRegistersBackbone` with linear attention."""

    config: AdaLADinov2WithRegistersConfig


class AdaLADinov2WithRegistersForSemanticSegmentation(
    AdaLASegmentationMixin, AdaLAMixin, Dinov2WithRegistersPreTrainedModel
):
    """A DINOv2 with registers with linear attention and the linear segmentation head."""

    config: AdaLADinov2WithRegistersConfig
    backbone_class = AdaLADinov2WithRegistersBackbone


# --- DINOv3 ----------------------------------------------------------------------------------------------------------


class AdaLADINOv3ViTModel(AdaLAMixin, DINOv3ViTModel):
    """`DINOv3ViTModel` with linear attention."""

    config: AdaLADINOv3ViTConfig


class AdaLADINOv3ViTBackbone(AdaLAMixin, DINOv3ViTBackbone):
    """`DINOv3ViTBackbone` with linear attention."""

    config: AdaLADINOv3ViTConfig


class AdaLADINOv3ViTForSemanticSegmentation(AdaLASegmentationMixin, AdaLAMixin, DINOv3ViTPreTrainedModel):
    """A DINOv3 with linear attention and the linear segmentation head."""

    config: AdaLADINOv3ViTConfig
    base_model_prefix = "dinov3_vit"  # the stock prefix is the name of a module inside
    backbone_class = AdaLADINOv3ViTBackbone


# --- CLIP ------------------------------------------------------------------------------------------------------------


class AdaLACLIPVisionModel(AdaLAMixin, CLIPVisionModel):
    """`CLIPVisionModel` with linear attention."""

    config: AdaLACLIPVisionConfig


class AdaLACLIPVisionModelWithProjection(AdaLAMixin, CLIPVisionModelWithProjection):
    """`CLIPVisionModelWithProjection` with linear attention."""

    config: AdaLACLIPVisionConfig


class AdaLACLIPVisionBackbone(AdaLABackboneMixin, AdaLAMixin, CLIPVisionModel):
    """Feature maps of chosen stages of a CLIP vision tower with linear attention."""

    config: AdaLACLIPVisionConfig


class AdaLACLIPVisionForSemanticSegmentation(AdaLASegmentationMixin, AdaLAMixin, CLIPPreTrainedModel):
    """A CLIP vision tower with linear attention and the linear segmentation head."""

    config: AdaLACLIPVisionConfig
    backbone_class = AdaLACLIPVisionBackbone


class AdaLACLIPModel(AdaLAMixin, CLIPModel):
    """`CLIPModel` with linear attention in the vision tower."""

    config: AdaLACLIPConfig


class AdaLACLIPForImageClassification(AdaLAMixin, CLIPForImageClassification):
    """`CLIPForImageClassification` with linear attention in the vision tower."""

    config: AdaLACLIPConfig


# --- SigLIP ----------------------------------------------------------------------------------------------------------


class AdaLASiglipVisionModel(AdaLAMixin, SiglipVisionModel):
    """`SiglipVisionModel` with linear attention."""

    config: AdaLASiglipVisionConfig


class AdaLASiglipVisionBackbone(AdaLABackboneMixin, AdaLAMixin, SiglipVisionModel):
    """Feature maps of chosen stages of a SigLIP vision tower with linear attention."""

    config: AdaLASiglipVisionConfig


class AdaLASiglipVisionForSemanticSegmentation(AdaLASegmentationMixin, AdaLAMixin, SiglipPreTrainedModel):
    """A SigLIP vision tower with linear attention and the linear segmentation head."""

    config: AdaLASiglipVisionConfig
    backbone_class = AdaLASiglipVisionBackbone


class AdaLASiglipModel(AdaLAMixin, SiglipModel):
    """`SiglipModel` with linear attention in the vision tower."""

    config: AdaLASiglipConfig


class AdaLASiglipForImageClassification(AdaLAMixin, SiglipForImageClassification):
    """`SiglipForImageClassification` with linear attention in the vision tower."""

    config: AdaLASiglipConfig


# --- SigLIP 2 (NaFlex) -----------------------------------------------------------------------------------------------


class AdaLASiglip2VisionModel(AdaLAMixin, Siglip2VisionModel):
    """`Siglip2VisionModel` with linear attention."""

    config: AdaLASiglip2VisionConfig


class AdaLASiglip2VisionBackbone(AdaLABackboneMixin, AdaLAMixin, Siglip2VisionModel):
    """Feature maps of chosen stages of a SigLIP 2 vision tower with linear attention."""

    config: AdaLASiglip2VisionConfig


class AdaLASiglip2VisionForSemanticSegmentation(AdaLASegmentationMixin, AdaLAMixin, Siglip2PreTrainedModel):
    """A SigLIP 2 vision tower with linear attention and the linear segmentation head."""

    config: AdaLASiglip2VisionConfig
    backbone_class = AdaLASiglip2VisionBackbone


class AdaLASiglip2Model(AdaLAMixin, Siglip2Model):
    """`Siglip2Model` with linear attention in the vision tower."""

    config: AdaLASiglip2Config


class AdaLASiglip2ForImageClassification(AdaLAMixin, Siglip2ForImageClassification):
    """`Siglip2ForImageClassification` with linear attention in the vision tower."""

    config: AdaLASiglip2Config


# All classes of this module, by the configuration that opens them.
CLASSES: dict[type[Any], list[type[PreTrainedModel]]] = {config: [] for config in CONFIGS}
for _class in list(globals().values()):
    if isinstance(_class, type) and issubclass(_class, AdaLAMixin) and _class is not AdaLAMixin:
        CLASSES[_class.config_class].append(_class)
        register(_class)

__all__ = ["CLASSES"]
__all__ += [_class.__name__ for _classes in CLASSES.values() for _class in _classes]
