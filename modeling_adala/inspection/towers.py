"""The families: which classes each has, and how to treat their models alike."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneMixin

from ..configuration_adala import SAME_ARCHITECTURE, pair, vision_config
from ..errors import UsageError
from ..mixins import image_inputs, last_layernorm, num_special_tokens
from ..modeling_adala import CLASSES
from ..registration import head_of


@dataclass(frozen=True)
class Family:
    """One row of the family table.

    Args:
        config_class (`type`): The AdaLA configuration.
        classes (`dict[str, type]`): AdaLA class per head; a head is what the class name says after the family's.
    """

    config_class: type[PretrainedConfig]
    classes: dict[str, type[PreTrainedModel]]

    def stock_class(self, head: str) -> type[PreTrainedModel] | None:
        """The softmax class of a head in Transformers, or `None` where only we have that head."""
        return getattr(transformers, self.classes[head].__name__.removeprefix("AdaLA"), None)


FAMILIES: dict[str, Family] = {
    config_class.model_type.removeprefix("adala_"): Family(config_class, {head_of(cls): cls for cls in classes})
    for config_class, classes in CLASSES.items()
}


def get_family(model_type: str) -> Family:
    """The family of a stock or an AdaLA `model_type`.

    Raises:
        UsageError: if it is not supported; the message names those that are.
    """
    name = model_type.removeprefix("adala_")
    name = SAME_ARCHITECTURE.get(name, name)
    if name not in FAMILIES:
        known = ", ".join([*FAMILIES, *SAME_ARCHITECTURE])
        raise UsageError(f"model_type {model_type!r} is not supported; choose a teacher of {known}.")
    return FAMILIES[name]


def vision_tower(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a stock or an AdaLA model that turns pixels into tokens, without head, projection or text tower."""
    base = model.base_model if hasattr(model.base_model, "embeddings") else model  # DINOv3 calls its encoder `model`
    return getattr(base, "vision_model", base)


def patch_size(config: PretrainedConfig) -> tuple[int, int]:
    """Height and width of a patch in pixels."""
    return pair(vision_config(config).patch_size)


def native_size(config: PretrainedConfig) -> tuple[int, int]:
    """Height and width in pixels of the images that a model's positions were made for."""
    config = vision_config(config)
    size = getattr(config, "image_size", None)
    if size is None:  # SigLIP 2 says how many patches, of a square
        size = math.isqrt(config.num_patches) * config.patch_size
    return pair(size)


def token_groups(config: PretrainedConfig) -> dict[str, slice]:
    """Where class token, registers and patches stand in `last_hidden_state`; absent groups are left out."""
    config = vision_config(config)
    special, registers = num_special_tokens(config), getattr(config, "num_register_tokens", 0)
    groups = {
        "cls": slice(0, special - registers),
        "patches": slice(special, None),
        "registers": slice(special - registers, special),
    }
    return {name: group for name, group in groups.items() if group.stop is None or group.stop > group.start}


def forward_tower(model: PreTrainedModel, pixel_values: Tensor, **kwargs) -> Any:
    """Output of the vision tower of a stock or an AdaLA model, with or without a head, for images of any size.

    Args:
        model (`PreTrainedModel`): The model.
        pixel_values (`Tensor`): `(batch, channels, height, width)`, sides multiples of the patch. SigLIP 2 takes these
            too, patched here.
        kwargs: Such as `output_hidden_states=True`.
    """
    tower = vision_tower(model)
    if isinstance(tower, BackboneMixin):
        return tower(pixel_values, **kwargs)
    return tower(**image_inputs(tower.config, pixel_values), **kwargs)


def forward_features(model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """Final features, after the last layer norm: `(batch, tokens, hidden_size)`. See `forward_tower`."""
    tower = vision_tower(model)
    if isinstance(tower, BackboneMixin):  # its output holds maps of chosen stages only
        return last_layernorm(tower)(tower(pixel_values, output_hidden_states=True).hidden_states[-1])
    return final_features(tower, forward_tower(model, pixel_values))


def final_features(tower: PreTrainedModel, output: Any) -> Tensor:
    """`last_hidden_state` after the last layer norm. CLIP gives it before, and normalizes the class token alone."""
    if tower.config.model_type.removeprefix("adala_") == "clip_vision_model":
        return tower.post_layernorm(output.last_hidden_state)
    return output.last_hidden_state


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The self-attention modules of the vision tower of a stock or an AdaLA model, first layer first."""
    return [module for module in vision_tower(model).modules() if hasattr(module, "q_proj")]


def transformer_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks (attention and MLP) of the vision tower, first layer first."""
    tower = vision_tower(model)
    attentions = [name for name, module in tower.named_modules() if hasattr(module, "q_proj")]
    return [tower.get_submodule(name.rpartition(".")[0]) for name in attentions]


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Puts the vision tower of a model under another attention implementation for a while, such as `"sdpa"`."""
    config = vision_tower(model).config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for a while; each module gets its own mode back."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
