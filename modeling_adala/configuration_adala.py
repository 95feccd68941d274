"""Configurations: the stock configuration of each family plus the fields of linear attention.

This file travels with the weights (`trust_remote_code`): torch, transformers and flat siblings only.
"""

from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, Dinov2Config, ViTConfig

from .errors import UsageError
from .hub_code import warn_if_newer
from .linear_attention import FEATURE_MAPS, build_feature_map

DEFAULT_FEATURE_MAP = "hedgehog"


@dataclass(kw_only=True)
class AdaLAConfigMixin:
    """Fields that every AdaLA configuration adds to its family's stock configuration.

    Args:
        feature_map (`str`, *optional*, defaults to `"hedgehog"`): phi, one of `FEATURE_MAPS`. Deviates from the paper,
            whose choice was probably `"elu"`: this one measures best (docs/experiments.md).
        feature_map_kwargs (`dict`, *optional*): Options of the feature map, such as `scale` or `center_keys`.
        softmax_layers (`list[int]`, *optional*): Layers that keep softmax attention, from 0; negative numbers count
            from the end. Default: none, all layers are linear.
        teacher_name_or_path (`str`, *optional*): The softmax checkpoint that this model was converted from.
        teacher_revision (`str`, *optional*): Its commit, where it came from the Hub.
        adala_stage (`str`, *optional*): The training stage that this checkpoint has behind it: `converted`,
            `attention-alignment`, `feature-alignment` or `supervised`.
        adala_version (`str`, *optional*): Version of vit-adala that saved the checkpoint.

    Raises:
        UsageError: for an unknown feature map, an option it does not have, or a layer that does not exist.
    """

    feature_map: str = DEFAULT_FEATURE_MAP
    feature_map_kwargs: dict[str, Any] = field(default_factory=dict)
    softmax_layers: list[int] = field(default_factory=list)
    teacher_name_or_path: str | None = None
    teacher_revision: str | None = None
    adala_stage: str | None = None
    adala_version: str | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        warn_if_newer(self.adala_version)
        self._validate_linear_attention()

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == cls.model_type.removeprefix("adala_"):  # a stock softmax checkpoint
            config_dict |= {"model_type": cls.model_type, "teacher_name_or_path": str(pretrained_model_name_or_path)}
        return config_dict, kwargs

    def _validate_linear_attention(self) -> None:
        layers = self.num_hidden_layers
        for layer in self.softmax_layers:
            if not -layers <= layer < layers:
                raise UsageError(
                    f"softmax_layers={self.softmax_layers}: layer {layer} does not exist; this model has layers 0 to"
                    f" {layers - 1}."
                )
        self.softmax_layers = sorted({layer % layers for layer in self.softmax_layers})
        if self.feature_map not in FEATURE_MAPS or self.feature_map_kwargs:
            build_feature_map(self.feature_map, num_heads=1, head_dim=1, **self.feature_map_kwargs)

    @property
    def linear_layers(self) -> list[int]:
        """Indices of the layers whose attention is linear."""
        return [layer for layer in range(self.num_hidden_layers) if layer not in self.softmax_layers]


@strict
class AdaLAViTConfig(AdaLAConfigMixin, ViTConfig):
    """Configuration of the linear-attention ViT: `ViTConfig` and the fields of `AdaLAConfigMixin`."""

    model_type = "adala_vit"


@strict
class AdaLADinov2Config(AdaLAConfigMixin, Dinov2Config):
    """Configuration of the linear-attention DINOv2: `Dinov2Config` and the fields of `AdaLAConfigMixin`."""

    model_type = "adala_dinov2"


for _config in (AdaLAViTConfig, AdaLADinov2Config):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)

__all__ = ["DEFAULT_FEATURE_MAP", "AdaLAConfigMixin", "AdaLADinov2Config", "AdaLAViTConfig"]
