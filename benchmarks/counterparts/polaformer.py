"""PolaFormer (arXiv 2501.15061): signs apart, and same-signed and opposite pairs on half of the values each.

    x+ = relu(x)^p, x- = relu(-x)^p,  p = 1 + 4 sigmoid(w),  x = q / softplus(s), k / softplus(s)
    out = ([q+, q-] [k+, k-]^T V_1,  [q-, q+] [k+, k-]^T V_2) + DWC_5x5(V),  times a gate

with a normalizer for each half. w and s are learned per channel and zero at first: p = 3.

Tied to the grid: a learned position of each patch, zero at first, added to its key. Class token and registers have
none. The convolution (a kernel per channel of a head, which heads share) starts at zero and the gate at one, which its
code leaves to chance; see `Gate` for what it is computed from. The bias of the convolution is left out.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .interface import Counterpart, Gate, Sizes, attend, convolve


class PolaFormer(Counterpart):
    """Polarity-aware linear attention."""

    fixed_grid = True

    def __init__(self, sizes: Sizes):
        super().__init__(sizes)
        patches = sizes.grid[0] * sizes.grid[1]
        self.scale = nn.Parameter(torch.zeros(sizes.heads, 1, sizes.dim))
        self.power = nn.Parameter(torch.zeros(sizes.heads, 1, sizes.dim))
        self.position = nn.Parameter(torch.zeros(sizes.heads, patches, sizes.dim))
        self.kernel = nn.Parameter(torch.zeros(1, 1, sizes.dim, 5, 5))
        self.gate = Gate(sizes)

    def polarize(self, x: Tensor) -> Tensor:
        x = x / F.softplus(self.scale)
        power = 1 + 4 * self.power.sigmoid()
        return torch.cat((x.relu() ** power, (-x).relu() ** power), dim=3)

    def forward(self, query, key, value, grid, key_mask=None):
        key = key + F.pad(self.position, (0, 0, key.shape[2] - self.position.shape[1], 0))
        phi_q, phi_k = self.polarize(query), self.polarize(key)
        first, second = value.chunk(2, dim=3)
        opposite = phi_q.roll(query.shape[3], dims=3)
        mixed = torch.cat((attend(phi_q, phi_k, first), attend(opposite, phi_k, second)), dim=3)
        return (mixed + convolve(value, self.kernel, grid)) * self.gate(query)
