"""cosFormer (arXiv 2202.08791): relu features, weighted by the cosine of the distance of two tokens.

    phi_i(x) = [relu(x) sin(pi i / 2N), relu(x) cos(pi i / 2N)],  i = 1 .. N

so that phi_i(q) phi_j(k) = relu(q) relu(k) cos(pi (i - j) / 2N). Positions are those in the sequence, of text: class
token and registers are its first tokens, and patches follow row by row, so that two patches below each other are a
row apart. Nothing is tied to a grid; N is the number of tokens of the image.

Left out: nothing. The normalizer is ours, with 1e-6 added, where its code takes the larger of the two.
"""

import math

import torch

from .interface import MappedCounterpart


class CosFormer(MappedCounterpart):
    """Relu features with a locality bias along the sequence, twice as many."""

    def features(self, query, key, grid, key_mask):
        tokens = query.shape[2]
        place = torch.arange(1, tokens + 1, device=query.device, dtype=query.dtype)[:, None] * (math.pi / 2 / tokens)
        query, key = (torch.cat((x.relu() * place.sin(), x.relu() * place.cos()), dim=3) for x in (query, key))
        return query, key
