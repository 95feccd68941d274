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
        queries, phi_queries = (windows(x[:, :, special:], grid, 0) for x in (query, phi_q))
        keys, phi_keys, values = (_with_special(x, grid, special) for x in (key, phi_k, value))
        is_real = _with_special(torch.ones_like(key[:1, :1, :, :1]), grid, special).transpose(3, 4) > 0
        scores = (queries @ keys.transpose(3, 4) * self.sizes.dim**-0.5).masked_fill(~is_real, -torch.inf)
        softmax = torch.exp(scores - scores.amax(dim=4, keepdim=True))
        # the sums over all tokens have those of the window in them, whose share is taken out again
        weights = self.factor.sigmoid() * softmax - (phi_queries @ phi_keys.transpose(3, 4)) * is_real
        output = weights @ values + phi_queries @ state[:, :, None]
        output = output / (weights.sum(dim=4, keepdim=True) + phi_queries @ total[:, :, None])
        of_special = F.scaled_dot_product_attention(query[:, :, :special], key, value)
        return torch.cat((of_special, _patches(output, grid)), dim=2)


def windows(x: Tensor, grid: Grid, reach: int) -> Tensor:
    """Return `(batch, heads, blocks, places, dim)` of patches: each block and `reach` around it, zero outside."""
    batch, heads, _, dim = x.shape
    bottom, right = (-size % BLOCK + reach for size in grid)
    image = F.pad(x.transpose(2, 3).reshape(batch, -1, *grid), (reach, right, reach, bottom))
    side = BLOCK + 2 * reach
    return F.unfold(image, side, stride=BLOCK).view(batch, heads, dim, side * side, -1).permute(0, 1, 4, 3, 2)


def _with_special(x: Tensor, grid: Grid, special: int) -> Tensor:
    around = windows(x[:, :, special:], grid, REACH)
    return torch.cat((around, x[:, :, None, :special].expand(-1, -1, around.shape[2], -1, -1)), dim=3)


def _patches(x: Tensor, grid: Grid) -> Tensor:
    """Return `(batch, heads, patches, dim)` of blocks without anything around them."""
    batch, heads, blocks, _, dim = x.shape
    rows, columns = (side + -side % BLOCK for side in grid)
    image = F.fold(x.permute(0, 1, 4, 3, 2).reshape(batch, -1, blocks), (rows, columns), BLOCK, stride=BLOCK)
    return image[:, :, : grid[0], : grid[1]].reshape(batch, heads, dim, -1).transpose(2, 3)
