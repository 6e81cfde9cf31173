"""Sample a folder of images, 00000.png, 00001.png, …, at any resolution.

    python experiments/generate_samples.py --config configs/ffhq_latent_config.py \
        --decoder_config configs/ffhq_256_config.py [--sample_img_size 512] [--num_samples 64] [--output samples/512]

Image i is a function of run.seed and i: it does not depend on the batch size. A run that was stopped continues
when the same command is given again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from diffusion.gaussian_diffusion import build_diffusion
from diffusion.generate import decode, sample_latents
from diffusion.samplers import SAMPLERS
from models.load import autoencoder_path, latent_path, load_autoencoder, load_latent_model
from utils import cli, config, rng
from utils.checkpoint import identity
from utils.device import autocast, resolve_device, resolve_dtype
from utils.errors import UserError
from utils.folder import ImageFolder

CONFIG = config.define_config_flag("config", "latent config, for example configs/ffhq_latent_config.py")
DECODER_CONFIG = config.define_config_flag("decoder_config", "config of the trained autoencoder")
SIZE = flags.DEFINE_string("sample_img_size", None, "side of the samples in pixels, or HEIGHTxWIDTH; default: the "
                           "training resolution")
SAMPLER = flags.DEFINE_enum("sampler", "ddim", SAMPLERS, "how images are sampled")
STEPS = flags.DEFINE_integer("sampling_steps", 100, "network evaluations per image", lower_bound=1)
ETA = flags.DEFINE_float("eta", 0.0, "noise of ddim: 0 none, 1 as much as ddpm", lower_bound=0.0, upper_bound=1.0)
LATENT_SAMPLER = flags.DEFINE_enum("latent_sampler", "ddpm", SAMPLERS, "how latents are sampled")
LATENT_STEPS = flags.DEFINE_integer("latent_sampling_steps", None, "network evaluations per latent; default: all",
                                    lower_bound=1)
NUM_SAMPLES = flags.DEFINE_integer("num_samples", None, "how many images; default: data.fid_samples",
                                   lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "folder for the images; default: samples/<experiment>_<size>")


def main():
    cfg, decoder_cfg = config.read_latent_config(CONFIG), config.read_autoencoder_config(DECODER_CONFIG)
    config.check_same_latent(cfg, decoder_cfg)
    height, width = size = config.parse_image_size(SIZE.value, decoder_cfg.data.img_size)
    if ETA.value and SAMPLER.value != "ddim":
        raise UserError(f"--eta={ETA.value} is of --sampler=ddim only; leave it out with {SAMPLER.value}")
    diffusion = build_diffusion(decoder_cfg, STEPS.value)
    latent_diffusion = build_diffusion(cfg, LATENT_STEPS.value)
    device = resolve_device(cfg.run.device)
    dtype, latent_dtype = resolve_dtype(decoder_cfg.train, device), resolve_dtype(cfg.train, device)
    autoencoder = load_autoencoder(decoder_cfg, device)
    latent_model, mean, std = load_latent_model(cfg, device, autoencoder["encoder"])

    folder = ImageFolder(
        OUTPUT.value or f"samples/{cfg.run.experiment}_{height}x{width}",
        total=NUM_SAMPLES.value or cfg.data.fid_samples,
        settings={"size": [height, width], "seed": cfg.run.seed, "sampler": SAMPLER.value, "steps": STEPS.value,
                  "eta": ETA.value, "latent_sampler": LATENT_SAMPLER.value, "latent_steps": LATENT_STEPS.value,
                  "decoder": identity(autoencoder_path(decoder_cfg)), "latent_model": identity(latent_path(cfg))})

    for indices, progress in folder.missing_batches(cfg.train.sample_size, evaluations=STEPS.value):
        with autocast(device, latent_dtype):
            z = sample_latents(latent_model, latent_diffusion, mean, std,
                               rng.sample_generators(device, indices, cfg.run.seed, "latent"), LATENT_SAMPLER.value)
        with autocast(device, dtype):
            images = decode(autoencoder["decoder"], diffusion, z, size, SAMPLER.value,
                            rng.sample_generators(device, indices, cfg.run.seed, "image"),
                            decoder_cfg.data.channels, ETA.value, progress)
        folder.save(indices, images)

if __name__ == "__main__":
    cli.run(main)
