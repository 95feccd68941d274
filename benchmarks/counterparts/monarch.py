"""MonarchAttention (arXiv 2505.18698): softmax in the form of a Monarch matrix, by alternating maximization.

Tokens are M blocks of B. The weight of key i of block k for query j of block l is L[j, l, k] R[k, j, i]: which block,
and where in it, whichever block asks. Softmax maximizes <A, s Q K^T> + entropy(A) over all A; here, A has this form,
and its factors are found in turns:

    R[k, j] = softmax_i(s a_r[k, j] K[k, i] / c_r[k, j]),  a_r[k, j] = sum_l L[j, l, k] Q[l, j],  c_r = sum_l L
    L[j, l] = softmax_k(Q[l, j] a_l[k, j] - c_l[k, j]),    a_l = s R K,  c_l = sum_i R log R

from a_r = Q, c_r = 1. No parameters; the cost grows with N^1.5. Nothing is tied to a grid: a block is a row of
patches, and the blocks before them hold class token and registers, filled up at the front (as in the paper's ViT).
Queries and keys that fill up have no part in the sums. Nothing is left out. Two turns; the paper's ViT takes one to
three.
"""

import torch
from torch.nn import functional as F

from .interface import Counterpart


class Monarch(Counterpart):
    """Monarch approximation of softmax attention."""

    steps = 2

    def forward(self, query, key, value, grid, key_mask=None):
        filled = -query.shape[2] % grid[1]
        # (batch, heads, block, place, dim)
        q, k, v = (F.pad(x, (0, 0, filled, 0)).unflatten(2, (-1, grid[1])) for x in (query, key, value))
        q = q * self.sizes.dim**-0.5
        is_real = torch.arange(q.shape[2] * q.shape[3], device=q.device).unflatten(0, q.shape[2:4]) >= filled
        a, c = q, 1.0
        for left in reversed(range(self.steps)):
            # no weight at all, but finite: its logarithm has a gradient
            scores = ((a / c) @ k.transpose(3, 4)).masked_fill(~is_real[:, None, :], -1e9)
            log_places = scores.log_softmax(dim=4)
            places = log_places.exp()
            entropy = -(places * log_places).sum(dim=4)
            scores = torch.einsum("...ljd,...kjd->...jlk", q, places @ k) + entropy.transpose(2, 3)[..., None, :]
            blocks = scores.softmax(dim=4)
            if left:
                weights = blocks * is_real.T[:, :, None]
                a = torch.einsum("...jlk,...ljd->...kjd", weights, q)
                c = weights.sum(dim=3).transpose(2, 3)[..., None].clamp(min=1e-12)
        output = torch.einsum("...jlk,...kjd->...ljd", blocks, places @ v)
        return output.flatten(2, 3)[:, :, filled:]
