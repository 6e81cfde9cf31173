"""Fill in the unknown pixels of images, by reconstruction guidance (METHOD, applications) and resampling.

    python experiments/inpaint.py --config configs/ffhq_256_config.py --mask centre [--guidance 1] [--jumps 3]

Of held-out images, or those of --input. z is the encoding of the known pixels alone or, with --latent_config, a sample.
Writes <output>/originals, masked, generated (as sampled) and results (with the known pixels put back), grid.png and
scores.json. Image i is a function of run.seed and i, and a run that was stopped continues.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags

from data.images import read_image
from data.loader import to_float
from diffusion.gaussian_diffusion import build_diffusion
from diffusion.guidance import Constraint, KnownPixels, guided_ddim
from diffusion.sampling import decode, encode, images_at_once
from experiments.lib.applications import check_finite, latent_sampler, read_images, write_scores
from experiments.lib.image_folders import ImageFolder
from experiments.lib.image_grid import save_sheet
from experiments.lib.masks import KINDS, make_masks
from experiments.lib.sampling import MAX_POINTS
from experiments.metrics.images import psnr, roughness
from models.load import autoencoder_path, load_autoencoder
from utils import cli, config, rng
from utils.checkpoint import identity
from utils.device import autocast, resolve_device, resolve_dtype
from utils.errors import UserError

CONFIG = config.define_config_flag("config", "config of the trained autoencoder")
LATENT_CONFIG = config.define_config_flag("latent_config", "latent config: z from its model instead of the encoder")
MASK = flags.DEFINE_string("mask", "centre", f"what is unknown: {', '.join(KINDS)}, or a PNG whose white is unknown")
GUIDANCE = flags.DEFINE_float("guidance", 1.0, "lambda of the reconstruction guidance; 0 for none", lower_bound=0.0,
                              upper_bound=1e6)
CONSISTENCY = flags.DEFINE_float("consistency", 1.0, "how far the estimate of each step is moved to the known pixels: "
                                 "0 not, 1 all the way", lower_bound=0.0, upper_bound=1.0)
JUMPS = flags.DEFINE_integer("jumps", 0, "how often each step is taken back and done again", lower_bound=0)
STEPS = flags.DEFINE_integer("sampling_steps", 100, "steps of DDIM", lower_bound=1)
SIZE = flags.DEFINE_string("sample_img_size", None, "side of held-out images in pixels, or HEIGHTxWIDTH; default: the "
                           "training resolution")
INPUT = flags.DEFINE_string("input", None, "folder of images of one size, in place of held-out ones")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 16, "how many images at most", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "folder for the results; default: inpainting/<experiment>_<mask>")
FOLDERS = ("originals", "masked", "generated", "results")
SHOWN = 8  # rows of the grid


def main():
    cfg = config.read_trained_autoencoder_config(CONFIG)
    check_finite(GUIDANCE, CONSISTENCY)
    diffusion = build_diffusion(cfg, STEPS.value)
    device = resolve_device(cfg.run.device)
    dtype = resolve_dtype(cfg.train, device)
    images, source = read_images(cfg, INPUT.value, SIZE.value, NUM_SAMPLES.value)
    total, channels, *size = images.shape
    known = make_masks(MASK.value, size, range(total), cfg.run.seed)
    if known.flatten(1).sum(1).min() < cfg.model.knn_neighbours:
        raise UserError(f"--mask={MASK.value} leaves fewer known pixels than model.knn_neighbours="
                        f"{cfg.model.knn_neighbours}; use another mask")
    modules = load_autoencoder(cfg, device).requires_grad_(False)  # guidance needs gradients of the state alone
    draw_z, latent_model = latent_sampler(LATENT_CONFIG, cfg, device, modules["encoder"])

    output = Path(OUTPUT.value or f"inpainting/{cfg.run.experiment}_{Path(MASK.value).stem}")
    settings = {**source, "size": size, "mask": MASK.value, "guidance": GUIDANCE.value,
                "consistency": CONSISTENCY.value, "jumps": JUMPS.value, "steps": STEPS.value, "seed": cfg.run.seed,
                "decoder": identity(autoencoder_path(cfg)), "latent_model": latent_model}
    folders = {name: ImageFolder(output / name, total, settings, output) for name in FOLDERS}

    at_once = images_at_once(cfg.train.sample_size, size, MAX_POINTS)
    for indices, progress in folders["results"].missing_batches(at_once, evaluations=STEPS.value):
        truth, mask = to_float(images[indices]).to(device), known[indices].to(device)
        constraint = Constraint(KnownPixels(mask), mask * truth, diffusion.mollifier)
        generators = rng.sample_generators(device, indices, cfg.run.seed, "inpainting")
        with autocast(device, dtype):
            z = draw_z(indices) if draw_z else encode(modules["encoder"], truth, mask)
            generated = decode(
                modules["decoder"], diffusion, z, size, generators=generators, channels=channels, progress=progress,
                path=lambda denoise, x, constraint=constraint, generators=generators: guided_ddim(
                    denoise, x, diffusion.schedule, constraint, GUIDANCE.value, CONSISTENCY.value, JUMPS.value,
                    generators, diffusion.mollifier.noise_like))
        pictures = (truth, torch.where(mask, truth, 1.0), generated, constraint.enforce(generated))
        for folder, batch in zip(folders.values(), pictures, strict=True):
            folder.save(indices, batch)

    scores = score(folders, known)
    write_scores(output / "scores.json", scores, settings)
    shown = range(min(total, SHOWN))
    save_sheet({name: [read_image(folder.file(i)) for i in shown] for name, folder in folders.items()},
               output / "grid.png")
    print(f"{total} images: PSNR {scores['psnr_known']:.2f} dB on known pixels before they are put back, "
          f"{scores['psnr_unknown']:.2f} dB on unknown ones (their mean colour: "
          f"{scores['psnr_unknown_of_mean_colour']:.2f}); texture {scores['texture']:.2f}, seam {scores['seam']:.2f}; "
          f"images in {output}")


def score(folders, known):
    """What the PNGs are worth: mean PSNR in dB, and of unknown regions the sums of absolute differences between
    neighbouring pixels within them (texture) and across their border (seam), both as a multiple of the originals'."""
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
