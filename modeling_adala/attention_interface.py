"""The attention implementation `"adala"` of Transformers, and its masks."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from .configuration_adala import pair
from .errors import UsageError
from .feature_maps import EluFeatureMap, FeatureMap
from .linear_attention import attention_weights, linear_attention
from .upstream import bidirectional_mask_function, init, repeat_kv

_PLAIN_FEATURE_MAP = EluFeatureMap(num_heads=1, head_dim=1)
# bias, cap and sinks of the scores, windows, packing, selected keys: a linear form has no place for them
_SOFTMAX_ONLY = ("position_bias", "softcap", "s_aux", "sliding_window", "cu_seq_lens_q", "indices", "block_indices")


def feature_map_of(module: nn.Module) -> FeatureMap | None:
    """Return phi of a module: its `feature_map` (`None`: it keeps softmax), or plain elu+1 in a stock module."""
    return getattr(module, "feature_map", _PLAIN_FEATURE_MAP)


def is_new_parameter(name: str) -> bool:
    """Return whether a parameter of an AdaLA model has no counterpart in its teacher, by the name of its module."""
    return ".feature_map." in name or ".local_mixing." in name


class LocalMixing(nn.Module):
    """Depthwise convolution of the values over the patch grid, zero at first, which is added to what attention gives.

    Linear attention loses locality first. With `dynamic`, two small layers add a kernel of the image's own, made of
    the mean of its patches, as in JetViT (arXiv 2605.26636, eq. 3 and 4).
    """

    def __init__(self, channels: int, kernel_size: int, dynamic: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, kernel_size, kernel_size))
        self.dynamic = dynamic
        if dynamic:
            hidden = mixing_width(channels)
            self.squeeze = nn.Parameter(torch.empty(hidden, channels))
            self.expand = nn.Parameter(torch.empty(channels * kernel_size**2, hidden))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        init.zeros_(self.weight)
        if self.dynamic:
            init.normal_(self.squeeze, std=self.squeeze.shape[1] ** -0.5)
            init.zeros_(self.expand)

    def forward(self, value: Tensor, grid: tuple[int, int] | Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Return `(batch, patches, heads, dim)` for values `(batch, heads, tokens, dim)`, whose last are the patches.

        `grid` are their rows and columns, of images that were padded to one length a tensor `(batch, 2)`.
        """
        if key_mask is not None:
            value = value.masked_fill(~key_mask[:, None, :, None], 0)
        if isinstance(grid, Tensor):
            return self._of_packed(value, grid.to(value.device))
        (batch, heads, tokens, dim), (rows, columns) = value.shape, grid
        image, mean = value.transpose(1, 2)[:, tokens - rows * columns :].flatten(2).unflatten(1, grid), None
        if self.dynamic:
            count = rows * columns if key_mask is None else key_mask[:, tokens - rows * columns :].sum(1)[:, None]
            mean = image.sum(dim=(1, 2)) / count
        convolve = _shifted if self.dynamic and torch.compiler.is_exporting() else convolve_depthwise
        return convolve(image, self._kernel(mean)).reshape(batch, rows * columns, heads, dim)

    def _kernel(self, mean: Tensor | None) -> Tensor:
        """Return `(images or 1, channels, 1, side, side)`; dynamic ones need the mean patch, `(images, channels)`."""
        kernel = self.weight[None]
        if mean is None:
            return kernel
        own = nn.functional.linear(nn.functional.silu(nn.functional.linear(mean, self.squeeze)), self.expand)
        return kernel + own.unflatten(1, self.weight.shape)

    def _of_packed(self, value: Tensor, grids: Tensor) -> Tensor:
        _, heads, tokens, dim = value.shape
        index, (rows, columns) = torch.arange(tokens, device=value.device), grids[..., None].unbind(1)
        row, column = index // columns, index % columns
        reach, output = self.weight.shape[-1] // 2, torch.zeros_like(value)
        mean = None
        if self.dynamic:
            real = value.transpose(1, 2).flatten(2) * (row < rows)[..., None]
            mean = real.sum(dim=1) / grids.prod(dim=1)[:, None]
        for place, weight in enumerate(_places(self._kernel(mean), value.dtype)):
            up, left = (offset - reach for offset in divmod(place, self.weight.shape[-1]))
            inside = (row < rows) & (row + up >= 0) & (row + up < rows)
            inside = inside & (column + left >= 0) & (column + left < columns)
            neighbor = (index + up * columns + left).clamp(0, tokens - 1)[:, None, :, None].expand_as(value)
            weight = weight.unflatten(1, (heads, 1, dim))
            output = output + weight * value.gather(2, neighbor) * inside[:, None, :, None]
        return output.transpose(1, 2)


def mixing_width(channels: int) -> int:
    """Return the hidden width of the layers that make dynamic kernels."""
    return max(channels // 16, 1)


def convolve_depthwise(image: Tensor, kernel: Tensor) -> Tensor:
    """Return the convolution of `(batch, rows, columns, channels)` with `(batch or 1, channels, 1, side, side)`.

    Images with kernels of their own are channels of one image. Channels come last, as the projection wrote them: half
    the time of channels first on a CPU.
    """
    image = batch = image.permute(0, 3, 1, 2)
    if kernel.shape[0] > 1:
        image = batch.flatten(0, 1)[None]
    mixed = nn.functional.conv2d(image, kernel.flatten(0, 1), padding=kernel.shape[-1] // 2, groups=image.shape[1])
    return mixed.view(batch.shape).permute(0, 2, 3, 1)


def _shifted(image: Tensor, kernel: Tensor) -> Tensor:
    """Convolve likewise by products with shifted images: exported graphs have a fixed number of groups."""
    (_, rows, columns, _), side = image.shape, kernel.shape[-1]
    padded, mixed = nn.functional.pad(image, (0, 0, *[side // 2] * 4)), torch.zeros_like(image)
    for place, weight in enumerate(_places(kernel, image.dtype)):
        row, column = divmod(place, side)
        mixed = torch.addcmul(mixed, padded[:, row : row + rows, column : column + columns], weight[:, None, None])
    return mixed


def _places(kernel: Tensor, dtype: torch.dtype) -> Tensor:
    """Return kernels as `(side^2, images or 1, channels)`."""
    return kernel.flatten(2).permute(2, 0, 1).to(dtype)


def patch_grid(config: Any, pixel_values: Tensor) -> tuple[int, int]:
    """Return rows and columns of patches in an image batch `(batch, channels, height, width)`."""
    patch = pair(config.patch_size)
    return pixel_values.shape[-2] // patch[0], pixel_values.shape[-1] // patch[1]


def give_patch_grid(tower: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of a vision tower that tells its attention modules the rows and columns of patches."""
    pixels = args[0] if args else kwargs["pixel_values"]
    if pixels.ndim == 4:
        grid: Any = patch_grid(tower.config, pixels)
    else:  # packed patches (NaFlex)
        grid = args[2] if len(args) > 2 else kwargs["spatial_shapes"]
    return args, kwargs | {"patch_grid": grid}


def note_arguments(module: Any, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of attention modules that hand no arguments on to the attention interface (SigLIP, 5.24)."""
    asked = bool(kwargs.get("output_attentions", False))
    if module.output_attentions_noted != asked:  # no side effect that a tracer would record
        module.output_attentions_noted = asked
    if hasattr(module, "local_mixing"):
        module.patch_grid_noted = kwargs.get("patch_grid")


def adala_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Return `(batch, tokens, heads, head_dim)` and, if asked, the weights: attention interface `"adala"`.

    phi is that of `feature_map_of`. Keys and values may have fewer heads than queries. `scaling` belongs to softmax,
    `dropout` to a weight matrix that linear attention never forms; both act in softmax layers only.

    Raises:
        UsageError: for a mask that is not a key-padding mask, causal attention, or an argument of `_SOFTMAX_ONLY`.
    """
    for name in _SOFTMAX_ONLY:
        if kwargs.get(name) is not None:
            raise _cannot_honor(module, f"is given {name}")
    # the rule of "sdpa": a module that says nothing is causal, unless a mask says who sees whom
    if is_causal or (is_causal is None and attention_mask is None and getattr(module, "is_causal", True)):
        raise _cannot_honor(module, "attends causally")
    key_mask = _key_padding_mask(module, attention_mask, key.shape[2])
    key, value = (repeat_kv(x, query.shape[1] // key.shape[1]) for x in (key, value))
    feature_map = feature_map_of(module)
    if query.shape[0] != key.shape[0] and query.shape[0] == 1:  # learned queries, which the batch shares
        query = query.expand(key.shape[0], -1, -1, -1)
    config = getattr(module, "config", None)
    want_weights = kwargs.get("output_attentions", getattr(config, "output_attentions", False))
    want_weights = want_weights or getattr(module, "output_attentions_noted", False)
    if feature_map is None:
        return _softmax_attention(query, key, value, key_mask, dropout, scaling, want_weights)
    backend = getattr(config, "backend", None)
    output = linear_attention(query, key, value, feature_map, key_mask, backend=backend).transpose(1, 2)
    mixing: Any = getattr(module, "local_mixing", None)
    if mixing is not None:
        grid = kwargs.get("patch_grid", getattr(module, "patch_grid_noted", None))
        if grid is None:
            raise UsageError(f"{type(module).__name__} mixes over patches; pass it patch_grid=(rows, columns).")
        mixed = mixing(value, grid, key_mask)
        output[:, output.shape[1] - mixed.shape[1] :] += mixed
    return output, attention_weights(query, key, feature_map, key_mask).to(query.dtype) if want_weights else None


def _softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    want_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    mask = None if key_mask is None else key_mask[:, None, None, :].expand(-1, 1, query.shape[2], -1)
    output = nn.functional.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)
    output, weights = output.transpose(1, 2).contiguous(), None
    if want_weights:
        scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = scores if mask is None else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1).to(query.dtype)
    return output, weights


def adala_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args,
    mask_function=bidirectional_mask_function,
    attention_mask: Tensor | None = None,
    config=None,
    **kwargs,
) -> Tensor | None:
    """Return the key-padding mask as bool, `(batch, 1, 1, tokens)`, or `None`: mask function of `"adala"`.

    Without one registered, Transformers would drop the user's mask without a word. Unlike `flash_attention_mask` this
    never looks at the values, so that it compiles and exports. Causal, window and block masks raise a `UsageError`.
    """
    if mask_function is not bidirectional_mask_function:
        raise _cannot_honor(config, "asks for a causal, window or block mask")
    # four axes: SigLIP 2's pooling head attends with softmax and repeats the mask over heads and queries
    return None if attention_mask is None else attention_mask[:, None, None, -kv_length:].to(torch.bool)


def _key_padding_mask(module: nn.Module, mask: Tensor | None, tokens: int) -> Tensor | None:
    """Return `(batch, tokens)` of a key-padding mask, and refuse one that says more than which keys exist."""
    if mask is None:
        return None
    additive = mask.ndim == 4 and mask.is_floating_point()
    if additive and mask.shape[1] == 1 < mask.shape[2] and not mask.requires_grad and not mask.any():
        return None  # Pixtral's block mask of a single image: zeros, nothing to honor
    if mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1:
        mask = mask[:, 0, 0]
    if mask.ndim != 2 or mask.shape[-1] != tokens:
        what = f"attention_mask of shape {tuple(mask.shape)}, a bias or block mask and no key-padding mask"
        raise _cannot_honor(module, f"is given an {what} of {tokens} keys")
    if not mask.is_floating_point():
        return mask.to(torch.bool)
    keep, drop = (mask == 0, mask <= -1000) if additive else (mask == 1, mask == 0)  # exp(-1000) is 0 in float64
    if not (keep | drop).all():
        raise _cannot_honor(module, f"is given an attention_mask of {mask.dtype} that is a bias, no key-padding mask")
    return keep


# Without a mask function of that name, Transformers drops a user's mask without a word.
AttentionInterface.register("adala", adala_attention_forward)
AttentionMaskInterface.register("adala", adala_attention_mask)


def _cannot_honor(who: object, what: str) -> UsageError:
    return UsageError(
        f"{type(who).__name__} {what}, which linear attention cannot honor; use attn_implementation='sdpa' there"
        " (one tower of several: {'vision_config': 'adala', 'text_config': 'sdpa'})."
    )
