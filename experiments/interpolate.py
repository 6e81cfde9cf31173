"""Interpolate between latents of images or samples, and move along the principal directions of the latents.

    python experiments/interpolate.py --config configs/ffhq_256_config.py [--num_pairs 4] [--frames 9]

Between two images, held out or from --input, both z and the first state of the chain, found by DDIM inversion, are
interpolated (docs/method.md, 6.3), so that the path starts and ends at the images. With --latent_config the path leads
from one sample to another. Writes <output>/originals/, frames/ and directions/, the last two also as grids (PNG),
animations (GIF) and strips, and scores.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags
from tqdm import tqdm

from data.datasets import build_dataset, log_images
from data.images import read_image
from data.loader import to_float
from experiments.lib.applications import Application, check_encoder, encode_first
from experiments.lib.latent_paths import along, between, principal_directions, render, show
from experiments.lib.sampling import float_flag, parse_image_size
from experiments.metrics.images import psnr
from utils import cli, config
from utils.errors import UserError
from utils.images import to_uint8

APPLICATION = Application("interpolation", steps=100, latents="interpolate samples of its model", count=None,
                          images="held-out images or samples")
START = flags.DEFINE_enum("start", None, ["invert", "noise"], "first state of the chain: inverted from the image, or "
                          "noise; default: invert for images, noise for samples")
PAIRS = flags.DEFINE_integer("num_pairs", 4, "largest number of pairs", lower_bound=1)
FRAMES = flags.DEFINE_integer("frames", 9, "images of a path, ends included", lower_bound=2)
DIRECTIONS = flags.DEFINE_integer("directions", 3, "number of principal directions; 0 for none", lower_bound=0)
REACH = float_flag("reach", 2.0, "length of a path along a direction, each way, in standard deviations", high=1000.0)
ENCODINGS = flags.DEFINE_integer("encodings", 1000, "number of training images whose encodings give the mean and the "
                                 "principal directions", lower_bound=2)


def main():
    cfg = config.read_trained_autoencoder_config(APPLICATION.config)
    samples = APPLICATION.latent_config.value is not None
    start = START.value or ("noise" if samples else "invert")
    check_flags(cfg, samples)
    autoencoder = APPLICATION.load(cfg)
    if samples:
        images, origin, pairs = None, {}, PAIRS.value
        if autoencoder.from_data:
            autoencoder.use_data(build_dataset(cfg, train=False))
        size = parse_image_size(APPLICATION.size.value, cfg.data.img_size)
    else:
        images, origin = APPLICATION.read_images(autoencoder, 2 * PAIRS.value)
        size, pairs = tuple(images.shape[-2:]), len(images) // 2
    if pairs == 0:
        raise UserError("a path needs two images, and there is only one; give more")
    train_set = build_dataset(cfg, train=True)
    log_images(train_set)
    autoencoder.check_size(size)
    draw_latents, latent_model = APPLICATION.latent_sampler(autoencoder)
    counts = {"originals": 0 if samples else 2 * pairs, "frames": pairs * FRAMES.value,
              "directions": pairs * DIRECTIONS.value * FRAMES.value}
    results = APPLICATION.results(
        autoencoder, "", {name: count for name, count in counts.items() if count},
        {**origin, "size": list(size), "start": start, "frames": FRAMES.value, "directions": DIRECTIONS.value,
         "reach": REACH.value, "encodings": ENCODINGS.value, "latent_model": latent_model})
    folders = results.folders

    principal = principal_directions(encode_first(autoencoder, train_set, ENCODINGS.value), DIRECTIONS.value)
    ends = []  # (z [Z], first state [C, H, W], index) of each image or sample
    for index in tqdm(torch.arange(2 * pairs).split(cfg.train.sample_size), desc="ends", unit="batch"):
        if samples:
            z, batch = draw_latents(index), torch.empty(len(index), cfg.data.channels, *size, device=autoencoder.device)
        else:
            batch = to_float(images[index]).to(autoencoder.device)
            z = autoencoder.encode(batch)
            folders["originals"].save(index.tolist(), batch)
        if start == "invert":
            x = autoencoder.invert(batch, z, autoencoder.condition(index))
        else:
            x = autoencoder.diffusion.mollifier.noise_like(batch, autoencoder.generators(index, "image"))
        ends += zip(z, x, index, strict=True)
    firsts, lasts = ends[::2], ends[1::2]
    second_half = torch.arange(FRAMES.value) >= FRAMES.value / 2  # has the condition of the end
    paths = {"frames": [(between(z_a, z_b, FRAMES.value, principal.mean), between(x_a, x_b, FRAMES.value),
                         torch.where(second_half, b, a))
                        for (z_a, x_a, a), (z_b, x_b, b) in zip(firsts, lasts, strict=True)],
             "directions": [(along(z, std * direction, REACH.value, FRAMES.value), x.expand(FRAMES.value, *x.shape),
                             index.expand(FRAMES.value))
                            for z, x, index in firsts
                            for direction, std in zip(principal.directions, principal.std, strict=True)]}
    for name, walks in paths.items():
        if walks:
            render(folders[name], walks, autoencoder)

    scores = {"explained_variance": principal.share.tolist()}
    if not samples:
        scores |= score_ends(folders["frames"], images[:2 * pairs], autoencoder.diffusion.mollifier)
    results.write_scores({"pairs": pairs, **scores})
    originals = () if samples else (("from", list(images[::2][:pairs])), ("to", list(images[1::2])))
    show(folders["frames"], [f"{share:.2f}" for share in torch.linspace(0, 1, FRAMES.value)], pairs, *originals)
    if "directions" in folders:
        steps = torch.linspace(-REACH.value, REACH.value, FRAMES.value)
        show(folders["directions"], [f"{step:+.1f} std" for step in steps], DIRECTIONS.value)
    print(f"{pairs} pairs in {results.output}" + "".join(f" · {name} {value:.2f} dB" for name, value in scores.items()
                                                 if name.startswith("psnr")))


def check_flags(cfg, samples):
    """UserError for flags that contradict each other or the model."""
    check_encoder(cfg)
    if samples and (APPLICATION.input.value is not None or START.value == "invert"):
        raise UserError("--input and --start=invert need images, and --latent_config interpolates samples; leave one "
                        "out")
    if DIRECTIONS.value > cfg.model.z_dim:
        raise UserError(f"--directions={DIRECTIONS.value} must be at most model.z_dim={cfg.model.z_dim}; lower it")


def score_ends(frames, images, mollifier):
    """Mean PSNR in dB of the first and last image of each path against the originals, and, as the limit of what a state
    can hold, of the originals mollified and sharpened."""
    places = [place for first in range(0, frames.total, FRAMES.value) for place in (first, first + FRAMES.value - 1)]
    limit = to_uint8(mollifier.sharpen(mollifier.blur(to_float(images))))
    values = torch.tensor([(psnr(read_image(frames.file(place)), image), psnr(best, image))
                           for place, image, best in zip(places, images, limit, strict=True)])
    return dict(zip(("psnr_of_the_ends", "psnr_of_the_mollifier"), values.mean(0).tolist(), strict=True))


if __name__ == "__main__":
    cli.run(main)
