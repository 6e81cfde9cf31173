"""How well a network denoises, in a figure that compares models of different mollifiers and parameterisations.

Training losses do not: a network that predicts xi, v or T xi is measured in other units at every step, and T xi has a
variance that depends on sigma. What all of them have is an estimate of the image.
"""

import torch

from data.coordinates import Coordinates
from data.loader import all_batches
from diffusion.generate import encode
from utils import rng

STEPS_SHARE = 0.75  # of the chain: beyond it x_t tells next to nothing of x_0, and the estimate of a network that
# predicts noise is its error over sqrt(alpha_bar), which goes to zero; sampling corrects that later


@torch.no_grad()
def denoising_error(modules, diffusion, dataset, yardstick, batch_size=64, device="cpu"):
    """Mean squared error of the estimate of x_0, as `yardstick` (a GaussianMollifier) sees it.

    Of image i of N, on all pixels, at step i · T' // N of the first STEPS_SHARE of the chain, T': every step weighs the
    same. The estimate of T x_0 is clipped and sharpened as the end of sampling is, then image and estimate are blurred
    by the yardstick, which is one for all models. The noise of an image is always the same, xi before T.
    modules    {"encoder", "decoder"} in eval mode
    """
    errors, last = [], int(STEPS_SHARE * diffusion.num_steps)
    for images, index in all_batches(dataset, batch_size, device):
        coords = Coordinates.full(len(images), images.shape[-2:], device)
        z = encode(modules["encoder"], images)
        t = index.to(device) * last // len(dataset)
        noise = rng.randn(images.shape, rng.sample_generators(device, index, "denoising error"), device)
        denoise = diffusion.denoiser(lambda x, time, z=z, coords=coords: modules["decoder"](x, time, z, coords), coords)
        estimate = diffusion.mollifier.sharpen(denoise(diffusion.q_sample(images, t, noise), t)).clamp(-1, 1)
        errors.append(yardstick.blur(estimate - images).square().flatten(1).mean(1))
    return torch.cat(errors).mean().item()
