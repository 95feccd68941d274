"""Bounds of the comparison: mixing that looks at nothing, and softmax itself.

The floor is the fixed random Synthesizer (arXiv 2005.00743, "Random", fixed): out = softmax(R) V with a random table R
of standard normal numbers, frozen. Neither content nor place of a token plays a part. Tied to the grid: the table.

The ceiling is the teacher's attention in the place of a rival, trained as the rivals are: what a protocol does to a
student that needs no training.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .interface import Counterpart, Sizes


class RandomMixing(Counterpart):
    """Random frozen weights; queries and keys have no effect."""

    fixed_grid = True
    weights: Tensor

    def __init__(self, sizes: Sizes):
        super().__init__(sizes)
        tokens = sizes.special + sizes.grid[0] * sizes.grid[1]
        self.register_buffer("weights", torch.randn(sizes.heads, tokens, tokens).softmax(dim=2))

    def forward(self, query, key, value, grid, key_mask=None):
        return self.weights @ value


class Softmax(Counterpart):
    """Softmax attention."""

    takes_mask = True

    def forward(self, query, key, value, grid, key_mask=None):
        mask = None if key_mask is None else key_mask[:, None, None]
        return F.scaled_dot_product_attention(query, key, value, mask)
