"""Models of all families alike: the vision tower, its tokens, its blocks and its features."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneMixin

from ..configuration_adala import pair, vision_config
from ..families import get_family
from ..mixins import image_inputs, last_layernorm, num_special_tokens


def vision_tower(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a stock or an AdaLA model that turns pixels into tokens: no head, no text tower."""
    base = model.base_model if hasattr(model.base_model, "embeddings") else model  # DINOv3 calls its encoder `model`
    return getattr(base, "vision_model", base)


def patch_size(config: PretrainedConfig) -> tuple[int, int]:
    """Return height and width of a patch in pixels."""
    return pair(vision_config(config).patch_size)


def native_size(config: PretrainedConfig) -> tuple[int, int]:
    """Return height and width in pixels of the images that a model's positions were made for.

    Example:

    ```python
    height, width = native_size(teacher.config)
    ```
    """
    config = vision_config(config)
    size = getattr(config, "image_size", None)
    if size is None:  # SigLIP 2 says how many patches, of a square
        size = math.isqrt(config.num_patches) * config.patch_size
    return pair(size)


def token_groups(config: PretrainedConfig) -> dict[str, slice]:
    """Return the slices of class token, registers and patches in `last_hidden_state`; absent groups are left out."""
    config = vision_config(config)
    special, registers = num_special_tokens(config), getattr(config, "num_register_tokens", 0)
    groups = {
        "cls": slice(0, special - registers),
        "patches": slice(special, None),
        "registers": slice(special - registers, special),
    }
    return {name: group for name, group in groups.items() if group.stop is None or group.stop > group.start}


def forward_tower(model: PreTrainedModel, pixel_values: Tensor, **kwargs) -> Any:
    """Return the output of the vision tower of a stock or an AdaLA model for images of any size.

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
    """Return the final features, after the last layer norm: `(batch, tokens, hidden_size)`. See `forward_tower`."""
    tower = vision_tower(model)
    options = {"output_hidden_states": True} if isinstance(tower, BackboneMixin) else {}
    return final_features(tower, forward_tower(model, pixel_values, **options))


def final_features(tower: PreTrainedModel, output: Any) -> Tensor:
    """Return the last hidden state after the last layer norm. CLIP itself normalizes the class token alone.

    A backbone must have been asked for `output_hidden_states`: its output holds maps of chosen stages otherwise.
    """
    if isinstance(tower, BackboneMixin):
        return last_layernorm(tower)(output.hidden_states[-1])
    if get_family(tower.config.model_type).normalizes_last:
        return output.last_hidden_state
    return last_layernorm(tower)(output.last_hidden_state)


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the self-attention modules of the vision tower of a stock or an AdaLA model, first layer first."""
    return [module for module in vision_tower(model).modules() if hasattr(module, "q_proj")]


def transformer_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the transformer blocks (attention and MLP) of the vision tower, first layer first."""
    tower = vision_tower(model)
    attentions = [name for name, module in tower.named_modules() if hasattr(module, "q_proj")]
    return [tower.get_submodule(name.rpartition(".")[0]) for name in attentions]


@contextmanager
def block_outputs(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Yield a dictionary that holds the outputs of these blocks once the vision tower has run.

    By hooks, as Transformers' own `hidden_states` hold those of all blocks, and none of those that FSDP shards.
    """
    blocks, outputs = transformer_blocks(model), dict[int, Tensor]()

    def keep(layer: int, module: nn.Module, args: tuple, output: Any) -> None:
        outputs[layer] = state_of(output)

    handles = [blocks[layer].register_forward_hook(partial(keep, layer)) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def state_of(output: Any) -> Tensor:
    """Return the hidden states in the output of a block, which families return alone or first of several."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Put the vision tower of a model under another attention implementation for a while, such as `"sdpa"`."""
    config = vision_tower(model).config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def hold_positions(model: nn.Module) -> None:
    """Keep DINOv3 from moving its positions at random in training mode, so that its features are the teacher's."""
    tower: Any = vision_tower(model)
    if hasattr(tower, "rope_embeddings"):
        tower.rope_embeddings.eval()


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
