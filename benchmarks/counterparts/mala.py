"""MALA, magnitude-aware linear attention (arXiv 2507.00698): weights get sharper as queries get longer.

    z_i = s phi(q_i) mean(phi(k)),  A_ij = ((1 + 1 / (z_i + 1e-6)) s phi(q_i) phi(k_j) - z_i) / N
    out = (A V + DWC_5x5(V)) times a gate,  phi = elu + 1,  s = dim^-1/2

Rows sum to one and weights may be negative. Nothing is tied to a grid. The convolution leaves class token and
registers out.

Left out: its rotary positions on phi (a pretrained ViT has positions of its own) and the bias of the convolution. The
convolution starts at zero and the gate at one, which its code leaves to chance; see `Gate` for what it is computed
from.
"""

import torch
from torch import nn

from modeling_adala.feature_maps import elu_plus_one

from .interface import Counterpart, Gate, Sizes, convolve


class MALA(Counterpart):
    """Magnitude-aware linear attention."""

    def __init__(self, sizes: Sizes):
        super().__init__(sizes)
        self.kernel = nn.Parameter(torch.zeros(1, sizes.heads, sizes.dim, 5, 5))
        self.gate = Gate(sizes)

    def forward(self, query, key, value, grid, key_mask=None):
        phi_q, phi_k = elu_plus_one(query) * self.sizes.dim**-0.5, elu_plus_one(key)
        z = phi_q @ phi_k.mean(dim=2, keepdim=True).transpose(2, 3)
        state = phi_k.transpose(2, 3) @ value / key.shape[2]
        output = (1 + 1 / (z + 1e-6)) * (phi_q @ state) - z * value.mean(dim=2, keepdim=True)
        return (output + convolve(value, self.kernel, grid)) * self.gate(query)
