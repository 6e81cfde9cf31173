"""The diffusion autoencoder: the decoder denoises an image at coordinates, the encoder maps an image to a vector."""

import torch
from torch import nn

from models.blocks import ConditionEmbedding, Conditioning, FiLM, TimeEmbedding
from models.interpolation import grid_to_points, knn_to_grid
from models.large_images import in_parts


class SparseUNet(nn.Module):
    """Decoder: the diffusion model f(x_t, t, z), at any set of coordinates of an image of any size (docs/method.md, 4).

    channels      channels of the values
    out_channels  channels of the prediction; twice as many if it includes a variance
    width         nf, features of each point
    num_blocks    sparse residual blocks on either side of the grid
    make_block    () -> SparseBlock
    grid_unet     GridUNet
    neighbours    nearest points that each grid node averages
    time_emb_dim  number of sinusoidal features of t, and length of its embedding
    z_dim         length of z
    backend       model.backend, for the search for nearest points (models.interpolation)
    jumps         whether t has a second column, the length of a jump
    conditions    data.conditions.Conditions that the decoder follows, or None
    """

    def __init__(self, channels, out_channels, width, num_blocks, make_block, grid_unet, neighbours, time_emb_dim,
                 z_dim, backend="auto", jumps=False, conditions=None):
        super().__init__()
        self.time = TimeEmbedding(time_emb_dim, time_emb_dim, jumps)
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
        self.condition = conditions and ConditionEmbedding(conditions, time_emb_dim)

    def forward(self, values, t, z, coords, grid=None, max_points=None, condition=None):
        """values [B, L, C], t [B] in [0, 1000] or [B, 2], z [B, Z] -> [B, L, out_channels] in the dtype of values.

        grid        result of grid_features for another set of points, such as the whole image that `coords` is a window
                    of; by default that of these points
        max_points  points that a sparse block processes at a time, of all images together; None: no limit
        condition   as for ConditionEmbedding; a decoder without conditions ignores it
        """
        modulation = self._modulation(t, z, condition)
        x, skips = self.points_to_grid(values, coords, modulation, max_points)
        if grid is None:
            grid = self._on_grid(x, coords, modulation)
        x = grid_to_points(grid, coords)
        for merge, block in zip(self.merges, self.blocks, strict=True):
            x = in_parts(block, merge(torch.cat([x, skips.pop()], dim=-1)), coords, modulation, max_points)
        return self.linear_out(x).to(values.dtype)

    def grid_features(self, values, t, z, coords, max_points=None, condition=None):
        """Features [B, nf, G, G] that grid_to_points interpolates: all that a point knows about distant points."""
        modulation = self._modulation(t, z, condition)
        x, _ = self.points_to_grid(values, coords, modulation, max_points)
        return self._on_grid(x, coords, modulation)

    def _modulation(self, t, z, condition):
        time = self.time(t)
        return self.conditioning(time if self.condition is None else time + self.condition(condition), z)

    def _on_grid(self, x, coords, modulation):
        grid = self.grid_unet(self.points_to_grid.interpolate(x, coords), modulation)
        # Linear commutes with interpolation, because the weights sum to one. The grid has fewer rows than the points.
        return self.linear_back(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SparseEncoder(nn.Module):
    """Encoder: values at coordinates -> latent z, the mean over the lowest grid of the U-Net (docs/method.md, 4.7).

    points_to_grid  PointsToGrid
    grid_down       GridDown
    z_dim           length of z
    stochastic      predict a normal distribution of z, and sample from it in training
    """

    def __init__(self, points_to_grid, grid_down, z_dim, stochastic=False):
        super().__init__()
        self.points_to_grid = points_to_grid
        self.grid_down = grid_down
        self.stochastic = stochastic
        self.linear_grid = nn.Linear(grid_down.spec.widths[-1], z_dim)
        self.linear_out = nn.Linear(z_dim, 2 * z_dim if stochastic else z_dim)

    def forward(self, values, coords, noise=None, max_points=None):
        """values [B, L, C] -> z [B, Z], or (z, mu, logvar) if stochastic, in the dtype of values. In eval mode z = mu.

        noise       standard normal draws [B, Z] that z is made from; drawn if None
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
        noise = torch.randn_like(mu) if noise is None else noise
        return mu + (logvar / 2).exp() * noise, mu, logvar


class NoEncoder(nn.Module):
    """Stands in for the encoder if model.z_dim is 0: the latent of every image is empty."""

    def forward(self, values, coords, noise=None, max_points=None):
        """values [B, L, C] -> [B, 0]."""
        return values.new_zeros(len(values), 0)


class PointsToGrid(nn.Module):
    """The first layers of decoder and encoder: Linear, sparse blocks, interpolation to the grid, Linear.

    channels    channels of the values
    width       nf, features of each point
    blocks      sparse residual blocks
    spec        models.grid_unet.GridSpec of the grid
    neighbours  nearest points that each grid node averages
    backend     model.backend, for the search for nearest points (models.interpolation)
    """

    def __init__(self, channels, width, blocks, spec, neighbours, backend="auto"):
        super().__init__()
        self.resolution, self.neighbours, self.backend = spec.resolution, neighbours, backend
        self.linear_in = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(blocks)
        self.linear_out = nn.Linear(width, spec.base_channels)

    def forward(self, values, coords, modulation=None, max_points=None):
        """values [B, L, C] -> (x [B, L, nf], list of the outputs of all blocks; x is the last)."""
        x, outputs = self.linear_in(values), []
        for block in self.blocks:
            x = in_parts(block, x, coords, modulation, max_points)
            outputs.append(x)
        return x, outputs

    def interpolate(self, x, coords):
        """x [B, L, nf] -> grid [B, base, G, G]."""
        grid = knn_to_grid(x, coords, self.resolution, self.neighbours, self.backend)
        # Linear commutes with interpolation, because the weights sum to one.
        return self.linear_out(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
