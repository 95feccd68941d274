"""Pictures of patch features as colors, and of the attention of one patch."""

import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from modeling_adala.attention_interface import adala_attention_forward, feature_map_of
from modeling_adala.configuration_adala import vision_config
from modeling_adala.errors import UsageError
from modeling_adala.inspection.towers import (
    attention_implementation,
    attention_modules,
    forward_features,
    forward_tower,
    patch_size,
    token_groups,
    vision_tower,
)
from modeling_adala.linear_attention import attention_weights
from modeling_adala.mixins import patch_grid

HEADS_PER_ROW = 8
# what lies outside these shares of the values is drawn like the border: a few outliers would take all the contrast
COLOR_RANGE = (0.02, 0.98)
ATTENTION_RANGE = 0.99


@dataclass(frozen=True)
class ColorBasis:
    """First three principal components of features, as red, green and blue.

    Args:
        mean (`Tensor`): `(channels,)`.
        components (`Tensor`): `(channels, 3)`, strongest first.
        low (`Tensor`), high (`Tensor`): `(3,)`, what becomes 0 and 1.
    """

    mean: Tensor
    components: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def fit(cls, features: Tensor) -> Self:
        """Return the basis of `(..., channels)` features."""
        rows = features.flatten(0, -2).double()
        mean = rows.mean(dim=0)
        components = torch.linalg.eigh((rows - mean).T @ (rows - mean)).eigenvectors[:, -3:].flip(1)
        components = components * components.sum(dim=0).sign()  # eigenvectors have no sign of their own
        values = (rows - mean) @ components
        low, high = (values.quantile(share, dim=0) for share in COLOR_RANGE)
        return cls(*(x.float() for x in (mean, components, low, high)))

    def __call__(self, features: Tensor) -> Tensor:
        """Return `(..., channels)` features as `(..., 3)` colors in 0..1."""
        return (((features - self.mean) @ self.components - self.low) / (self.high - self.low)).clamp(0, 1)


@torch.no_grad()
def patch_features(model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """Return the final patch features `(batch, rows, columns, hidden_size)`, in float32 on the CPU."""
    patches = forward_features(model.eval(), pixel_values)[:, token_groups(model.config)["patches"]]
    return patches.float().cpu().unflatten(1, patch_grid(vision_config(model.config), pixel_values))


def check_layer(config: PretrainedConfig, layer: int) -> int:
    """Return the index from 0 of a layer that may be counted from the end.

    Raises:
        UsageError: If the vision tower does not have it.
    """
    layers = vision_config(config).num_hidden_layers
    if not -layers <= layer < layers:
        raise UsageError(f"layer={layer} does not exist; this model has layers 0 to {layers - 1} (-1 is the last).")
    return layer % layers


def check_query(
    config: PretrainedConfig, image_size: tuple[int, int], query: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Return the row and column of a patch; by default, of the one in the middle.

    Raises:
        UsageError: If an image of `image_size`, `(height, width)` in pixels, does not have it.
    """
    rows, columns = (side // patch for side, patch in zip(image_size, patch_size(config), strict=True))
    row, column = query or (rows // 2, columns // 2)
    if not (0 <= row < rows and 0 <= column < columns):
        raise UsageError(
            f"query={row},{column} does not exist; an image of {image_size[0]}x{image_size[1]} has patches 0,0 to"
            f" {rows - 1},{columns - 1} (row,column from the top left)."
        )
    return row, column


@torch.no_grad()
def query_attention(model: PreTrainedModel, pixel_values: Tensor, layer: int, query: tuple[int, int]) -> Tensor:
    """Return the attention weights of one patch, the effective ones where attention is linear.

    The same as that row of `modeling_adala.attention_map`, for stock models, too, and in `O(tokens)`: an
    attention implementation with a tap multiplies this one query with the keys of the layer, while all layers attend
    as usual. The N x N weights exist nowhere.

    Args:
        model (`PreTrainedModel`): A stock or an AdaLA model, with or without a head.
        pixel_values (`Tensor`): `(batch, channels, height, width)`, sides multiples of the patch.
        layer (`int`): Layer index; negative numbers count from the end.
        query (`tuple[int, int]`): Row and column of the patch.

    Returns:
        `Tensor`: `(batch, heads, tokens)`, float32 on the CPU, class token and registers first (see `token_groups`).

    Raises:
        UsageError: For a layer or a patch that does not exist.
    """
    height, width = pixel_values.shape[-2:]
    row, column = check_query(model.config, (height, width), query)
    target = attention_modules(model)[check_layer(model.config, layer)]
    columns = patch_grid(vision_config(model.config), pixel_values)[1]
    token = token_groups(model.config)["patches"].start + row * columns + column
    is_linear = vision_tower(model).config._attn_implementation == "adala"
    state = _tap.set(tap := _Tap(target, token))
    try:
        with attention_implementation(model, _TAPPED["adala" if is_linear else "sdpa"]):
            forward_tower(model.eval(), pixel_values)
    finally:
        _tap.reset(state)
    return cast(Tensor, tap.weights).squeeze(2).float().cpu()


@dataclass
class _Tap:
    """Weights of one query token in one attention module, `(batch, heads, 1, tokens)`, once that module has run."""

    module: nn.Module
    token: int
    weights: Tensor | None = None


_tap: ContextVar[_Tap | None] = ContextVar("tap", default=None)


def _attend_with_tap(
    attend: Callable, module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
) -> Any:
    tap = _tap.get()
    if tap is not None and module is tap.module:
        feature_map = feature_map_of(module) if attend is adala_attention_forward else None
        asking = query[:, :, tap.token : tap.token + 1]
        if feature_map is None:
            tap.weights = (asking @ key.transpose(2, 3) * kwargs["scaling"]).float().softmax(dim=-1)
        else:
            tap.weights = attention_weights(asking, key, feature_map)
    return attend(module, query, key, *args, **kwargs)


_TAPPED = {"adala": "adala_with_tap", "sdpa": "sdpa_with_tap"}
for _name, _tapped in _TAPPED.items():
    AttentionInterface.register(_tapped, partial(_attend_with_tap, AttentionInterface()[_name]))
    AttentionMaskInterface.register(_tapped, AttentionMaskInterface()[_name])


def new_figure(width: float, height: float, **kwargs: Any) -> Any:
    """Return a figure with a size in inches, without `pyplot`, whose backend and figures are the user's."""
    from matplotlib.figure import Figure  # here, because only pictures need it

    return Figure(figsize=(width, height), **kwargs)


def save_figure(figure: Any, path: Path, **kwargs: Any) -> None:
    """Write a figure as PNG. Characters that the font lacks, such as in a file name, are drawn as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, **kwargs)


def draw_colors(path: Path, images: Tensor, colors: dict[str, Tensor]) -> None:
    """Draw one row per image: the image, and the colored features of each model beside it.

    Args:
        path (`Path`): PNG to write.
        images (`Tensor`): `(images, channels, height, width)` in 0..1.
        colors (`dict[str, Tensor]`): `(images, rows, columns, 3)` per title of a column.
    """
    height, width = images.shape[-2:]
    side = 2.6
    size = (side * (len(colors) + 1), side * height / width * len(images) + 0.35)
    figure = new_figure(*size, layout="constrained")
    axes = figure.subplots(len(images), len(colors) + 1, squeeze=False)
    for row, image in zip(axes, images, strict=True):
        _show_image(row[0], image)
    for column, (title, maps) in enumerate(colors.items(), start=1):
        axes[0, column].set_title(title, fontsize=10)
        for row, values in zip(axes, maps, strict=True):
            row[column].imshow(values.numpy())
    axes[0, 0].set_title("image", fontsize=10)
    _save(figure, path)


def draw_attention(path: Path, image: Tensor, query: tuple[int, int], weights: dict[str, Tensor], title: str) -> None:
    """Draw the attention of one patch: the mean over heads of each model in the first row, then head by head.

    Each map is scaled to its own 99th percentile: where attention goes is told by color, how much by no map.

    Args:
        path (`Path`): PNG to write.
        image (`Tensor`): `(channels, height, width)` in 0..1.
        query (`tuple[int, int]`): Row and column of the patch, framed.
        weights (`dict[str, Tensor]`): Of the patches, `(heads, rows, columns)` per title.
        title (`str`): Of the whole picture.
    """
    height, width = image.shape[-2:]
    heads = max(len(maps) for maps in weights.values())
    per_row = min(heads, HEADS_PER_ROW)
    lines, aspect, full_width = -(-heads // per_row), height / width, 11.0
    tall, low = (full_width / n * aspect for n in (len(weights) + 1, per_row))
    heights = [tall + 0.3, *([lines * low + 0.3 + 0.15 * lines] * len(weights))]
    figure = new_figure(full_width, sum(heights) + 0.3, layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)  # a file's name may hold dollars
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
    top, *strips = parts
    axes = top.subplots(1, len(weights) + 1)
    _show_image(axes[0], image)
    _frame(axes[0], image, query, next(iter(weights.values())))
    axes[0].set_title(f"patch {query[0]},{query[1]}", fontsize=10)
    for axis, (name, maps) in zip(axes[1:], weights.items(), strict=True):
        show_weights(axis, image, query, maps.mean(dim=0))
        outside = 1 - maps.sum(dim=(1, 2)).mean().item()
        axis.set_title(name + (f", {outside:.0%} not on patches" if outside > 0.005 else ""), fontsize=10)
    for strip, (name, maps) in zip(strips, weights.items(), strict=True):
        strip.suptitle(name, fontsize=10)
        axes = strip.subplots(lines, per_row, squeeze=False).flat
        for index, axis in enumerate(axes):
            if index < len(maps):
                show_weights(axis, image, query, maps[index])
                axis.set_title(f"head {index}", fontsize=8, pad=2)
    _save(figure, path)


def show_weights(axis: Any, image: Tensor, query: tuple[int, int], weights: Tensor) -> None:
    """Show attention weights `(rows, columns)` over an image, `(channels, height, width)` in 0..1, and frame a patch.

    The weights are scaled to their own 99th percentile.
    """
    height, width = image.shape[-2:]
    axis.imshow(0.6 * image.mean(dim=0).numpy(), cmap="gray", vmin=0, vmax=1)
    heat = (weights / weights.quantile(ATTENTION_RANGE).clamp(min=1e-12)).clamp(0, 1).numpy()
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axis.imshow(
        heat, cmap="inferno", vmin=0, vmax=1, alpha=0.25 + 0.65 * heat, extent=extent, interpolation="bilinear"
    )
    _frame(axis, image, query, weights)


def _frame(axis: Any, image: Tensor, query: tuple[int, int], weights: Tensor) -> None:
    from matplotlib.patches import Rectangle

    height, width = (side / patches for side, patches in zip(image.shape[-2:], weights.shape[-2:], strict=True))
    corner = (query[1] * width - 0.5, query[0] * height - 0.5)
    axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="cyan", linewidth=1.2))


def _show_image(axis: Any, image: Tensor) -> None:
    axis.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)


def _save(figure: Any, path: Path) -> None:
    for axis in figure.get_axes():
        axis.axis("off")
    save_figure(figure, path, dpi=150)
