"""Focused linear attention, FLatten (arXiv 2308.00442): features that point along the largest channels.

    phi(x) = |x'| x'^3 / |x'^3|,  x' = (relu(x) + 1e-6) / softplus(s),  out = phi(Q) phi(K)^T V + DWC_5x5(V)

with norms over the channels of all heads, and the power 3 of the paper. s is learned per channel and zero at first.

Tied to the grid: a learned position of each patch, zero at first, added to its key. Class token and registers have
none. The convolution has a kernel per channel of a head, which heads share; it starts at zero (PyTorch's default in
its code), so that conversion changes the weights of the tokens alone. Its bias is left out.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .interface import MappedCounterpart, Sizes, convolve


class Focused(MappedCounterpart):
    """Focused features, positions of the keys, and a depthwise convolution of the values."""

    takes_mask = False
    fixed_grid = True

    def __init__(self, sizes: Sizes):
        super().__init__(sizes)
        patches = sizes.grid[0] * sizes.grid[1]
        self.scale = nn.Parameter(torch.zeros(sizes.heads, 1, sizes.dim))
        self.position = nn.Parameter(torch.zeros(sizes.heads, patches, sizes.dim))
        self.kernel = nn.Parameter(torch.zeros(1, 1, sizes.dim, 5, 5))

    def features(self, query, key, grid, key_mask):
        key = key + F.pad(self.position, (0, 0, key.shape[2] - self.position.shape[1], 0))
        return self.focus(query), self.focus(key)

    def focus(self, x: Tensor) -> Tensor:
        x = (x.relu() + 1e-6) / F.softplus(self.scale)
        cube = x**3
        return cube * (x.norm(dim=(1, 3), keepdim=True) / cube.norm(dim=(1, 3), keepdim=True))

    def forward(self, query, key, value, grid, key_mask=None):
        return super().forward(query, key, value, grid) + convolve(value, self.kernel, grid)
