"""Element-wise exponential, phi(x) = exp(x / dim^(1/4)) (Hedgehog, arXiv 2402.04347, section 3: exp(t x)).

Nothing is tied to a grid, and nothing is left out. Maxima of the keys of each channel over the tokens, and of each
query over its channels, cancel in the ratio; with them, the normalizer is never below 1 over the number of tokens.
"""

import torch

from .interface import MappedCounterpart


class Exponential(MappedCounterpart):
    """Exponential feature map, a temperature of dim^-1/2 shared by query and key as in softmax."""

    eps = 0.0

    def features(self, query, key, grid, key_mask):
        query, key = (x * self.sizes.dim**-0.25 for x in (query, key))
        if key_mask is not None:
            key = key.masked_fill(~key_mask[:, None, :, None], torch.finfo(key.dtype).min)
        highest = key.amax(dim=2, keepdim=True)
        query = query + highest
        return torch.exp(query - query.amax(dim=3, keepdim=True)), torch.exp(key - highest)
