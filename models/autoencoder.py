"""The diffusion autoencoder: the decoder denoises at coordinates, the encoder turns an image into a vector."""

import torch.nn.functional as F
from torch import nn

from models import recompute
from models.conditioning import Conditioning, FiLM, TimeEmbedding
from models.interpolation import grid_to_points, knn_to_grid
from utils.rng import randn


class PointsToGrid(nn.Module):
    """Steps 1 to 3, which decoder and encoder share: Linear, sparse blocks, Linear, interpolation to the grid.

    channels    of the values
    width       nf, features of each point
    blocks      sparse residual blocks
    spec        models.grid_unet.GridSpec of the grid
    neighbours  nearest points that each node of the grid averages
    """

    def __init__(self, channels, width, blocks, spec, neighbours):
        super().__init__()
        self.resolution, self.neighbours = spec.resolution, neighbours
        self.linear_in = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(blocks)
        self.linear_out = nn.Linear(width, spec.base_channels)

    def forward(self, values, coords, modulation=None):
        """values [B, L, C] -> (grid [B, base, G, G], outputs [B, L, nf] of the blocks)."""
        x = self.linear_in(values)
        skips = []
        for block in self.blocks:
            x = recompute.run(block, x, coords, modulation)
            skips.append(x)
        return knn_to_grid(self.linear_out(x), coords, self.resolution, self.neighbours), skips


class Merge(nn.Linear):
    """Linear of two sets of features side by side, without copying them: the copy would be kept for the gradients."""

    def forward(self, x, skip):
        """x [..., C], skip [..., D], C + D the features of the input -> Linear(cat([x, skip])), but for rounding."""
        from_x, from_skip = self.weight.split([x.shape[-1], skip.shape[-1]], dim=1)
        return F.linear(x, from_x, self.bias) + F.linear(skip, from_skip)


class SparseUNet(nn.Module):
    """Decoder: the diffusion model f(x_t, t, z), at any set of coordinates of an image of any size.

    channels      of the values, out_channels of the prediction (twice as many where it also predicts a variance)
    width         nf, features of each point
    num_blocks    sparse residual blocks on either side of the grid
    make_block    () -> SparseBlock
    grid_unet     GridUNet
    neighbours    nearest points that each node of the grid averages
    time_emb_dim  sinusoidal features of t, and length of its embedding
    z_dim         length of z
    """

    def __init__(self, channels, out_channels, width, num_blocks, make_block, grid_unet, neighbours, time_emb_dim,
                 z_dim):
        super().__init__()
        self.time = TimeEmbedding(time_emb_dim, time_emb_dim)
        self.points_to_grid = PointsToGrid(
            channels, width, (make_block() for _ in range(num_blocks)), grid_unet.spec, neighbours
        )
        self.grid_unet = grid_unet
        self.linear_back = nn.Linear(grid_unet.spec.base_channels, width)
        self.merges = nn.ModuleList(Merge(2 * width, width) for _ in range(num_blocks))
        self.blocks = nn.ModuleList(make_block() for _ in range(num_blocks))
        self.linear_out = nn.Linear(width, out_channels)
        nn.init.zeros_(self.linear_out.weight)
        nn.init.zeros_(self.linear_out.bias)
        films = [module for module in self.modules() if isinstance(module, FiLM)]
        self.conditioning = Conditioning(films, time_emb_dim, z_dim)

    def forward(self, values, t, z, coords):
        """values [B, L, C], t [B] in [0, 1000), z [B, Z] -> [B, L, out_channels], of the dtype of values."""
        modulation = self.conditioning(self.time(t), z)
        grid, skips = self.points_to_grid(values, coords, modulation)
        x = self.linear_back(grid_to_points(self.grid_unet(grid, modulation), coords))
        for merge, block in zip(self.merges, self.blocks, strict=True):
            x = recompute.run(block, merge(x, skips.pop()), coords, modulation)
        return self.linear_out(x).to(values.dtype)


class SparseEncoder(nn.Module):
    """Encoder: values at coordinates -> latent z, the mean over the grid of what the down half of the U-Net returns.

    points_to_grid  PointsToGrid without conditioning
    grid_down       GridDown without conditioning
    z_dim           length of z
    stochastic      predict a normal distribution of z and, in training, draw from it
    """

    def __init__(self, points_to_grid, grid_down, z_dim, stochastic=False):
        super().__init__()
        self.points_to_grid = points_to_grid
        self.grid_down = grid_down
        self.stochastic = stochastic
        self.linear_grid = nn.Linear(grid_down.spec.widths[-1], z_dim)
        self.linear_out = nn.Linear(z_dim, 2 * z_dim if stochastic else z_dim)

    def forward(self, values, coords, generator=None):
        """values [B, L, C] -> z [B, Z], or (z, mu, logvar) where stochastic; z = mu in eval mode. Dtype of values.

        generator   one torch.Generator, or a list of one per sample, for the draw of z (utils.rng)
        """
        grid, _ = self.points_to_grid(values, coords)
        return self.from_grid(grid, values.dtype, generator)

    def from_grid(self, grid, dtype, generator=None):
        """What forward makes of the grid [B, base, G, G] of PointsToGrid, of the given dtype."""
        x, _ = self.grid_down(grid)
        out = self.linear_out(self.linear_grid(x).mean(dim=(1, 2))).to(dtype)
        if not self.stochastic:
            return out
        mu, logvar = out.chunk(2, dim=1)
        if not self.training:
            return mu, mu, logvar
        noise = randn(mu.shape, generator, mu.device).to(mu.dtype)
        return mu + (logvar / 2).exp() * noise, mu, logvar


class NoEncoder(nn.Module):
    """In the place of an encoder where there is none: every image has the empty latent."""

    def forward(self, values, coords, generator=None):
        """values [B, L, C] -> [B, 0]."""
        return values.new_zeros(len(values), 0)
