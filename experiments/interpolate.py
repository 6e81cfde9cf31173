"""Move through the latent space: between images or samples, and along the directions in which encodings vary most.

    python experiments/interpolate.py --config configs/ffhq_256_config.py [--num_pairs 4] [--frames 9]

Between held-out images, or those of --input, z goes from one encoding to the other, and the state the chain starts at
from one inverted by DDIM to the other, so that the ends are the images again; with --latent_config between samples.
Writes <output>/originals/, frames/ and directions/, these two also as sheets (PNG), animations (GIF) and strips, and
scores.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags
from tqdm import tqdm

from data.datasets import build_dataset
from data.images import read_image
from data.loader import to_float
from diffusion.gaussian_diffusion import build_diffusion
from diffusion.sampling import encode, invert
from experiments.lib.applications import (
    check_encoder,
    check_finite,
    encode_all,
    latent_sampler,
    read_images,
    write_scores,
)
from experiments.lib.image_folders import ImageFolder
from experiments.lib.latent_paths import along, between, principal_directions, render, show
from experiments.lib.sampling import MAX_POINTS
from experiments.metrics.images import psnr
from models.large_images import check_max_points
from models.load import autoencoder_path, load_autoencoder
from utils import cli, config, rng
from utils.checkpoint import identity
from utils.device import autocast, resolve_device, resolve_dtype
from utils.errors import UserError
from utils.images import to_uint8

CONFIG = config.define_config_flag("config", "config of the trained autoencoder")
LATENT_CONFIG = config.define_config_flag("latent_config", "latent config: between its samples instead of images")
START = flags.DEFINE_enum("start", None, ["invert", "noise"], "the state the chain starts at: the one that DDIM leads "
                          "to the image, or noise; default: invert, and noise for samples")
PAIRS = flags.DEFINE_integer("num_pairs", 4, "how many pairs at most", lower_bound=1)
FRAMES = flags.DEFINE_integer("frames", 9, "images on the way, ends included", lower_bound=2)
DIRECTIONS = flags.DEFINE_integer("directions", 3, "how many principal directions; 0 leaves them out", lower_bound=0)
REACH = flags.DEFINE_float("reach", 2.0, "standard deviations to go along them, each way", lower_bound=0.0,
                           upper_bound=1000.0)
ENCODINGS = flags.DEFINE_integer("encodings", 1000, "training images whose encodings give the mean and the directions",
                                 lower_bound=2)
STEPS = flags.DEFINE_integer("sampling_steps", 100, "steps of DDIM", lower_bound=1)
SIZE = flags.DEFINE_string("sample_img_size", None, "side of the images in pixels, or HEIGHTxWIDTH; default: the "
                           "training resolution")
INPUT = flags.DEFINE_string("input", None, "folder of images of one size, instead of held-out ones")
POINTS = flags.DEFINE_integer("max_points", MAX_POINTS, "pixels, of all images together, that the network takes at a "
                              "time; fewer need less memory", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "folder for the results; default: interpolation/<experiment>")


def main():
    cfg = config.read_trained_autoencoder_config(CONFIG)
    samples = LATENT_CONFIG.value is not None
    start = START.value or ("noise" if samples else "invert")
    check_flags(cfg, samples)
    diffusion = build_diffusion(cfg, STEPS.value)
    device = resolve_device(cfg.run.device)
    size, images, source = config.parse_image_size(SIZE.value, cfg.data.img_size), None, {}
    if not samples:
        images, source = read_images(cfg, INPUT.value, SIZE.value, 2 * PAIRS.value)
        size = tuple(images.shape[-2:])
    pairs = PAIRS.value if samples else len(images) // 2
    if pairs == 0:
        raise UserError("there is one image and none to go to; give two or more")
    train_set = build_dataset(cfg, train=True)
    modules = load_autoencoder(cfg, device)
    encoder, decoder = modules["encoder"], modules["decoder"]
    check_max_points(decoder, size, POINTS.value)
    draw_z, latent_model = latent_sampler(LATENT_CONFIG, cfg, device, encoder)

    output = Path(OUTPUT.value or f"interpolation/{cfg.run.experiment}")
    settings = {**source, "size": list(size), "start": start, "frames": FRAMES.value, "steps": STEPS.value,
                "directions": DIRECTIONS.value, "reach": REACH.value, "encodings": ENCODINGS.value,
                "seed": cfg.run.seed, "decoder": identity(autoencoder_path(cfg)), "latent_model": latent_model}
    counts = {"originals": 0 if samples else 2, "frames": FRAMES.value, "directions": DIRECTIONS.value * FRAMES.value}
    folders = {name: ImageFolder(output / name, pairs * count, settings, output)
               for name, count in counts.items() if count}

    ends = []
    with autocast(device, resolve_dtype(cfg.train, device)):
        found = principal_directions(encode_all(encoder, train_set, ENCODINGS.value, cfg.train.sample_size, device),
                                     DIRECTIONS.value)
        for index in tqdm(torch.arange(2 * pairs).split(cfg.train.sample_size), desc="ends", unit="batch"):
            if samples:
                batch, z = torch.empty(len(index), cfg.data.channels, *size, device=device), draw_z(index)
            else:
                batch = to_float(images[index]).to(device)
                z = encode(encoder, batch, max_points=POINTS.value)
                folders["originals"].save(index.tolist(), batch)
            if start == "invert":
                x = invert(decoder, diffusion, batch, z, max_points=POINTS.value)
            else:
                x = diffusion.mollifier.noise_like(batch, rng.sample_generators(device, index, cfg.run.seed, "image"))
            ends += zip(z, x, strict=True)
        firsts, lasts = ends[::2], ends[1::2]
        ways = [(between(z_a, z_b, FRAMES.value, found.mean), between(x_a, x_b, FRAMES.value))
                for (z_a, x_a), (z_b, x_b) in zip(firsts, lasts, strict=True)]
        lines = [(along(z, std * direction, REACH.value, FRAMES.value), x.expand(FRAMES.value, *x.shape))
                 for z, x in firsts for direction, std in zip(found.directions, found.std, strict=True)]
        for name, walks in (("frames", ways), ("directions", lines)):
            if walks:
                render(folders[name], walks, decoder, diffusion, cfg.train.sample_size, POINTS.value)

    scores = {"explained_variance": found.share.tolist()}
    if not samples:
        scores |= closeness(folders["frames"], images[:2 * pairs], diffusion.mollifier)
    write_scores(output / "scores.json", {"pairs": pairs, **scores}, settings)
    originals = () if samples else (("from", list(images[::2][:pairs])), ("to", list(images[1::2])))
    show(folders["frames"], [f"{share:.2f}" for share in torch.linspace(0, 1, FRAMES.value)], pairs, *originals)
    if lines:
        steps = torch.linspace(-REACH.value, REACH.value, FRAMES.value)
        show(folders["directions"], [f"{step:+.1f} std" for step in steps], DIRECTIONS.value)
    print(f"{pairs} pairs in {output}" + "".join(f" · {name} {value:.2f} dB" for name, value in scores.items()
                                                 if name.startswith("psnr")))


def check_flags(cfg, samples):
    """What is impossible or does not go together."""
    check_encoder(cfg)
    check_finite(REACH)
    if samples and (INPUT.value is not None or START.value == "invert"):
        raise UserError("--input and --start=invert need images, and with --latent_config the ends are samples; leave "
                        "one out")
    if DIRECTIONS.value > cfg.model.z_dim:
        raise UserError(f"--directions={DIRECTIONS.value} are more than model.z_dim={cfg.model.z_dim} has; lower it")


def closeness(frames, images, mollifier):
    """Mean PSNR in dB of the first and last image of each way against the original, and that of the originals when they
    are mollified and sharpened again, which is as close as a state can come."""
    places = [place for first in range(0, frames.total, FRAMES.value) for place in (first, first + FRAMES.value - 1)]
    limit = to_uint8(mollifier.sharpen(mollifier.blur(to_float(images))))
    values = torch.tensor([(psnr(read_image(frames.file(place)), image), psnr(best, image))
                           for place, image, best in zip(places, images, limit, strict=True)])
    return dict(zip(("psnr_of_the_ends", "psnr_of_the_mollifier"), values.mean(0).tolist(), strict=True))


if __name__ == "__main__":
    cli.run(main)
