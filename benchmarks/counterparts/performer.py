"""Performer, FAVOR+ (arXiv 2009.14794, eq. 5 with the positive random features of lemma 1).

    phi(x) = m^-1/2 (exp(w_f x' - |x'|^2 / 2 - c) + 1e-4),  f = 1 .. m,  x' = x / dim^(1/4)

with rows w_f that are orthogonal in blocks of dim and as long as Gaussian ones, m = dim ln(dim), and a stabilizer c:
the largest exponent of a query, or of all keys. Nothing is tied to a grid.

Left out: redrawing w during training, because a checkpoint needs one map; w is drawn once per layer and frozen. The
stabilizer is taken of the whole exponent and not of w x' alone, so that 1e-4 is relative to the largest feature also
where queries and keys are long, as in a trained ViT.
"""

import math

import torch
from torch import Tensor

from .interface import MappedCounterpart, Sizes


class Performer(MappedCounterpart):
    """Positive orthogonal random features, frozen.

    Args:
        sizes (`Sizes`): Of the layer.
        features (`int`, *optional*): Number m. Default: dim ln(dim), as in its first implementations.
    """

    projection: Tensor

    def __init__(self, sizes: Sizes, features: int | None = None):
        super().__init__(sizes)
        features = features or int(sizes.dim * math.log(sizes.dim))
        blocks = [_orthogonal(sizes.dim) for _ in range(-(-features // sizes.dim))]
        lengths = torch.randn(features, sizes.dim).norm(dim=1, keepdim=True)
        self.register_buffer("projection", torch.cat(blocks)[:features] * lengths)

    def features(self, query, key, grid, key_mask):
        query, key = self.exponents(query), self.exponents(key)
        if key_mask is not None:
            key = key.masked_fill(~key_mask[:, None, :, None], torch.finfo(key.dtype).min)
        query, key = query - query.amax(dim=3, keepdim=True), key - key.amax(dim=(2, 3), keepdim=True)
        return tuple((x.exp() + 1e-4) * len(self.projection) ** -0.5 for x in (query, key))

    def exponents(self, x: Tensor) -> Tensor:
        x = x * self.sizes.dim**-0.25
        return x @ self.projection.T - x.square().sum(dim=3, keepdim=True) / 2


def _orthogonal(size: int) -> Tensor:
    """Return a random rotation or reflection, all of them alike: LAPACK fixes the signs of Q by those of its input."""
    q, r = torch.linalg.qr(torch.randn(size, size))
    return q * r.diagonal().sign()
