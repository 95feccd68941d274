"""Efficient Attention (arXiv 1812.01243): queries through softmax over channels, keys through softmax over tokens.

    out = softmax_channels(Q) (softmax_tokens(K)^T V)

Rows sum to one without a normalizer. Nothing is tied to a grid.

Left out: its residual connection around the projection, which a ViT block has. Queries and keys are not scaled, as in
the paper.
"""

import torch

from .interface import Counterpart


class EfficientAttention(Counterpart):
    """Two softmaxes with a product of `(dim, dim)` between them; no parameters."""

    takes_mask = True

    def forward(self, query, key, value, grid, key_mask=None):
        if key_mask is not None:
            key = key.masked_fill(~key_mask[:, None, :, None], torch.finfo(key.dtype).min)
        weights = key.softmax(dim=2)
        if key_mask is not None:  # an image without a real token has equal weights
            weights = weights * key_mask[:, None, :, None]
        return query.softmax(dim=3) @ (weights.transpose(2, 3) @ value)
