"""Linear-attention ViTs: each family subclasses its stock classes and replaces nothing but the attention.

Parameter names are the stock ones (`q_proj`, `k_proj`, `v_proj`, `o_proj` in every attention), so that teacher
weights, PEFT targets and hooks fit. `attn_implementation="sdpa"` or `"eager"` puts a model in softmax mode: it then
equals its teacher as long as the weights do.

This file travels with the weights (`trust_remote_code`): torch, transformers and flat siblings only.
"""

import torch
import transformers
from torch import nn
from transformers import (
    AutoBackbone,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    Dinov2Backbone,
    Dinov2ForImageClassification,
    Dinov2Model,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.dinov2.modeling_dinov2 import (
    Dinov2Attention,
    Dinov2Embeddings,
    Dinov2Encoder,
    Dinov2Layer,
)
from transformers.models.vit.modeling_vit import ViTAttention, ViTEmbeddings, ViTLayer, ViTPooler
from transformers.utils import is_torchvision_available, is_vision_available

from .configuration_adala import AdaLADinov2Config, AdaLAViTConfig
from .hub_code import ADALA_VERSION, auto_map
from .linear_attention import FeatureMap, build_feature_map


class AdaLAAttentionMixin:
    """Gives a stock attention module its own feature map, or `None` where the layer keeps softmax."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config)
        self.layer_idx = layer_idx
        self.feature_map = None
        if layer_idx not in config.softmax_layers:
            self.feature_map = build_feature_map(
                config.feature_map, self.num_attention_heads, self.head_dim, **config.feature_map_kwargs
            )


class AdaLAMixin:
    """What all AdaLA models share: linear attention by default, neutral feature maps; saved with in-memory names and
    with their code, so that `trust_remote_code` opens them where this package is not installed."""

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        return super().get_correct_attn_implementation(requested_attention or "adala", is_init_check)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FeatureMap):
            module.reset_parameters()

    def save_pretrained(self, save_directory, *args, **kwargs):
        # With the teacher family's old names on disk (the default), `Trainer` resumes and `load_best_model_at_end`
        # silently leave most tensors as they were: transformers issues 43701 and 40187, open in 5.23.
        kwargs.setdefault("save_original_format", False)
        if self.is_remote_code():
            # Transformers copies the code beside the weights, but would name no class other than this one.
            self.config.auto_map = auto_map(self.config_class)
        self.config.adala_version = ADALA_VERSION
        return super().save_pretrained(save_directory, *args, **kwargs)


# --- ViT -------------------------------------------------------------------------------------------------------------


class AdaLAViTAttention(AdaLAAttentionMixin, ViTAttention):
    pass


class AdaLAViTLayer(ViTLayer):
    def __init__(self, config: AdaLAViTConfig, layer_idx: int):
        super().__init__(config)
        self.attention = AdaLAViTAttention(config, layer_idx)


class AdaLAViTModel(AdaLAMixin, ViTModel):
    """`ViTModel` with linear attention. Opens AdaLA checkpoints and stock softmax ViT checkpoints alike."""

    config: AdaLAViTConfig
    config_class = AdaLAViTConfig
    _no_split_modules = ["ViTEmbeddings", "AdaLAViTLayer"]

    def __init__(self, config: AdaLAViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        # past ViTModel.__init__, which would build the softmax layers first
        super(ViTModel, self).__init__(config)
        self.embeddings = ViTEmbeddings(config, use_mask_token=use_mask_token)
        self.layers = nn.ModuleList([AdaLAViTLayer(config, index) for index in range(config.num_hidden_layers)])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = ViTPooler(config) if add_pooling_layer else None
        self.post_init()


class AdaLAViTForImageClassification(AdaLAMixin, ViTForImageClassification):
    """`ViTForImageClassification` with linear attention."""

    config: AdaLAViTConfig
    config_class = AdaLAViTConfig
    _no_split_modules = AdaLAViTModel._no_split_modules

    def __init__(self, config: AdaLAViTConfig):
        super(ViTForImageClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.vit = AdaLAViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()


class AdaLAViTForMaskedImageModeling(AdaLAMixin, ViTForMaskedImageModeling):
    """`ViTForMaskedImageModeling` (SimMIM decoder) with linear attention."""

    config: AdaLAViTConfig
    config_class = AdaLAViTConfig
    _no_split_modules = AdaLAViTModel._no_split_modules

    def __init__(self, config: AdaLAViTConfig):
        super(ViTForMaskedImageModeling, self).__init__(config)
        self.vit = AdaLAViTModel(config, add_pooling_layer=False, use_mask_token=True)
        self.decoder = nn.Sequential(
            nn.Conv2d(config.hidden_size, config.encoder_stride**2 * config.num_channels, kernel_size=1),
            nn.PixelShuffle(config.encoder_stride),
        )
        self.post_init()


# --- DINOv2 ----------------------------------------------------------------------------------------------------------


class AdaLADinov2Attention(AdaLAAttentionMixin, Dinov2Attention):
    pass


class AdaLADinov2Layer(Dinov2Layer):
    def __init__(self, config: AdaLADinov2Config, layer_idx: int):
        super().__init__(config)
        self.attention = AdaLADinov2Attention(config, layer_idx)


class AdaLADinov2Encoder(AdaLAMixin, Dinov2Encoder):
    config_class = AdaLADinov2Config

    def __init__(self, config: AdaLADinov2Config):
        super(Dinov2Encoder, self).__init__(config)
        self.layer = nn.ModuleList([AdaLADinov2Layer(config, index) for index in range(config.num_hidden_layers)])
        self.post_init()


class AdaLADinov2Model(AdaLAMixin, Dinov2Model):
    """`Dinov2Model` with linear attention. Opens AdaLA checkpoints and stock softmax DINOv2 checkpoints alike."""

    config: AdaLADinov2Config
    config_class = AdaLADinov2Config
    _no_split_modules = ["Dinov2Embeddings", "AdaLADinov2Layer"]

    def __init__(self, config: AdaLADinov2Config):
        super(Dinov2Model, self).__init__(config)
        self.embeddings = Dinov2Embeddings(config)
        self.encoder = AdaLADinov2Encoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()


class AdaLADinov2ForImageClassification(AdaLAMixin, Dinov2ForImageClassification):
    """`Dinov2ForImageClassification` (linear head on CLS and mean patch token) with linear attention."""

    config: AdaLADinov2Config
    config_class = AdaLADinov2Config
    _no_split_modules = AdaLADinov2Model._no_split_modules

    def __init__(self, config: AdaLADinov2Config):
        super(Dinov2ForImageClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.dinov2 = AdaLADinov2Model(config)
        features = config.hidden_size * 2
        self.classifier = nn.Linear(features, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()


class AdaLADinov2Backbone(AdaLAMixin, Dinov2Backbone):
    """`Dinov2Backbone` with linear attention: feature maps of chosen stages for dense heads."""

    config: AdaLADinov2Config
    config_class = AdaLADinov2Config
    _no_split_modules = AdaLADinov2Model._no_split_modules

    def __init__(self, config: AdaLADinov2Config):
        super(Dinov2Backbone, self).__init__(config)
        self.num_features = [config.hidden_size for _ in range(config.num_hidden_layers + 1)]
        self.embeddings = Dinov2Embeddings(config)
        self.encoder = AdaLADinov2Encoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()


# --- Looking inside and registration ---------------------------------------------------------------------------------


@torch.no_grad()
def attention_map(model: nn.Module, pixel_values: torch.Tensor, layer: int, **kwargs) -> torch.Tensor:
    """Effective attention weights of one layer: who attends to whom, as linear attention really weighs it.

    Args:
        model (`PreTrainedModel`): An AdaLA model, with or without a head.
        pixel_values (`Tensor`): `(batch, channels, height, width)`.
        layer (`int`): Layer index; negative numbers count from the end.
        kwargs: Passed to the model, such as `interpolate_pos_encoding=True`.

    Returns:
        `Tensor`: `(batch, heads, tokens, tokens)`, rows sum to 1 (just below it for linear layers).

    Raises:
        IndexError: for a layer that the model does not have.
    """
    attentions = [module for module in model.modules() if isinstance(module, AdaLAAttentionMixin)]
    weights = []

    def keep(module, args, kwargs, output):
        weights.append(output[1])

    handle = attentions[layer].register_forward_hook(keep, with_kwargs=True)
    try:
        model(pixel_values, output_attentions=True, **kwargs)
    finally:
        handle.remove()
    return weights[0]


# Checkpoints hold the old names of each family, and the renaming is looked up by class name. Without these lines a
# stock checkpoint loads with all its attention and MLP weights left random, and only a printed report says so.
for _name, _stock_name in {
    "AdaLAViTModel": "ViTModel",
    "AdaLADinov2Model": "Dinov2Model",
    "AdaLADinov2Backbone": "Dinov2Backbone",
}.items():
    register_checkpoint_conversion_mapping(_name, get_checkpoint_conversion_mapping(_stock_name), overwrite=True)

for _config, _classes in {
    AdaLAViTConfig: {
        AutoModel: AdaLAViTModel,
        AutoModelForImageClassification: AdaLAViTForImageClassification,
        AutoModelForMaskedImageModeling: AdaLAViTForMaskedImageModeling,
    },
    AdaLADinov2Config: {
        AutoModel: AdaLADinov2Model,
        AutoModelForImageClassification: AdaLADinov2ForImageClassification,
        AutoBackbone: AdaLADinov2Backbone,
    },
}.items():
    for _auto, _class in _classes.items():
        _auto.register(_config, _class, exist_ok=True)
        _class.register_for_auto_class(_auto)  # its checkpoints carry this code
if is_vision_available():  # without Pillow AutoImageProcessor cannot be used
    for _config, _processor in {AdaLAViTConfig: "ViTImageProcessor", AdaLADinov2Config: "BitImageProcessor"}.items():
        _processors = {"pil": getattr(transformers, f"{_processor}Pil")}
        if is_torchvision_available():  # asking for the torchvision one without it prints a warning
            _processors["torchvision"] = getattr(transformers, _processor)
        AutoImageProcessor.register(_config, image_processor_classes=_processors, exist_ok=True)

__all__ = [
    "AdaLADinov2Backbone",
    "AdaLADinov2ForImageClassification",
    "AdaLADinov2Model",
    "AdaLAViTForImageClassification",
    "AdaLAViTForMaskedImageModeling",
    "AdaLAViTModel",
    "attention_map",
]
