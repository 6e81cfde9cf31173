"""Compare samples of a flow of Gaussian random fields with the exact flow of the same noise, at any resolutions.

    python experiments/flow_error.py --config configs/random_fields_flow_config.py --samples fields_1,fields_4

Each folder holds samples of one size from generate_samples.py, of a model without an encoder. For Gaussian data the
flow multiplies every coefficient of the noise by a constant (experiments.metrics.images.exact_flow). Prints the
relative L2 error of the samples after the mollifier, as states of the process have it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags

from data.loader import to_float
from data.random_fields import spectrum
from diffusion.gaussian_diffusion import build_diffusion
from experiments.lib.image_folders import SampleFolder
from experiments.metrics.images import exact_flow
from utils import cli, config, rng
from utils.errors import UserError

CONFIG = config.define_config_flag("config", "autoencoder config, for its mollifier")
SAMPLES = flags.DEFINE_list("samples", [], "folders of samples, separated by commas")


def main():
    cfg = config.read_trained_autoencoder_config(CONFIG)
    if cfg.data.function != "data.random_fields:gaussian_field" or cfg.model.z_dim:
        raise UserError("--config needs data.function=data.random_fields:gaussian_field and model.z_dim=0, such as "
                        "configs/random_fields_flow_config.py: no other model has a known flow")
    if not SAMPLES.value:
        raise UserError("--samples is missing; give folders of generate_samples.py, separated by commas")
    mollifier = build_diffusion(cfg).mollifier
    for name in SAMPLES.value:
        folder = SampleFolder(name, channels=1)
        made = folder.settings
        if not {"seed", "sampler", "steps"} <= set(made):
            raise UserError(f"--samples={name} has no settings.json of generate_samples.py; give a folder of it")
        print(f"{name}: {len(folder)} samples of {folder.size[0]}x{folder.size[1]}, {made['steps']} evaluations of "
              f"{made['sampler']}: relative error {relative_error(folder, mollifier):.4f}")


def relative_error(folder, mollifier):
    """‖samples − exact‖ / ‖exact‖ of a SampleFolder, both blurred by the mollifier."""
    samples = to_float(torch.stack([folder[i] for i in range(len(folder))]))
    streams = rng.sample_generators("cpu", range(len(folder)), folder.settings["seed"], "image")
    noise = mollifier.noise_like(torch.empty_like(samples), streams)
    exact = mollifier.sharpen(exact_flow(noise, spectrum(), mollifier.train_size)).clamp(-1, 1)
    difference, reference = mollifier.blur(samples - exact), mollifier.blur(exact)
    return (difference.norm() / reference.norm()).item()


if __name__ == "__main__":
    cli.run(main)
