"""The Fourier layer that uno_conv_type="spectral" puts in the place of a 3×3 convolution (Li et al. 2021)."""

import torch
from torch import nn

MODES = 4


class SpectralConv(nn.Module):
    """Linear map of the lowest Fourier modes of a grid, one complex matrix for each; the other modes are dropped.

    Keeps frequencies -4 ... 3 along rows' axis and 0 ... 3 along columns (the input is real), or what the grid has.
    Always computed in the parameters' precision, because FFTs in half precision are inexact or missing; autocast leaves
    complex products alone.
    """

    def __init__(self, width_in, width_out, resolution):
        super().__init__()
        rows, columns = min(2 * MODES, resolution), min(MODES, resolution // 2 + 1)
        # a buffer, because a list as an index makes a GPU wait
        self.register_buffer("frequencies", torch.arange(-(rows // 2), rows - rows // 2) % resolution, persistent=False)
        self.weight = nn.Parameter(torch.empty(rows, columns, width_in, width_out, 2))  # real, imaginary
        self.bias = nn.Parameter(torch.zeros(width_out))
        nn.init.normal_(self.weight, std=(2 * width_in) ** -0.5)

    def forward(self, x):
        """x [B, G, G, width_in] -> [B, G, G, width_out], float32 or float64."""
        columns = self.weight.shape[1]
        spectrum = torch.fft.rfft2(x.to(self.weight.dtype), dim=(1, 2))
        low = spectrum[:, self.frequencies, :columns]
        low = torch.einsum("bhwi,hwio->bhwo", low, torch.view_as_complex(self.weight))
        out = spectrum.new_zeros(*spectrum.shape[:3], low.shape[3])
        out[:, self.frequencies, :columns] = low
        return torch.fft.irfft2(out, s=x.shape[1:3], dim=(1, 2)) + self.bias
