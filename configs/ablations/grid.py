"""What the U-Net on the regular grid is made of: 3×3 convolutions or Fourier layers."""


def get_variants(base):
    return {kind: {"model.uno_conv_type": kind} for kind in ("conv", "spectral")}
