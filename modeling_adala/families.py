"""The supported families: which AdaLA classes stand for which stock `model_type`, and how their tokens are laid out."""

from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel

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
