"""InLine, injective linear attention (arXiv 2412.06590, eq. 5): subtraction in the place of the normalizer.

    A_ij = (s q_i k_j + 1 - s q_i mean(k)) / N,  s = dim^-1/2,  out = A V + DWC_3x3(V)

Rows sum to one and weights may be negative. The kernel of the convolution is made of the image: two layers per head
with a GELU between them. They get the mean of the values here, and the mean of the block's input, of which that is a
projection, in its code. The second layer starts at zero (PyTorch's default there), so that there is no kernel at
first. The convolution leaves class token and registers out, as its code does. Nothing is tied to a grid.

Left out: nothing else.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .interface import Counterpart, Sizes, convolve


class InLine(Counterpart):
    """Linear attention with subtractive normalization, and a convolution whose kernel depends on the image."""

    def __init__(self, sizes: Sizes):
        super().__init__(sizes)
        heads, dim = sizes.heads, sizes.dim
        self.first = nn.Parameter(torch.empty(heads, dim, dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.first_bias = nn.Parameter(torch.empty(heads, dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.second = nn.Parameter(torch.zeros(heads, dim, 9 * dim))
        self.second_bias = nn.Parameter(torch.zeros(heads, 9 * dim))

    def kernel(self, mean: Tensor) -> Tensor:
        """Return `(batch, heads, dim, 3, 3)` for means `(batch, heads, dim)`."""
        hidden = F.gelu(torch.einsum("bhd,hde->bhe", mean, self.first) + self.first_bias)
        kernel = torch.einsum("bhd,hde->bhe", hidden, self.second) + self.second_bias
        return kernel.unflatten(2, (-1, 3, 3))

    def forward(self, query, key, value, grid, key_mask=None):
        query = query * self.sizes.dim**-0.5
        key_mean, value_mean = (x.mean(dim=2, keepdim=True) for x in (key, value))
        state = key.transpose(2, 3) @ value / key.shape[2]
        output = query @ state + (1 - query @ key_mean.transpose(2, 3)) * value_mean
        return output + convolve(value, self.kernel(value_mean[:, :, 0]), grid)
