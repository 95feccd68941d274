"""T5, a test-time-training block (arXiv 2605.02772): a small network that takes one step of training on each image.

    f(x) = (silu(x W1) * x W2) W3 per head,   loss = -s sum_j v_j f(k_j) / N,  s = dim^-1/2
    out = f(q) with W - dloss/dW in the place of W

Keys are normalized over the tokens first, (k - mean) / (variance + 1)^1/2, and queries and keys get a depthwise 3x3
convolution added. The step is written out (rate 1, no clipping), so that training passes through it.

Its ViTs have no class token: convolutions leave class token and registers out, which have part in all else. W is drawn
as in its code (normal, 0.02, cut at 2); the convolutions, which are random there, start at zero, without their bias.
Nothing is tied to a grid. ViT^3 (arXiv 2512.01643) is a relative that needs a wider projection, and is left out.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .interface import Counterpart, Sizes, convolve


class T5(Counterpart):
    """Gated inner network, trained by one step on the keys and values of each image."""

    w1: nn.Parameter
    w2: nn.Parameter
    w3: nn.Parameter

    def __init__(self, sizes: Sizes):
        super().__init__(sizes)
        for name in ("w1", "w2", "w3"):
            weight = nn.init.trunc_normal_(torch.empty(sizes.heads, sizes.dim, sizes.dim), std=0.02)
            self.register_parameter(name, nn.Parameter(weight))
        self.query_kernel = nn.Parameter(torch.zeros(1, sizes.heads, sizes.dim, 3, 3))
        self.key_kernel = nn.Parameter(torch.zeros(1, sizes.heads, sizes.dim, 3, 3))

    def trained(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weights after the step, `(batch, heads, dim, dim)` each."""
        one, two, keys = key @ self.w1, key @ self.w2, key.transpose(2, 3)
        error = -value * (self.sizes.dim**-0.5 / key.shape[2])  # of f(k)
        hidden = error @ self.w3.transpose(1, 2)
        gate = one.sigmoid()
        step_1 = keys @ (hidden * two * gate * (1 + one * (1 - gate)))
        step_2 = keys @ (hidden * F.silu(one))
        step_3 = (F.silu(one) * two).transpose(2, 3) @ error
        return self.w1 - step_1, self.w2 - step_2, self.w3 - step_3

    def forward(self, query, key, value, grid, key_mask=None):
        variance, mean = torch.var_mean(key, dim=2, keepdim=True, correction=0)
        key = (key - mean) * torch.rsqrt(variance + 1)
        query = query + convolve(query, self.query_kernel, grid)
        key = key + convolve(key, self.key_kernel, grid)
        w1, w2, w3 = self.trained(key, value)
        return (F.silu(query @ w1) * (query @ w2)) @ w3
