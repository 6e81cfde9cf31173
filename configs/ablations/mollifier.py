"""The width of the mollifier, in pixels at the training resolution: none (plain DDPM) to twice the paper's."""


def get_variants(base):
    return {f"sigma {sigma:g}": {"diffusion.gaussian_filter_std": sigma} for sigma in (0.0, 0.5, 1.0, 2.0)}
