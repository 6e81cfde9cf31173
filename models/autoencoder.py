"""The diffusion autoencoder: the decoder denoises at coordinates, the encoder turns an image into a vector."""

import torch
from torch import nn

from models.blocks import Conditioning, FiLM, TimeEmbedding
from models.interpolation import grid_to_points, knn_to_grid
from models.large_images import in_parts
from utils.rng import randn


class SparseUNet(nn.Module):
    """Decoder: the diffusion model f(x_t, t, z), at any set of coordinates of an image of any size (docs/method.md, 4).

    channels      of the values, out_channels of the prediction (twice as many if it also predicts a variance)
    width         nf, features of each point
    num_blocks    sparse residual blocks on either side of the grid
    make_block    () -> SparseBlock
    grid_unet     GridUNet
    neighbours    nearest points that each grid node averages
    time_emb_dim  sinusoidal features of t, and length of its embedding
    z_dim         length of z
    backend       what finds the nearest points (models.interpolation)
    """

    def __init__(self, channels, out_channels, width, num_blocks, make_block, grid_unet, neighbours, time_emb_dim,
                 z_dim, backend="auto"):
        super().__init__()
        self.time = TimeEmbedding(time_emb_dim, time_emb_dim)
        self.points_to_grid = PointsToGrid(
            channels, width, (make_block() for _ in range(num_blocks)), grid_unet.spec, neighbours, backend)
        self.grid_unet = grid_unet
        self.linear_back = nn.Linear(grid_unet.spec.base_channels, width)
        self.merges = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(num_blocks))
        self.blocks = nn.ModuleList(make_block() for _ in range(num_blocks))
        self.linear_out = nn.Linear(width, out_channels)
        nn.init.zeros_(self.linear_out.weight)
        nn.init.zeros_(self.linear_out.bias)
        films = [module for module in self.modules() if isinstance(module, FiLM)]
        self.conditioning = Conditioning(films, time_emb_dim, z_dim)

    def forward(self, values, t, z, coords, grid=None, max_points=None):
        """values [B, L, C], t [B] in [0, 1000), z [B, Z] -> [B, L, out_channels], of the dtype of values.

        grid        what grid_features returned, for points that see the grid of another set of points (a window of an
                    image sees the grid of the whole); by default that of these points
        max_points  points of all images together that a sparse block takes at a time; None: no limit
        """
        modulation = self.conditioning(self.time(t), z)
        x, skips = self.points_to_grid(values, coords, modulation, max_points)
        if grid is None:
            grid = self._on_grid(x, coords, modulation)
        x = grid_to_points(grid, coords)
        for merge, block in zip(self.merges, self.blocks, strict=True):
            x = in_parts(block, merge(torch.cat([x, skips.pop()], dim=-1)), coords, modulation, max_points)
        return self.linear_out(x).to(values.dtype)

    def grid_features(self, values, t, z, coords, max_points=None):
        """Features [B, nf, G, G] that points read back: all that a point knows of those far from it."""
        modulation = self.conditioning(self.time(t), z)
        x, _ = self.points_to_grid(values, coords, modulation, max_points)
        return self._on_grid(x, coords, modulation)

    def _on_grid(self, x, coords, modulation):
        grid = self.grid_unet(self.points_to_grid.interpolate(x, coords), modulation)
        # Linear commutes with interpolation, whose weights sum to one; the grid is where it has the fewer rows to map.
        return self.linear_back(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SparseEncoder(nn.Module):
    """Encoder: values at coordinates -> latent z, the mean over the grid of the U-Net's down half (docs/method.md,
    4.7).

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

    def forward(self, values, coords, generator=None, max_points=None):
        """values [B, L, C] -> z [B, Z], or (z, mu, logvar) if stochastic; z = mu in eval mode. Dtype of values.

        generator   one torch.Generator, or a list of one per sample, for the draw of z (utils.rng)
        max_points  as for SparseUNet
        """
        x, _ = self.points_to_grid(values, coords, max_points=max_points)
        x, _ = self.grid_down(self.points_to_grid.interpolate(x, coords))
        out = self.linear_out(self.linear_grid(x).mean(dim=(1, 2))).to(values.dtype)
        if not self.stochastic:
            return out
        mu, logvar = out.chunk(2, dim=1)
        if not self.training:
            return mu, mu, logvar
        noise = randn(mu.shape, generator, mu.device).to(mu.dtype)
        return mu + (logvar / 2).exp() * noise, mu, logvar


class NoEncoder(nn.Module):
    """Takes the place of the encoder if there is none: every image has the empty latent."""

    def forward(self, values, coords, generator=None, max_points=None):
        """values [B, L, C] -> [B, 0]."""
        return values.new_zeros(len(values), 0)


class PointsToGrid(nn.Module):
    """Steps that decoder and encoder share: Linear, sparse blocks, interpolation to the grid, Linear.

    channels    of the values
    width       nf, features of each point
    blocks      sparse residual blocks
    spec        models.grid_unet.GridSpec of the grid
    neighbours  nearest points that each grid node averages
    backend     what finds them (models.interpolation)
    """

    def __init__(self, channels, width, blocks, spec, neighbours, backend="auto"):
        super().__init__()
        self.resolution, self.neighbours, self.backend = spec.resolution, neighbours, backend
        self.linear_in = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(blocks)
        self.linear_out = nn.Linear(width, spec.base_channels)

    def forward(self, values, coords, modulation=None, max_points=None):
        """values [B, L, C] -> (x [B, L, nf], outputs of all blocks, of which x is the last)."""
        x, outputs = self.linear_in(values), []
        for block in self.blocks:
            x = in_parts(block, x, coords, modulation, max_points)
            outputs.append(x)
        return x, outputs

    def interpolate(self, x, coords):
        """x [B, L, nf] -> grid [B, base, G, G]. Linear commutes with the interpolation, whose weights sum to one."""
        grid = knn_to_grid(x, coords, self.resolution, self.neighbours, self.backend)
        return self.linear_out(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
