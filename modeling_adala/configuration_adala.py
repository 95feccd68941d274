"""Configurations: the stock configuration of each family plus the fields of linear attention.

It knows options by name and imports no operator.
"""

import functools
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from .errors import UsageError
from .families import find_family, get_family

ADALA_VERSION = "0.1.0"
"""Version of this code, which checkpoints carry as `adala_version`. Equals `modeling_adala.__version__`."""

BACKENDS = ("torch", "triton", "reference")
"""Code that runs linear attention: PyTorch anywhere, kernels on a GPU, or the explicit N x N weights."""

DEFAULT_FEATURE_MAP = "power"

_PLAIN, _PROJECTED = ("scale", "center_keys"), ("scale", "center_keys", "feature_dim")
FEATURE_MAP_OPTIONS = {
    "elu": _PLAIN,
    "relu": (*_PLAIN, "power"),
    "softmax_pair": _PLAIN,
    "hedgehog": _PROJECTED,
    "t2r": _PROJECTED,
    "power": (*_PROJECTED, "power"),
}
"""Names of the feature maps, and the options of each."""

# in words, and as a test
_OPTION_VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "scale": ("a finite number above 0", lambda x: x is None or (type(x) in (int, float) and 0 < x < float("inf"))),
    "center_keys": ("true or false", lambda x: isinstance(x, bool)),
    "power": ("1, 2, 3 or 4", lambda x: type(x) is int and 1 <= x <= 4),
    "feature_dim": ("an integer from 1 to 4096", lambda x: x is None or (type(x) is int and 1 <= x <= 4096)),
}

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class LinearAttentionConfig:
    """Options of linear attention: the argument of `convert`, and fields of every AdaLA configuration.

    Args:
        feature_map (`str`, *optional*, defaults to `"power"`): phi, one of `FEATURE_MAP_OPTIONS`.
        feature_map_kwargs (`dict`, *optional*): Options of the feature map, such as `scale` or `center_keys`.
        softmax_layers (`list[int]`, *optional*): Layers that keep softmax attention, from 0; negative numbers count
            from the end. Default: none, all layers are linear.
        local_mixing (`int`, *optional*, defaults to 3): Side of the depthwise convolution of the values over the patch
            grid in linear layers, an odd number; 0 for none. It starts at zero.
        dynamic_mixing (`bool`, *optional*, defaults to `False`): Add a kernel of each image's own, made of its mean
            patch by two layers of together `0.6 hidden_size^2` parameters.

    Example:

    ```python
    config = LinearAttentionConfig(feature_map="elu", softmax_layers=[0])
    student = convert("facebook/dinov2-small", config)
    ```
    """

    feature_map: str = DEFAULT_FEATURE_MAP
    feature_map_kwargs: dict[str, Any] = field(default_factory=dict)
    softmax_layers: list[int] = field(default_factory=list)
    local_mixing: int = 3
    dynamic_mixing: bool = False

    def __post_init__(self, **kwargs):
        inherited = getattr(super(), "__post_init__", None)  # a configuration's, or a recipe's
        if inherited is not None:
            inherited(**kwargs)
        check_feature_map(self.feature_map, self.feature_map_kwargs)
        if self.local_mixing != 0 and (self.local_mixing % 2 == 0 or not 3 <= self.local_mixing <= 15):
            raise UsageError(f"local_mixing={self.local_mixing}: pass an odd number from 3 to 15, or 0 for none.")
        if self.dynamic_mixing and not self.local_mixing:
            raise UsageError("dynamic_mixing=True with local_mixing=0: pass the side of the kernels, such as 3.")


def in_words(options: LinearAttentionConfig) -> tuple[str, str]:
    """Return feature map and local mixing for a reader, such as `relu, power 3` and `local mixing 3x3, dynamic`."""
    feature_map = ", ".join((options.feature_map, *(f"{k} {v}" for k, v in options.feature_map_kwargs.items())))
    if not options.local_mixing:
        return feature_map, "no local mixing"
    side = options.local_mixing
    return feature_map, f"local mixing {side}x{side}{', dynamic' if options.dynamic_mixing else ''}"


@dataclass(kw_only=True)
class AdaLAConfigMixin(LinearAttentionConfig):
    """Fields that every AdaLA configuration adds to its family's stock configuration, beside those of its base.

    Args:
        backend (`str`, *optional*): Code that runs linear attention, one of `BACKENDS`. Default: that of the variable
            `ADALA_BACKEND` in the environment, or the fastest that the machine has, see `choose_backend`. Not saved:
            it belongs to the machine and not to the weights.
        teacher_name_or_path (`str`, *optional*): The softmax checkpoint that this model was converted from. Of a local
            path, the last part is saved.
        teacher_revision (`str`, *optional*): Its commit, where it came from the Hub.
        adala_stage (`str`, *optional*): `converted`, or the last training stage: `attention-alignment`,
            `feature-alignment` or `supervised`.
        adala_version (`str`, *optional*): Version of vit-adala that saved the checkpoint.
        semantic_loss_ignore_index (`int`, *optional*, defaults to 255): Label that a segmentation loss leaves out.

    Raises:
        UsageError: for an unknown feature map or backend, an option that it does not have, or a layer that does not
            exist.
    """

    backend: str | None = None
    teacher_name_or_path: str | None = None
    teacher_revision: str | None = None
    adala_stage: str | None = None
    adala_version: str | None = None
    semantic_loss_ignore_index: int = 255

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        warn_if_newer(self.adala_version)
        self._validate_linear_attention()

    # A model of this configuration is linear unless softmax is asked for, also a stock class inside a larger model,
    # whose own configuration resets this one's to None.
    @property
    def _attn_implementation(self):
        return self._attn_implementation_internal or "adala"

    @_attn_implementation.setter
    def _attn_implementation(self, value):
        PretrainedConfig._attn_implementation.fset(self, value)

    def to_dict(self):
        values = super().to_dict() | {"teacher_name_or_path": shared_name(self.teacher_name_or_path)}
        values.pop("backend", None)
        return values

    # Linear attention can return its weights; stock configurations allow that for "eager" only.
    @property
    def output_attentions(self):
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value):
        if self._attn_implementation == "adala":
            self._output_attentions = value
        else:
            PretrainedConfig.output_attentions.fset(self, value)

    def validate_output_attentions(self):
        if self._attn_implementation != "adala":
            super().validate_output_attentions()

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        config_dict = config_dict.get(cls.base_config_key, config_dict)  # the vision part of a whole CLIP
        return from_stock_dict(cls, config_dict, str(pretrained_model_name_or_path)), kwargs

    def _validate_linear_attention(self) -> None:
        layers = self.num_hidden_layers
        for layer in self.softmax_layers:
            if not -layers <= layer < layers:
                raise UsageError(
                    f"softmax_layers={self.softmax_layers}: layer {layer} does not exist; this model has layers 0 to"
                    f" {layers - 1}."
                )
        self.softmax_layers = sorted({layer % layers for layer in self.softmax_layers})
        check_backend(self.backend)

    @property
    def linear_layers(self) -> list[int]:
        """Return the indices of the layers whose attention is linear."""
        return [layer for layer in range(self.num_hidden_layers) if layer not in self.softmax_layers]


@dataclass(kw_only=True)
class AdaLABackboneConfigMixin(BackboneConfigMixin, AdaLAConfigMixin):
    """Backbone fields for the families whose stock configuration has none, with the meaning of `Dinov2Config`."""

    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True

    def __post_init__(self, **kwargs):
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        self.stage_names = ["stem", *(f"stage{layer}" for layer in range(1, self.num_hidden_layers + 1))]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        super().__post_init__(**kwargs)


class AdaLAVisionTextConfigMixin:
    """Configuration of a linear vision tower beside a text tower; the fields of the former are in `vision_config`."""

    # "adala" is for the vision tower: causal text has no linear form here, and SigLIP's text was not asked for
    @property
    def _attn_implementation(self):
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value):
        PretrainedConfig._attn_implementation.fset(self, {"vision_config": value} if value == "adala" else value)

    # Stock configurations put both towers under "eager" for it. The vision tower gives its weights as it is.
    @property
    def output_attentions(self):
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value):
        if value and self._attn_implementation is None:
            self._attn_implementation = {"text_config": "eager"}
        self._output_attentions = value

    def validate_output_attentions(self):
        pass  # each tower validates its own

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return from_stock_dict(cls, config_dict, str(pretrained_model_name_or_path)), kwargs


def from_stock_dict(config_class: type[PretrainedConfig], config_dict: dict, teacher: str | None, **options) -> dict:
    """Return the values of a stock configuration as those of its AdaLA class; any others as they are.

    `teacher` is where they came from, `options` are further fields of `AdaLAConfigMixin`.
    """
    model_type = config_dict.get("model_type", "")
    family = find_family(model_type)
    if family is None or family.adala == model_type or family.adala != config_class.model_type:
        return config_dict
    config_dict = config_dict | {"model_type": config_class.model_type}
    if issubclass(config_class, AdaLAConfigMixin):
        return config_dict | {"teacher_name_or_path": teacher} | options
    vision_class = config_class.sub_configs["vision_config"]
    # the `_dict` twins are how the first CLIP checkpoints were saved; they win over the fields without
    vision = (config_dict.get("vision_config") or {}) | (config_dict.pop("vision_config_dict", None) or {})
    vision |= {"model_type": get_family(vision_class.model_type).stock}
    return config_dict | {"vision_config": from_stock_dict(vision_class, vision, teacher, **options)}


def vision_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of the vision tower: `config` itself, or its part in a model with a text tower."""
    return getattr(config, "vision_config", config)


def has_linear_layers(config: PretrainedConfig) -> bool:
    """Return whether a model attends linearly anywhere: false for stock models, and for ours with softmax alone."""
    return bool(getattr(vision_config(config), "linear_layers", None))


def pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """Return `(height, width)` of a size in a configuration, which may be one number for both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def check_feature_map(name: str, options: dict[str, Any]) -> None:
    """Raise `UsageError` for an unknown feature map, an option that it does not have, or a value out of range."""
    if name not in FEATURE_MAP_OPTIONS:
        raise UsageError(f"feature_map={name!r} is unknown; choose one of {', '.join(sorted(FEATURE_MAP_OPTIONS))}.")
    for option, value in options.items():
        if option not in FEATURE_MAP_OPTIONS[name]:
            known = ", ".join(FEATURE_MAP_OPTIONS[name])
            raise UsageError(f"feature_map_kwargs={options!r} does not fit feature_map={name!r}; it takes {known}.")
        allowed, is_allowed = _OPTION_VALUES[option]
        if not is_allowed(value):
            raise UsageError(f"feature_map_kwargs: {option}={value!r} must be {allowed}.")


def check_backend(name: str | None, source: str = "the configuration") -> None:
    """Raise `UsageError` for a name that is not in `BACKENDS`."""
    if name is not None and name not in BACKENDS:
        raise UsageError(f"backend={name!r} (from {source}) is unknown; choose one of {', '.join(BACKENDS)}.")


@functools.cache
def warn_if_newer(version: str | None) -> None:
    """Warn, once per version, about a checkpoint of a later minor release, whose options may be unknown here."""
    if version is not None and _minor_release(version) > _minor_release(ADALA_VERSION):
        logger.warning(
            "this checkpoint was written by vit-adala %s, and this is %s: options that it does not know are ignored,"
            " and outputs may differ. Update vit-adala, or load with trust_remote_code=True without importing"
            " modeling_adala.",
            version,
            ADALA_VERSION,
        )


def _minor_release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def shared_name(name_or_path: str | None) -> str | None:
    """Return the name of a model as anyone may read it: a Hub id as it is, the last part of a local path.

    A configuration goes wherever its weights go; parent folders may be private.
    """
    if not name_or_path:
        return name_or_path
    cached = re.search(r"models--([\w.-]+)[/\\]snapshots[/\\]", name_or_path)
    if cached:  # a folder of the Hub's cache
        return cached[1].replace("--", "/")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name_or_path) and not os.path.exists(name_or_path):
        return name_or_path
    return re.split(r"[/\\]", name_or_path.rstrip("/\\"))[-1] or None


@strict
class AdaLAViTConfig(AdaLABackboneConfigMixin, transformers.ViTConfig):
    """`ViTConfig` and the fields of `AdaLAConfigMixin`. Reads ViT-MAE and ViT-MSN configurations, too."""

    model_type = "adala_vit"


@strict
class AdaLADeiTConfig(AdaLABackboneConfigMixin, transformers.DeiTConfig):
    """`DeiTConfig` (distilled: class and distillation token) and the fields of `AdaLAConfigMixin`."""

    model_type = "adala_deit"


@strict
class AdaLAIJepaConfig(AdaLABackboneConfigMixin, transformers.IJepaConfig):
    """`IJepaConfig` (no class token) and the fields of `AdaLAConfigMixin`."""

    model_type = "adala_ijepa"


@strict
class AdaLADinov2Config(AdaLAConfigMixin, transformers.Dinov2Config):
    """`Dinov2Config` and the fields of `AdaLAConfigMixin`."""

    model_type = "adala_dinov2"


@strict
class AdaLADinov2WithRegistersConfig(AdaLAConfigMixin, transformers.Dinov2WithRegistersConfig):
    """`Dinov2WithRegistersConfig` and the fields of `AdaLAConfigMixin`."""

    model_type = "adala_dinov2_with_registers"


@strict
class AdaLADINOv3ViTConfig(AdaLAConfigMixin, transformers.DINOv3ViTConfig):
    """`DINOv3ViTConfig` (rotary positions, registers) and the fields of `AdaLAConfigMixin`."""

    model_type = "adala_dinov3_vit"


@strict
class AdaLACLIPVisionConfig(AdaLABackboneConfigMixin, transformers.CLIPVisionConfig):
    """`CLIPVisionConfig` and the fields of `AdaLAConfigMixin`."""

    model_type = "adala_clip_vision_model"


@strict
class AdaLACLIPConfig(AdaLAVisionTextConfigMixin, transformers.CLIPConfig):
    """`CLIPConfig` with a linear vision tower."""

    model_type = "adala_clip"
    sub_configs_defaults = {"vision_config": AdaLACLIPVisionConfig, "text_config": transformers.CLIPTextConfig}


@strict
class AdaLASiglipVisionConfig(AdaLABackboneConfigMixin, transformers.SiglipVisionConfig):
    """`SiglipVisionConfig` and the fields of `AdaLAConfigMixin`."""

    model_type = "adala_siglip_vision_model"


@strict
class AdaLASiglipConfig(AdaLAVisionTextConfigMixin, transformers.SiglipConfig):
    """`SiglipConfig` with a linear vision tower."""

    model_type = "adala_siglip"
    sub_configs_defaults = {"vision_config": AdaLASiglipVisionConfig, "text_config": transformers.SiglipTextConfig}


@strict
class AdaLASiglip2VisionConfig(AdaLABackboneConfigMixin, transformers.Siglip2VisionConfig):
    """`Siglip2VisionConfig` (NaFlex: packed patches of any aspect ratio) and the fields of `AdaLAConfigMixin`."""

    model_type = "adala_siglip2_vision_model"


@strict
class AdaLASiglip2Config(AdaLAVisionTextConfigMixin, transformers.Siglip2Config):
    """`Siglip2Config` with a linear vision tower."""

    model_type = "adala_siglip2"
    sub_configs_defaults = {"vision_config": AdaLASiglip2VisionConfig, "text_config": transformers.Siglip2TextConfig}
