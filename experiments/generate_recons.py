"""Reconstruct images of a data set: encode them, and decode them at any resolution.

    python experiments/generate_recons.py --config configs/ffhq_256_config.py [--num_samples 64] [--output recons]

Writes <output>/originals/00000.png, …, <output>/reconstructions/00000.png, … and scores.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags
from torch.utils.data import Subset

from data.datasets import build_dataset, log_images
from data.loader import all_batches
from experiments.lib.image_folders import ImageFolder
from experiments.lib.sampling import (
    TrainedAutoencoder,
    arrays_flag,
    condition_flags,
    inv_snr_flag,
    max_points_flag,
    parse_image_size,
    sampler_flag,
    size_flag,
    steps_flag,
)
from experiments.metrics.images import reconstruction_scores
from utils import cli, config, distributed
from utils.errors import UserError
from utils.files import write_json

CONFIG = config.define_config_flag("config", "config of the trained autoencoder")
SPLIT = flags.DEFINE_enum("split", "heldout", ["heldout", "train"], "images to reconstruct")
SIZE, SAMPLER, STEPS = size_flag("the reconstructions"), sampler_flag(), steps_flag()
NUM_SAMPLES = flags.DEFINE_integer("num_samples", None, "largest number of images; default: data.fid_samples",
                                   lower_bound=1)
INV_SNR, MAX_POINTS, ARRAYS = inv_snr_flag(), max_points_flag(), arrays_flag()
CONTROL = condition_flags()
OUTPUT = flags.DEFINE_string("output", None, "folder for the images; default: reconstructions/<experiment>_<size>")


def main():
    cfg = config.read_trained_autoencoder_config(CONFIG)
    if not cfg.model.z_dim:
        raise UserError("config.model.z_dim=0: a model without an encoder reconstructs nothing; use "
                        "generate_samples.py")
    size = parse_image_size(SIZE.value, cfg.data.img_size)
    autoencoder = TrainedAutoencoder(cfg, STEPS.value, SAMPLER.value, MAX_POINTS.value, inv_snr=INV_SNR.value,
                                     control=CONTROL)
    autoencoder.check_size(size)
    dataset = build_dataset(cfg, train=SPLIT.value == "train")
    autoencoder.use_data(dataset)
    log_images(dataset)

    output = Path(OUTPUT.value or f"reconstructions/{cfg.run.experiment}_{size[0]}x{size[1]}")
    total = min(NUM_SAMPLES.value or cfg.data.fid_samples, len(dataset))
    origin = {"split": SPLIT.value, "data": dataset.fingerprint()}
    originals = ImageFolder(output / "originals", total, origin, output, ARRAYS.value)
    reconstructions = ImageFolder(output / "reconstructions", total, {
        **origin, "size": list(size), "seed": cfg.run.seed, "sampler": autoencoder.sampler, "steps": autoencoder.steps,
        "inv_snr": INV_SNR.value, "decoder": autoencoder.identity, **autoencoder.settings}, output, ARRAYS.value)

    for indices, progress in reconstructions.missing_batches(cfg.train.sample_size, autoencoder.steps, [originals]):
        images, _, own = next(all_batches(Subset(dataset, indices), len(indices), autoencoder.device))
        generators = autoencoder.generators(indices, "reconstruction")
        originals.save(indices, images)
        condition = own if autoencoder.from_data else autoencoder.condition(indices)
        reconstructions.save(indices, autoencoder.decode(autoencoder.encode(images), size, generators=generators,
                                                         progress=progress, condition=condition))

    if distributed.is_main():
        scores = reconstruction_scores(originals.load(), reconstructions.load(), autoencoder.diffusion.mollifier)
        write_json(output / "scores.json", scores)
        print(f"{total} images: mollified PSNR {scores['mollified_psnr']:.2f} dB; the nearest original is the image's "
              f"own for {scores['nearest_is_own']} of {total} reconstructions; images in {output}")


if __name__ == "__main__":
    cli.run(main, shared=True)
