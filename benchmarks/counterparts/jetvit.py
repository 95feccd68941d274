"""JetViT's linear block (arXiv 2605.26636, eq. 2 to 4): relu attention plus a convolution whose kernel is made of V.

    out = linear attention(relu(Q), relu(K), V) + DWC_theta(V),  theta = MLP(mean of the patches of V)

with one kernel per image and channel, and two layers with a SiLU between them. The paper does not say the size of the
kernel, taken as 3x3 here, nor the hidden width, a quarter of the channels here ("squeeze"). The second layer starts
at zero, so that there is no kernel at first. Class token and registers are left out of mean and convolution. Nothing
is tied to a grid.

Left out: the search for window and softmax layers, which is a choice of layers and not a block.
"""

from torch import nn

from .interface import MappedCounterpart, Sizes, convolve


class JetViT(MappedCounterpart):
    """Relu linear attention with a dynamic depthwise convolution of the values."""

    takes_mask = False

    def __init__(self, sizes: Sizes):
        super().__init__(sizes)
        channels = sizes.heads * sizes.dim
        self.mlp = nn.Sequential(nn.Linear(channels, channels // 4), nn.SiLU(), nn.Linear(channels // 4, 9 * channels))
        for parameter in self.mlp[2].parameters():
            nn.init.zeros_(parameter)

    def features(self, query, key, grid, key_mask):
        return query.relu(), key.relu()

    def forward(self, query, key, value, grid, key_mask=None):
        patches = value[:, :, value.shape[2] - grid[0] * grid[1] :]
        kernel = self.mlp(patches.mean(dim=2).flatten(1)).unflatten(1, (self.sizes.heads, -1, 3, 3))
        return super().forward(query, key, value, grid) + convolve(value, kernel, grid)
