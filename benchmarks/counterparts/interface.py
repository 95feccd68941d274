"""The attention implementation "counterpart": rivals in the place of a student's linear attention.

A rival is a module that takes query, key and value `(batch, heads, tokens, dim)`, in float32 or float64, and the patch
grid. `attach` puts one into every linear layer as its `feature_map`, so that the trainers train its parameters, and so
that a layer whose `feature_map` is None keeps softmax, as in any student. Rivals start from the teacher's projections;
what they add starts neutral where its paper leaves that open.

The tokens before the patches (class token, registers) attend and are attended to like any other, unless a rival says
otherwise; convolutions leave them out.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from modeling_adala.attention_interface import (
    adala_attention_forward,
    adala_attention_mask,
    convolve_depthwise,
    give_patch_grid,
)
from modeling_adala.errors import UsageError
from modeling_adala.families import get_family
from modeling_adala.feature_maps import FeatureMap, accumulation_dtype
from modeling_adala.inspection.towers import attention_modules, vision_tower
from modeling_adala.linear_attention import linear_attention
from modeling_adala.mixins import num_special_tokens

NAME = "counterpart"
Grid = tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """Sizes of an attention layer: heads and their width, rows and columns of patches, and the tokens before them."""

    heads: int
    dim: int
    grid: Grid
    special: int


class Counterpart(nn.Module):
    """Base of the rivals.

    Args:
        sizes (`Sizes`): Of the layer. Those with `fixed_grid` work for this patch grid alone.
    """

    takes_mask = False
    fixed_grid = False

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes = sizes

    def forward(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, key_mask: Tensor | None = None) -> Tensor:
        """Return `(batch, heads, tokens, dim)`. `key_mask` is `(batch, tokens)`, True for real tokens."""
        raise NotImplementedError


class MappedCounterpart(Counterpart):
    """Base of the rivals that are a feature map: their features in our operator, `linear_attention`."""

    takes_mask = True
    eps = 1e-6

    def features(self, query: Tensor, key: Tensor, grid: Grid, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the non-negative features of queries and keys."""
        raise NotImplementedError

    def forward(self, query, key, value, grid, key_mask=None):
        return attend(*self.features(query, key, grid, key_mask), value, key_mask, self.eps)


class _AsItIs(FeatureMap):
    nonlinearity = "identity"


def attend(phi_q: Tensor, phi_k: Tensor, value: Tensor, key_mask: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Return linear attention of features that are there already."""
    return linear_attention(phi_q, phi_k, value, _AsItIs(1, 1), key_mask, eps)


def convolve(x: Tensor, kernel: Tensor, grid: Grid) -> Tensor:
    """Return a depthwise convolution over the patches of `(batch, heads, tokens, dim)`, zero before them.

    `kernel` is `(batch or 1, heads or 1, dim, side, side)`: one for all images, or one each.
    """
    (_, heads, _, dim), special = x.shape, x.shape[2] - math.prod(grid)
    image = x.transpose(1, 2)[:, special:].flatten(2).unflatten(1, grid)
    mixed = convolve_depthwise(image, kernel.expand(-1, heads, -1, -1, -1).flatten(1, 2)[:, :, None])
    return F.pad(mixed.flatten(1, 2).unflatten(2, (heads, dim)).transpose(1, 2), (0, 0, special, 0))


class Gate(nn.Linear):
    """Factor on each channel of the output, one at first.

    Papers compute it from the block's input. Here it is linear in the queries of all heads, which are linear in that.
    """

    def __init__(self, sizes: Sizes):
        super().__init__(sizes.heads * sizes.dim, sizes.heads * sizes.dim)
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.bias)

    def forward(self, query: Tensor) -> Tensor:
        factor = super().forward(query.transpose(1, 2).flatten(2))
        return factor.unflatten(2, (query.shape[1], -1)).transpose(1, 2)


def attach(student: PreTrainedModel, rival: type[Counterpart], grid: Grid, *, seed: int = 0, **options: Any) -> None:
    """Replace the attention of a student's linear layers by a rival, with random numbers of its own.

    Args:
        student (`PreTrainedModel`): As `convert` returns it, without local mixing.
        rival (`type[Counterpart]`): Class to build for each layer.
        grid (`tuple[int, int]`): Rows and columns of patches that it is trained on.
        seed (`int`): Of initial and of frozen values.
        options: Of the rival.

    Raises:
        UsageError: For a family whose attention modules are not told the patch grid (SigLIP).
    """
    tower: Any = vision_tower(student)
    family = get_family(tower.config.model_type)
    if family.packed or not family.passes_kwargs:
        raise UsageError(f"{family.stock} does not tell its attention modules the patch grid; convert another family.")
    AttentionInterface.register(NAME, counterpart_attention_forward)
    AttentionMaskInterface.register(NAME, adala_attention_mask)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: Any
        for module in attention_modules(student):
            if module.feature_map is not None:
                heads, special = tower.config.num_attention_heads, num_special_tokens(tower.config)
                module.feature_map = rival(Sizes(heads, module.head_dim, grid, special), **options)
    tower.register_forward_pre_hook(give_patch_grid, with_kwargs=True)
    student.set_attn_implementation(NAME)


def counterpart_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    patch_grid: Grid | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return `(batch, tokens, heads, dim)` of a layer's rival, in float32 and without autocast like our own operator.

    Raises:
        UsageError: For a mask that the rival does not take, or for another grid than the one that it is tied to.
    """
    rival: Any = module.feature_map
    if not isinstance(rival, Counterpart):  # a softmax layer
        return adala_attention_forward(module, query, key, value, attention_mask, patch_grid=patch_grid, **kwargs)
    name = type(rival).__name__
    if patch_grid is None or (rival.fixed_grid and patch_grid != rival.sizes.grid):
        raise UsageError(f"{name} is built for patch_grid={rival.sizes.grid} and gets {patch_grid}; build it anew.")
    if attention_mask is not None and not rival.takes_mask:
        raise UsageError(f"{name} takes no attention_mask; pass images of one size.")
    key_mask = None if attention_mask is None else attention_mask[:, 0, 0]
    dtype = accumulation_dtype(query)
    with torch.autocast(query.device.type, enabled=False):
        output = rival(*(x.to(dtype) for x in (query, key, value)), patch_grid, key_mask)
    return output.transpose(1, 2).to(value.dtype), None
