"""Nystromformer (arXiv 2102.03902): softmax through landmarks.

    out = softmax(s Q K~^T) Z softmax(s Q~ K^T) V + DWC(V),  Z ~ softmax(s Q~ K~^T)^-1,  s = dim^-1/2

with six steps of the paper's iteration for the pseudo-inverse, Z <- Z/4 (13 - A Z (15 - A Z (7 - A Z))), from the
transpose over the largest column sum of each head and image. DWC is its convolution over the sequence, 65 tokens wide
with a kernel per head, zero at first.

Landmarks are means of segments of a text. Here they are means over a coarser grid of patches, at most 7x7, and class
token and registers as they are. Nothing is tied to a grid, but cells of the coarse grid overlap where it does not
divide the patches. Nothing is left out.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .interface import Counterpart, Grid, Sizes


class Nystromformer(Counterpart):
    """Nystrom approximation of softmax attention."""

    side, steps, width = 7, 6, 65

    def __init__(self, sizes: Sizes):
        super().__init__(sizes)
        self.kernel = nn.Parameter(torch.zeros(sizes.heads, 1, self.width, 1))

    def landmarks(self, x: Tensor, grid: Grid) -> Tensor:
        special = x.shape[2] - grid[0] * grid[1]
        image = x[:, :, special:].transpose(2, 3).flatten(0, 1).unflatten(2, grid)
        pooled = F.adaptive_avg_pool2d(image, (min(self.side, grid[0]), min(self.side, grid[1])))
        return torch.cat((x[:, :, :special], pooled.flatten(2).transpose(1, 2).unflatten(0, x.shape[:2])), dim=2)

    def inverse(self, weights: Tensor) -> Tensor:
        identity = torch.eye(weights.shape[-1], device=weights.device, dtype=weights.dtype)
        inverse = weights.transpose(2, 3) / weights.sum(dim=2).amax(dim=2)[..., None, None]
        for _ in range(self.steps):
            product = weights @ inverse
            inverse = inverse / 4 @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product)))
        return inverse

    def forward(self, query, key, value, grid, key_mask=None):
        query = query * self.sizes.dim**-0.5
        few_queries, few_keys = self.landmarks(query, grid), self.landmarks(key, grid)
        left = (query @ few_keys.transpose(2, 3)).softmax(dim=3)
        middle = (few_queries @ few_keys.transpose(2, 3)).softmax(dim=3)
        right = (few_queries @ key.transpose(2, 3)).softmax(dim=3)
        local = F.conv2d(value, self.kernel, padding=(self.width // 2, 0), groups=value.shape[1])
        return left @ (self.inverse(middle) @ (right @ value)) + local
