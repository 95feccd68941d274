"""LoLCATs (arXiv 2410.10254): softmax in a window, linear attention outside of it, under one normalizer.

    out_i = (g sum_W exp(s_ij - m_i) v_j + sum_rest phi(q_i) phi(k_j) v_j) / (the same without v)

with scores s = q k / dim^1/2, m_i the largest in the window W of query i, g = sigmoid(w) learned per head and 0.1 at
first, and phi Hedgehog's learned map from the identity.

Its window is the 64 tokens before a query, of text. Here it is that of windowed.py, 8x8 patches, with class token and
registers as global tokens. Nothing is tied to a grid. Left out: its causal masks, and factors on the linear part (off
in its code).
"""

import torch
from torch import nn
from torch.nn import functional as F

from modeling_adala.feature_maps import HedgehogFeatureMap

from .interface import Counterpart, Sizes
from .windowed import REACH, in_order, windows


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
        return torch.cat((of_special, in_order(output, own, is_own)), dim=2)
