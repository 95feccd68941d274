"""LoLCATs (arXiv 2410.10254): softmax in a window, linear attention outside of it, under one normalizer.

    out_i = (g sum_W exp(s_ij - m_i) v_j + sum_rest phi(q_i) phi(k_j) v_j) / (the same without v)

with scores s = q k / dim^1/2, m_i the largest in the window W of query i, g = sigmoid(w) learned per head and 0.1 at
first, and phi Hedgehog's learned map from the identity.

Its window is the 64 tokens before a query, of text. Here blocks of 4x4 queries see the 8x8 patches around them, of
which those beyond the border are missing, and class token and registers are in all windows: patches see them with
softmax, and they see all tokens with softmax (global tokens, O(N) each). Nothing is tied to a grid. Left out: its
causal masks, and factors on the linear part (off in its code).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling_adala.feature_maps import HedgehogFeatureMap

from .interface import Counterpart, Grid, Sizes

BLOCK, REACH = 4, 2


class LoLCATs(Counterpart):
    """Linear attention plus a softmax window."""

    def __init__(self, sizes: Sizes):
        super().__init__(sizes)
        self.map = HedgehogFeatureMap(sizes.heads, sizes.dim)
        self.factor = nn.Parameter(torch.full((sizes.heads, 1, 1, 1), -2.197))

    def forward(self, query, key, value, grid, key_mask=None):
        special = query.shape[2] - grid[0] * grid[1]
        phi_q, phi_k = self.map(query, key)
        state, total = phi_k.transpose(2, 3) @ value, phi_k.sum(dim=2)[..., None]
        own, is_own = (x.to(query.device) for x in windows(grid, 0, 0))
        near, is_near = (x.to(query.device) for x in windows(grid, REACH, special))
        queries, phi_queries = (x[:, :, special:][:, :, own] for x in (query, phi_q))
        keys, phi_keys, values = (x[:, :, near] for x in (key, phi_k, value))
        scores = queries @ keys.transpose(3, 4) * self.sizes.dim**-0.5
        scores = scores.masked_fill(~is_near[:, None], -torch.inf)
        softmax = torch.exp(scores - scores.amax(dim=4, keepdim=True))
        # the sums over all tokens have those of the window in them, whose share is taken out again
        weights = self.factor.sigmoid() * softmax - (phi_queries @ phi_keys.transpose(3, 4)) * is_near[:, None]
        output = weights @ values + phi_queries @ state[:, :, None]
        output = output / (weights.sum(dim=4, keepdim=True) + phi_queries @ total[:, :, None])
        of_special = F.scaled_dot_product_attention(query[:, :, :special], key, value)
        in_order = is_own.flatten().nonzero()[:, 0][own[is_own].argsort()]
        return torch.cat((of_special, output.flatten(2, 3)[:, :, in_order]), dim=2)


def windows(grid: Grid, reach: int, special: int) -> tuple[Tensor, Tensor]:
    """Return the tokens in the window of each block, `(blocks, places)`, and which of these places are inside."""
    rows, columns = (torch.arange(0, size, BLOCK)[:, None] + torch.arange(-reach, BLOCK + reach) for size in grid)
    rows, columns = rows[:, None, :, None], columns[None, :, None, :]
    inside = ((rows >= 0) & (rows < grid[0]) & (columns >= 0) & (columns < grid[1])).flatten(2).flatten(0, 1)
    tokens = (special + rows * grid[1] + columns).flatten(2).flatten(0, 1).where(inside, 0)
    before = torch.arange(special).expand(len(tokens), -1)
    return torch.cat((tokens, before), dim=1), torch.cat((inside, torch.ones_like(before, dtype=torch.bool)), dim=1)
