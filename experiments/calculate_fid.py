"""Scores a folder of samples against real images: Fréchet distance (FID, FID_CLIP) and KID.

    python experiments/calculate_fid.py --config configs/ffhq_256_config.py --samples samples/

The paper's protocol: 50,000 samples against real images that are resized and never flipped, in CLIP ViT-B/32 features.
Without a network connection or the CLIP weights, --feature_model=efficientnet_lite0 works; its figure is not a FID.
"""

import json
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags
from ml_collections import ConfigDict
from torch.utils.data import ConcatDataset

from configs.defaults import autoencoder_config
from data.datasets import build_dataset
from utils import cli
from utils.config import define_config_flag, read_autoencoder_config, read_latent_config
from utils.device import resolve_device
from utils.errors import UserError
from utils.feature_cache import cached_statistics
from utils.features import NETWORKS, PREPROCESSING_VERSION, build_feature_model, extract
from utils.files import replacing
from utils.metrics import MIN_IMAGES, score, statistics
from utils.sample_folder import SampleFolder

FEW = 10_000  # images below which a Fréchet distance is clearly too high

CONFIG = define_config_flag("config", "Stage-1 config, whose data set holds the real images, or a latent config.")
DECODER_CONFIG = define_config_flag("decoder_config", "Stage-1 config, where --config is a latent one.")
SAMPLES = flags.DEFINE_string("samples", None, "Folder of the images to score.")
REAL = flags.DEFINE_string("real", None, "Folder of the real images, in place of a config's data set.")
FEATURE_MODEL = flags.DEFINE_enum("feature_model", "clip_vit_b_32", list(NETWORKS),
                                  "Network whose features are compared.")
WEIGHTS = flags.DEFINE_string("weights", None, "File with the weights of the feature network.")
DOWNLOAD = flags.DEFINE_bool("download", False, "Download the weights if they are not on this machine.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", None, "Score the first so many by name; default all.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images in a batch.", lower_bound=1)
SPLIT = flags.DEFINE_enum("split", "train", ["train", "heldout", "all"], "Which real images of the config's data set.")
OUTPUT = flags.DEFINE_string("output", None, "Also write the scores to this JSON file.")


def main():
    check_flags()
    samples = SampleFolder(SAMPLES.value, NUM_SAMPLES.value)
    data, run = read_configs()
    model = build_feature_model(FEATURE_MODEL.value, resolve_device(run.device), WEIGHTS.value, DOWNLOAD.value)
    real = real_images(data, samples.size)
    check_images(samples, real)
    workers = min(data.num_workers, os.cpu_count() or 1)

    def features(images, label):
        return statistics(extract(images, model, batch_size=BATCH_SIZE.value, num_workers=workers, progress=label))

    key = {"fingerprints": [part.fingerprint() for part in real.datasets], "feature_model": model.name,
           "weights_sha256": model.sha256, "preprocessing": PREPROCESSING_VERSION}
    height, width = real.datasets[0].size
    real_statistics = cached_statistics(Path(run.output_dir) / "statistics",
                                        f"{data.name}_{height}x{width}_{model.name}", key,
                                        lambda: features(real, "real images"))
    described = [part.describe() for part in real.datasets]
    report(score(features(samples, "samples"), real_statistics), model.score_name, {"real_images": described, **key})


def check_flags():
    """What can be said before anything is read."""
    if SAMPLES.value is None:
        raise UserError("--samples is missing; give the folder that experiments/generate_samples.py wrote")
    if REAL.value is not None and not Path(REAL.value).is_dir():
        raise UserError(f"--real={REAL.value} is not a folder; give the folder with the real images")
    if REAL.value is not None and flags.FLAGS["split"].present:
        raise UserError("--split chooses images of a config's data set; with --real all images of the folder are used")
    if OUTPUT.value is not None and Path(OUTPUT.value).is_dir():
        raise UserError(f"--output={OUTPUT.value} is a folder; give the name of a JSON file")


def read_configs():
    """(data section of the real images, run section to work under), from whichever of the flags were given."""
    stage_1 = next((flag for flag in (DECODER_CONFIG, CONFIG) if flag.value and "mc_integral" in flag.value), None)
    latent = CONFIG.value is not None and "mc_integral" not in CONFIG.value
    if stage_1 is None and REAL.value is None:
        raise UserError("the real images are missing; give --real FOLDER, or a stage-1 config such as "
                        f"--{'decoder_config' if latent else 'config'} configs/ffhq_256_config.py")
    config = read_autoencoder_config(stage_1) if stage_1 is not None else autoencoder_config(64)
    return config.data, (read_latent_config(CONFIG) if latent else config).run


def real_images(data, sample_size):
    """Images of the chosen split at data.img_size; with --real, all of that folder, at the size of the samples."""
    parts = {"train": [True], "heldout": [False], "all": [True, False]}[SPLIT.value if REAL.value is None else "all"]
    config, size = ConfigDict({"data": data}), None
    if REAL.value is not None:
        config.data.update(name="folder", root_dir=REAL.value)
        size = sample_size
    return ConcatDataset([build_dataset(config, train, size) for train in parts])


def check_images(samples, real):
    """Refuses too few images; warns where a comparison would mislead."""
    for name, images in (("samples", samples), ("real images", real)):
        if len(images) < MIN_IMAGES:
            raise UserError(f"{len(images)} {name} are too few for a score; at least {MIN_IMAGES} are needed")
    height, width = real.datasets[0].size
    if samples.size != (height, width):
        logging.warning("samples are %dx%d but real images %dx%d; data.img_size of the stage-1 config is the size that "
                        "real images are compared at", *samples.size, height, width)
    if min(len(samples), len(real)) < FEW:
        logging.warning("%d samples and %d real images: below %d the distance is biased upwards; compare it only with "
                        "scores of as many images", len(samples), len(real), FEW)


def report(scores, score_name, details):
    """One line on stdout, and the JSON file where --output asks for it."""
    print(f"{score_name} {scores['frechet']:.2f} ({scores['count_a']} samples, {scores['count_b']} real images)"
          f" · KID {scores['kid']:.4f} ± {scores['kid_standard_error']:.4f}")
    if OUTPUT.value is None:
        return
    record = {"score": score_name, "value": scores["frechet"], "kid": scores["kid"],
              "kid_standard_error": scores["kid_standard_error"], "samples": SAMPLES.value,
              "num_samples": scores["count_a"], "num_real_images": scores["count_b"], **details}
    with replacing(OUTPUT.value) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
