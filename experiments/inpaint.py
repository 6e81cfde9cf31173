r"""Fill in the unknown pixels of images by reconstruction guidance (docs/method.md, 6.1).

    python experiments/inpaint.py --config configs/ffhq_256_config.py --mask centre \
        [--limit_guidance --consistency 1 --jumps 3]

The images are held out, or those of --input. z is the encoding of the known pixels or, with --latent_config, a sample.
Writes <output>/originals, masked, generated (as sampled) and results (with the known pixels restored), grid.png and
scores.json. Image i is a function of run.seed and i. The same command resumes an interrupted run.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags

from data.datasets import reading
from data.images import read_image
from data.loader import to_float
from diffusion.guidance import Constraint, guided_ddim
from diffusion.operators import Mask
from diffusion.samplers import FIRST_ORDER
from diffusion.sampling import images_at_once
from experiments.lib.applications import Application
from experiments.lib.masks import KINDS, make_masks
from experiments.lib.sampling import float_flag
from experiments.metrics.images import psnr, roughness
from utils import cli, config
from utils.errors import UserError

APPLICATION = Application("inpainting", steps=100)
MASK = flags.DEFINE_string("mask", "centre", f"unknown pixels: {', '.join(KINDS)}, or a PNG whose white is unknown")
GUIDANCE = float_flag("guidance", 1.0, "lambda of reconstruction guidance; 0 for none", high=1e6)
LIMITED = flags.DEFINE_bool("limit_guidance", False, "map the gradient of the misfit to the space of states and limit "
                            "its norm, instead of the paper's rule")
CONSISTENCY = float_flag("consistency", 0.0, "share of the known pixels in the estimate of each step: 0 for none, as "
                         "in the paper, 1 for exactly the known pixels", high=1.0)
JUMPS = flags.DEFINE_integer("jumps", 0, "repetitions of each step, each after fresh noise", lower_bound=0)


def main():
    cfg = config.read_trained_autoencoder_config(APPLICATION.config)
    autoencoder = APPLICATION.load(cfg, FIRST_ORDER[cfg.diffusion.objective])
    images, origin = APPLICATION.read_images(autoencoder, APPLICATION.count.value)
    total, _, *size = images.shape
    known = make_masks(MASK.value, size, range(total), cfg.run.seed, **reading(cfg.data))
    if known.flatten(1).sum(1).min() < cfg.model.knn_neighbours:
        raise UserError(f"--mask={MASK.value} leaves fewer known pixels than model.knn_neighbours="
                        f"{cfg.model.knn_neighbours}; use another mask")
    autoencoder.check_size(size)
    draw_latents, latent_model = APPLICATION.latent_sampler(autoencoder)
    results = APPLICATION.results(
        autoencoder, f"_{Path(MASK.value).stem}", dict.fromkeys(("originals", "masked", "generated", "results"), total),
        {**origin, "size": size, "mask": MASK.value, "guidance": GUIDANCE.value, "limit_guidance": LIMITED.value,
         "consistency": CONSISTENCY.value, "jumps": JUMPS.value, "latent_model": latent_model})

    batch_size = images_at_once(cfg.train.sample_size, size, autoencoder.max_points)
    for indices, progress in results.missing_batches(batch_size, autoencoder.steps):
        truth, mask = to_float(images[indices]).to(autoencoder.device), known[indices].to(autoencoder.device)
        constraint = Constraint(Mask(mask), mask * truth, autoencoder.diffusion.mollifier)
        z = draw_latents(indices) if draw_latents else autoencoder.encode(truth, mask)
        generated = inpaint(autoencoder, z, constraint, indices, progress)
        results.save(indices, {"originals": truth, "masked": torch.where(mask, truth, 1.0), "generated": generated,
                               "results": constraint.enforce(generated)})

    scores = score(results.folders, known)
    results.write_scores(scores)
    results.write_grid()
    print(f"{total} images: PSNR {scores['psnr_known']:.2f} dB on known pixels before they are restored, "
          f"{scores['psnr_unknown']:.2f} dB on unknown ones (mean colour instead: "
          f"{scores['psnr_unknown_of_mean_colour']:.2f}); texture {scores['texture']:.2f}, seam {scores['seam']:.2f}; "
          f"images in {results.output}")


def inpaint(autoencoder, z, constraint, indices, progress):
    """Samples [B, C, H, W] of the images `indices`, for latents z, guided towards the constraint."""
    diffusion, generators = autoencoder.diffusion, autoencoder.generators(indices, "inpainting")

    def path(denoise, x):
        return guided_ddim(denoise, x, diffusion.schedule, constraint, GUIDANCE.value, LIMITED.value,
                           CONSISTENCY.value, JUMPS.value, generators, diffusion.mollifier.noise_like)

    return autoencoder.decode(z, constraint.data.shape[-2:], generators=generators, progress=progress, path=path,
                              condition=autoencoder.condition(indices))


def score(folders, known):
    """Scores of the PNGs against the originals.

    psnr_*         [dB], means over images, on known or unknown pixels
    texture, seam  sums of absolute differences between neighbouring pixels, within the unknown regions and across their
                   border, as multiples of those of the originals
    """
    sums, rough = torch.zeros(3, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    for i, mask in enumerate(known):
        truth, generated, result = (read_image(folders[name].file(i)) for name in ("originals", "generated", "results"))
        mean = truth[:, mask[0]].double().mean(1).round()[:, None, None].expand_as(truth)
        sums += torch.tensor([psnr(generated, truth, mask), psnr(result, truth, ~mask), psnr(mean, truth, ~mask)])
        rough += torch.tensor([roughness(image, ~mask) for image in (result, truth)])
    names = ("psnr_known", "psnr_unknown", "psnr_unknown_of_mean_colour")
    texture, seam = (rough[0] / rough[1].clamp(min=1)).tolist()
    return {"count": len(known), **dict(zip(names, (sums / len(known)).tolist(), strict=True)),
            "unknown_share": 1 - known.double().mean().item(), "texture": texture, "seam": seam}


if __name__ == "__main__":
    cli.run(main)
