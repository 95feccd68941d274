"""Position embeddings that are interpolated once per image size, not once per call.

Stock embeddings fit their grid of positions to the image at every forward pass. At a size that comes again and again
that is the same result each time: 5 to 30 ms of a CPU, for nothing. A GPU does it in no time: nothing is kept there.

This file travels with the weights (`trust_remote_code`): torch, transformers and flat siblings only.
"""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .surgery import put_in_front

SIZES = 8
"""How many image sizes a model remembers. At 1,024 px a ViT-B with patches of 16 has 12.6 MB of positions, float32."""


def cache_positions(model: Any) -> None:
    """Makes a stock or an AdaLA model keep its interpolated positions, on a CPU, while no gradients are recorded.

    Results stay the same, bit by bit: positions are interpolated anew when any value of the parameter has changed
    (comparing takes a hundredth of the time). In training, under `torch.compile`, `torch.export` and `torch.jit.trace`
    all is as in the stock model.

    Args:
        model (`nn.Module`): Any model; embeddings that have nothing to interpolate stay as they are (DINOv3's rotary
            positions take less than 1 ms).
    """
    for module in model.modules():
        if hasattr(module, "interpolate_pos_encoding") or hasattr(module, "resize_positional_embeddings"):
            put_in_front(CachedPositions, module)


class CachedPositions:
    """In front of a stock embeddings class. See `cache_positions`."""

    position_embedding: nn.Embedding
    position_embeddings: nn.Parameter

    def interpolate_pos_encoding(self, embeddings, height, width):
        interpolate = super().interpolate_pos_encoding
        if not self._may_cache(embeddings):
            return interpolate(embeddings, height, width)
        key = (embeddings.shape[1:], height, width, _autocast_dtype(embeddings))
        return self._cached(key, partial(interpolate, embeddings, height, width))

    def resize_positional_embeddings(self, positional_embeddings, spatial_shapes, max_length):
        # SigLIP 2: a grid per image, padded to `max_length`
        resize = super().resize_positional_embeddings
        if not self._may_cache(spatial_shapes):
            return resize(positional_embeddings, spatial_shapes, max_length)
        grids, autocast = spatial_shapes.tolist(), _autocast_dtype(positional_embeddings)
        rows = [
            self._cached((*grid, max_length, autocast), partial(resize, positional_embeddings, shape, max_length))
            for grid, shape in zip(grids, spatial_shapes.split(1), strict=True)
        ]
        return torch.cat(rows)

    def _parameter(self) -> Tensor:
        return self.position_embedding.weight if hasattr(self, "position_embedding") else self.position_embeddings

    def _may_cache(self, of_images: Tensor) -> bool:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        positions = self._parameter()
        # stand-ins of tracers have no values
        if type(positions) is not nn.Parameter or type(of_images) is not Tensor or positions.device.type != "cpu":
            return False
        return not (torch.is_grad_enabled() and positions.requires_grad)

    def _cached(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        positions = self._parameter()
        cache = self.__dict__.get("_positions")
        # by value: nothing counts a write through `.data`
        if cache is None or cache.source.dtype != positions.dtype or not torch.equal(cache.source, positions):
            cache = self.__dict__["_positions"] = _Positions(positions)
        result = cache.results.get(key)
        if result is None:
            # an ordinary tensor, of use outside inference mode, too
            with torch.inference_mode(False), torch.no_grad():
                result = cache.results[key] = compute()
            for oldest in list(cache.results)[:-SIZES]:
                cache.results.pop(oldest, None)
        return result


class _Positions:
    """Results for one value of the parameter. Copies and pickles are empty."""

    def __init__(self, positions: Tensor):
        self.source = positions.detach().clone()
        self.results: dict[Hashable, Tensor] = {}

    def __reduce__(self):
        return _Positions, (torch.zeros(0),)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of a product, or `None`: on a CPU it interpolates in float32."""
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return None
    return torch.get_autocast_dtype(device)
