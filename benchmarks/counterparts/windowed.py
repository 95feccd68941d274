"""Softmax in windows alone (Longformer, arXiv 2004.05150, on the patch grid, as in JetViT's table 2).

    out_i = softmax over j in W(i) of (q_i k_j / dim^1/2) v_j

Each block of 4x4 queries attends to the 8x8 patches around it, fewer at the border. Class token and registers are
global: every query attends to them, and they attend to all tokens. O(N) with 64 keys per query; nothing is tied to a
grid, nothing is learned.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .interface import Counterpart, Grid

BLOCK, REACH = 4, 2


class Windowed(Counterpart):
    """Softmax attention in windows of patches."""

    def forward(self, query, key, value, grid, key_mask=None):
        special = query.shape[2] - grid[0] * grid[1]
        own, is_own, near, is_near = (
            x.to(query.device) for x in (*windows(grid, 0, 0), *windows(grid, REACH, special))
        )
        queries, (keys, values) = query[:, :, special:][:, :, own], (x[:, :, near] for x in (key, value))
        output = F.scaled_dot_product_attention(queries, keys, values, is_near[:, None])
        of_special = F.scaled_dot_product_attention(query[:, :, :special], key, value)
        return torch.cat((of_special, in_order(output, own, is_own)), dim=2)


def windows(grid: Grid, reach: int, special: int) -> tuple[Tensor, Tensor]:
    """Return the tokens in the window of each block, `(blocks, places)`, and which of these places are inside."""
    rows, columns = (torch.arange(0, size, BLOCK)[:, None] + torch.arange(-reach, BLOCK + reach) for size in grid)
    rows, columns = rows[:, None, :, None], columns[None, :, None, :]
    inside = ((rows >= 0) & (rows < grid[0]) & (columns >= 0) & (columns < grid[1])).flatten(2).flatten(0, 1)
    tokens = (special + rows * grid[1] + columns).flatten(2).flatten(0, 1).where(inside, 0)
    before = torch.arange(special).expand(len(tokens), -1)
    return torch.cat((tokens, before), dim=1), torch.cat((inside, torch.ones_like(before, dtype=torch.bool)), dim=1)


def in_order(output: Tensor, own: Tensor, is_own: Tensor) -> Tensor:
    """Return `(batch, heads, patches, dim)` row by row for `(batch, heads, blocks, places, dim)` of `windows`."""
    return output.flatten(2, 3)[:, :, is_own.flatten().nonzero()[:, 0][own[is_own].argsort()]]
