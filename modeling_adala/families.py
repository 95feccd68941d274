"""The supported families: which AdaLA classes stand for which stock `model_type`, and their token layout."""

import inspect
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneMixin

from .configuration_adala import AdaLADinov2Config, AdaLAViTConfig
from .errors import UsageError
from .modeling_adala import (
    AdaLADinov2Backbone,
    AdaLADinov2ForImageClassification,
    AdaLADinov2Model,
    AdaLAViTForImageClassification,
    AdaLAViTForMaskedImageModeling,
    AdaLAViTModel,
)


@dataclass(frozen=True)
class Family:
    """One row of the family table. `classes` maps a head name (the stock class name without its family) to a class."""

    config_class: type[PretrainedConfig]
    classes: dict[str, type[PreTrainedModel]]


FAMILIES: dict[str, Family] = {
    "vit": Family(
        AdaLAViTConfig,
        {
            "Model": AdaLAViTModel,
            "ForImageClassification": AdaLAViTForImageClassification,
            "ForMaskedImageModeling": AdaLAViTForMaskedImageModeling,
        },
    ),
    "dinov2": Family(
        AdaLADinov2Config,
        {
            "Model": AdaLADinov2Model,
            "ForImageClassification": AdaLADinov2ForImageClassification,
            "Backbone": AdaLADinov2Backbone,
        },
    ),
}


def get_family(model_type: str) -> Family:
    """The family of a stock or an AdaLA `model_type`.

    Raises:
        UsageError: if it is not supported; the message names those that are.
    """
    name = model_type.removeprefix("adala_")
    if name not in FAMILIES:
        raise UsageError(f"model_type {model_type!r} is not supported; choose a teacher of {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def token_groups(config: PretrainedConfig) -> dict[str, slice]:
    """Where the class token, the registers (if any) and the patches stand in `last_hidden_state`."""
    registers = getattr(config, "num_register_tokens", 0)
    groups = {"cls": slice(0, 1), "patches": slice(1 + registers, None)}
    if registers:
        groups["registers"] = slice(1, 1 + registers)
    return groups


def forward_features(model: PreTrainedModel, pixel_values: Tensor, **kwargs) -> Tensor:
    """Final features, after the last layer norm, of a stock or an AdaLA model, with or without a head, at any size.

    Args:
        model (`PreTrainedModel`): The model; of one with a head, the base model runs.
        pixel_values (`Tensor`): `(batch, channels, height, width)`, sides multiples of the patch.

    Returns:
        `Tensor`: `last_hidden_state`, `(batch, tokens, hidden_size)`.
    """
    base, kwargs = model.base_model, any_size_kwargs(model, pixel_values) | kwargs
    if isinstance(base, BackboneMixin):  # its output holds maps of chosen stages only
        return base.layernorm(base(pixel_values, **kwargs | {"output_hidden_states": True}).hidden_states[-1])
    return base(pixel_values, **kwargs).last_hidden_state


def any_size_kwargs(model: PreTrainedModel, pixel_values: Tensor) -> dict[str, bool]:
    """What `forward` needs to take this image size: ViT interpolates its positions only when told, DINOv2 always."""
    native = model.config.image_size
    native = (native, native) if isinstance(native, int) else tuple(native)
    if tuple(pixel_values.shape[-2:]) == native:
        return {}
    takes = "interpolate_pos_encoding" in inspect.signature(model.base_model.forward).parameters
    return {"interpolate_pos_encoding": True} if takes else {}


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The self-attention modules of a stock or an AdaLA model, first layer first."""
    return [module for module in model.modules() if hasattr(module, "q_proj") and hasattr(module, "o_proj")]
