"""What one image costs a model, softmax beside linear, from the configuration alone: no weights, no forward pass.

FLOPs: a multiply-add is 2, and only matrix products and convolutions count, as `torch.utils.flop_counter` has it.
Softmax, norms, activations, the elementwise part of a feature map and the interpolation of positions are left out, and
so are poolers and heads that see a single token.

Memory: what autograd keeps of a forward pass for the backward pass, in float32, batch 1, no checkpointing. Weights,
gradients and optimizer state come on top. Inference keeps no more than a layer at a time.

Attention is what happens between the query, key and value projections and the output projection: the part that
linearization replaces. The projections cost the same either way and count to the whole model.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..attention_interface import LocalMixing, mixing_width
from ..configuration_adala import pair, vision_config
from ..conversion.convert import student_config
from ..errors import UsageError
from ..families import get_family, is_adala
from ..feature_maps import FeatureMap, build_feature_map
from ..linear_attention import linear_attention
from ..mixins import num_special_tokens
from .towers import patch_size

# "eager" writes the N x N weights to memory; "sdpa", PyTorch's fused softmax and the default, does without
ATTENTIONS = ("eager", "sdpa", "linear")
_FLOAT32 = 4


@dataclass(frozen=True)
class Cost:
    """Cost of one image.

    Args:
        attention_flops (`int`), flops (`int`): Of attention and of the whole vision tower.
        attention_memory (`int`), memory (`int`): Activations kept for the backward pass, in bytes.
    """

    attention_flops: int
    flops: int
    attention_memory: int
    memory: int


@dataclass(frozen=True)
class BreakEven:
    """Size from which linear attention takes no more FLOPs than softmax.

    Args:
        tokens (`int`): Smallest number of tokens.
        image_size (`int`): Side in pixels of the smallest square image with as many.
    """

    tokens: int
    image_size: int


def linear_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the AdaLA configuration of a vision tower: its own, or for a stock one that of `convert`.

    Raises:
        UsageError: for a model that is not supported.
    """
    get_family(config.model_type)
    return vision_config(config if is_adala(config) else student_config(config))


def nearest_size(config: PretrainedConfig, image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return the height and width nearest to `image_size` that whole patches tile.

    Raises:
        UsageError: for a side below 1 pixel.
    """
    size = pair(image_size)
    if min(size) < 1:
        raise UsageError(f"image_size={image_size!r}: sides are 1 pixel or more; pass such as 224 or 336x448.")
    height, width = (max(1, math.floor(side / p + 0.5)) * p for side, p in zip(size, patch_size(config), strict=True))
    return height, width


def count_tokens(config: PretrainedConfig, image_size: tuple[int, int]) -> int:
    """Return the number of patches of an image of `(height, width)`, and the class token and registers before them."""
    rows, columns = (side // patch for side, patch in zip(image_size, patch_size(config), strict=True))
    return rows * columns + num_special_tokens(vision_config(config))


def image_cost(config: PretrainedConfig, image_size: tuple[int, int], attention: str) -> Cost:
    """Return the cost of one image for a stock or an AdaLA model.

    Args:
        config (`PretrainedConfig`): Of the model; of one with a text tower, its vision tower counts.
        image_size (`tuple[int, int]`): Height and width in pixels, multiples of the patch.
        attention (`str`): One of `ATTENTIONS`. `"linear"` leaves the `softmax_layers` of the configuration as they
            are, with the fused softmax.

    Raises:
        UsageError: for a model that is not supported.
    """
    config = linear_config(config)
    layers, linear = config.num_hidden_layers, len(config.linear_layers) if attention == "linear" else 0
    tokens, width, inner = count_tokens(config, image_size), config.hidden_size, attention_width(config)
    attention_flops = linear * _linear_flops(config, tokens) + (layers - linear) * _softmax_flops(config, tokens)
    if config.dynamic_mixing:  # two layers on the mean patch
        attention_flops += 2 * linear * mixing_width(inner) * inner * (1 + config.local_mixing**2)
    softmax = "sdpa" if attention == "linear" else attention
    kept = linear * _kept_by_linear(config, tokens) + (layers - linear) * _kept_by_softmax(config, tokens, softmax)

    rows, columns = patch_size(config)
    patches, pixels = tokens - num_special_tokens(config), rows * columns * config.num_channels
    mlp_products, mlp_width, mlp_kept = _mlp(config)
    flops = attention_flops + 2 * patches * pixels * width
    flops += 2 * layers * tokens * width * (4 * inner + mlp_products * mlp_width)
    # each layer keeps the input and output of its two norms, and the input of its two layer scales
    per_token = 4 * width + mlp_kept * mlp_width + (2 * width if hasattr(config, "layerscale_value") else 0)
    whole = kept + patches * pixels + layers * tokens * per_token + 2 * tokens * width  # the last norm's
    if has_attention_pooling(config):  # keys and values of all tokens; one query
        flops += 4 * tokens * width * (width + 1) + 4 * width * (width + config.intermediate_size)
        whole += 2 * tokens * width
    return Cost(attention_flops, flops, _FLOAT32 * kept, _FLOAT32 * whole)


def break_even(config: PretrainedConfig) -> BreakEven | None:
    """Return the size from which linear attention takes no more FLOPs than softmax; `None` if no layer is linear.

    Per head, softmax takes `4 N^2 D` FLOPs and linear attention `N (p + 2 F D + 2 F (D + 1))`, with `F` features and
    `p` for a learned projection: they meet at `N = (p + 2 F (2 D + 1)) / (4 D)`.
    """
    config = linear_config(config)
    if not config.linear_layers:
        return None
    per_token = _linear_flops(config, 1)
    tokens = math.ceil(per_token / _softmax_flops(config, 1))
    patches, patch = tokens - num_special_tokens(config), patch_size(config)
    return BreakEven(tokens, (math.isqrt(max(patches, 1) - 1) + 1) * max(patch))


def attention_width(config: PretrainedConfig) -> int:
    """Return heads times their width; in all but unusual configurations the hidden size."""
    return config.num_attention_heads * head_dim(config)


def head_dim(config: PretrainedConfig) -> int:
    """Return the width of one head of a vision tower."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def num_features(config: PretrainedConfig) -> int:
    """Return the number of features per head that the feature map of an AdaLA vision tower turns `head_dim` into."""
    phi, token = _feature_map(config), torch.zeros(1, config.num_attention_heads, 1, head_dim(config))
    return phi(token, token)[0].shape[-1]


def has_attention_pooling(config: PretrainedConfig) -> bool:
    """Return whether a vision tower ends in SigLIP's attention pooling, which is linear in the tokens already."""
    return getattr(config, "vision_use_head", False)


def _feature_map(config: PretrainedConfig) -> FeatureMap:
    return build_feature_map(
        config.feature_map, config.num_attention_heads, head_dim(config), **config.feature_map_kwargs
    )


def _softmax_flops(config: PretrainedConfig, tokens: int) -> int:
    """Return the FLOPs of one layer: scores, and their weighted sum."""
    return 4 * tokens**2 * attention_width(config)


def _linear_flops(config: PretrainedConfig, tokens: int) -> int:
    """Return the FLOPs of one layer: learned projections, state, its product with the normalizer, local mixing."""
    phi, width, features = _feature_map(config), head_dim(config), num_features(config)
    projected, mixed = 4 * width * getattr(phi, "feature_dim", 0), 2 * width * config.local_mixing**2
    per_token = projected + 2 * features * width + 2 * features * (width + 1) + mixed
    return config.num_attention_heads * tokens * per_token


def _kept_by_softmax(config: PretrainedConfig, tokens: int, implementation: str) -> int:
    """Return the floats of one layer: query, key, value, output, and all weights or the normalizer of each row."""
    rows = config.num_attention_heads * tokens
    return 4 * tokens * attention_width(config) + rows * (tokens if implementation == "eager" else 1)


def _kept_by_linear(config: PretrainedConfig, tokens: int) -> int:
    """Return the floats of one layer, from two short runs of the operator: they grow linearly with the tokens."""
    few, many = 6**2, 12**2
    at_few, at_many = (_kept_floats(config, count) for count in (few, many))
    output = tokens * attention_width(config)
    return at_few + (at_many - at_few) // (many - few) * (tokens - few) + output


def _kept_floats(config: PretrainedConfig, tokens: int) -> int:
    phi, kept = _feature_map(config), dict[int, Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    # as the projections write them
    query, key, value = (torch.ones(1, tokens, phi.num_heads, phi.head_dim, requires_grad=True) for _ in range(3))
    weights, packed = {parameter.data_ptr() for parameter in phi.parameters()}, get_family(config.model_type).packed
    mask = torch.ones(1, tokens, dtype=torch.bool) if packed else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        graph = [linear_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), phi, mask)]
        if config.local_mixing:
            mixing, grid = (
                LocalMixing(phi.num_heads * phi.head_dim, config.local_mixing, config.dynamic_mixing),
                (math.isqrt(tokens), math.isqrt(tokens)),
            )
            graph.append(mixing(value.transpose(1, 2), torch.tensor([grid]) if packed else grid))
            weights |= {parameter.data_ptr() for parameter in mixing.parameters()}
    assert graph  # it holds what autograd keeps
    return sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in weights) // _FLOAT32


def _mlp(config: PretrainedConfig) -> tuple[int, int, int]:
    """Return the MLP's number of matrix products, inner width, and tensors of that width kept for autograd."""
    width = getattr(config, "intermediate_size", None)
    if width is None:
        width = int(config.hidden_size * config.mlp_ratio)
        if config.use_swiglu_ffn:  # two thirds, rounded up to a multiple of 8: as `Dinov2SwiGLUFFN` has it
            width = (width * 2 // 3 + 7) // 8 * 8
    if getattr(config, "use_swiglu_ffn", False) or getattr(config, "use_gated_mlp", False):
        return 3, width, 4
    return 2, width, 3 if config.hidden_act == "quick_gelu" else 2  # x * sigmoid(1.702 x) is no single function
