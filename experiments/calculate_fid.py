r"""Scores samples against real images: Fréchet distance (FID, FID_CLIP), KID, precision and recall.

    python experiments/calculate_fid.py --config configs/ffhq_256_config.py --samples samples/
    python experiments/calculate_fid.py --config configs/ffhq_latent_config.py \
        --decoder_config configs/ffhq_256_config.py

--samples names the folder to score. Without it, samples of a trained pair of models are made first, as
generate_samples.py makes them. The defaults are the paper's protocol; all departures from it are printed. Without the
CLIP weights, --feature_model=efficientnet_lite0 works offline, but its score is not comparable with any FID.
"""

import json
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags
from ml_collections import ConfigDict

from configs.defaults import autoencoder_config
from data.datasets import build_dataset, log_images, reading
from experiments.lib.image_folders import SampleFolder
from experiments.lib.sampling import define_sampling_flags, make_samples, parse_image_size
from experiments.metrics.classes import by_class, compare_classes, describe_classes, named_by_colour
from experiments.metrics.features import NETWORKS, build_feature_model
from experiments.metrics.fid import MIN_IMAGES, compare, departures, describe, paper_split, summary
from utils import cli, config, distributed
from utils.device import resolve_device
from utils.errors import UserError
from utils.files import check_output_file, replacing

FEW = 10_000  # with fewer images the bias of the Fréchet distance is large

CONFIG = config.define_config_flag("config", "stage-1 config, whose data set is the real images, or a latent config")
DECODER_CONFIG = config.define_config_flag("decoder_config", "stage-1 config, if --config is a latent config")
SAMPLES = flags.DEFINE_string("samples", None, "folder of the images to score; default: make samples")
OPTIONS = define_sampling_flags()
REAL = flags.DEFINE_string("real", None, "folder of the real images, instead of a config's data set")
SPLIT = flags.DEFINE_enum("split", None, ["train", "heldout", "all"], "real images of the config's data set; default: "
                          "the paper's, all of ffhq and train of other data sets")
REAL_SIZE = flags.DEFINE_string("real_img_size", None, "size of the real images in pixels, SIDE or HEIGHTxWIDTH; "
                                "default: data.img_size, or with --real or --crops that of the samples")
FEATURE_MODEL = flags.DEFINE_enum("feature_model", "clip_vit_b_32", list(NETWORKS), "network that computes features")
flags.DEFINE_alias("model", "feature_model")
WEIGHTS = flags.DEFINE_string("weights", None, "file with the weights of the feature network")
DOWNLOAD = flags.DEFINE_bool("download", False, "download the weights if they are missing")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", None, "number of samples, the first by name; default: all in the "
                                   "folder, or data.fid_samples to make", lower_bound=1)
CROPS = flags.DEFINE_integer("crops", None, "number of random crops at full resolution to compare, instead of resized "
                             "images", lower_bound=MIN_IMAGES)
CROP_SIZE = flags.DEFINE_integer("crop_size", None, "side of a crop; default: the network's input size", lower_bound=16)
NEIGHBOURS = flags.DEFINE_integer("neighbours", 3, "k of precision and recall", lower_bound=1)
PER_CONDITION = flags.DEFINE_bool("per_condition", False, "score the samples of each class as well")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "batch size of the network", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "JSON file for the scores")


def main():
    check_flags()
    latent, autoencoder = read_configs()
    run, data = (latent or autoencoder).run, autoencoder.data
    given = SampleFolder(SAMPLES.value, NUM_SAMPLES.value, **reading(data)) if SAMPLES.value else None
    if given and len(given) < (NUM_SAMPLES.value or 0):
        raise UserError(f"--num_samples={NUM_SAMPLES.value}, but --samples={SAMPLES.value} has only {len(given)} "
                        "images; make more or lower it")
    model = build_feature_model(FEATURE_MODEL.value, resolve_device(run.device), WEIGHTS.value, DOWNLOAD.value,
                                data.channels)
    crop_size = CROP_SIZE.value or model.size
    size = given.size if given else parse_image_size(OPTIONS.size.value, data.img_size)
    count = len(given) if given else NUM_SAMPLES.value or (latent or autoencoder).data.fid_samples
    real = real_images(data, size)
    check_images(count, size, real, crop_size)
    log_images(*([given] if given else []), *real)
    samples = given or SampleFolder(make_samples(latent, autoencoder, OPTIONS, count).path, count)

    parts = by_class(samples, real) if PER_CONDITION.value else {}
    settings = (model, Path(run.output_dir) / "statistics", CROPS.value, crop_size, NEIGHBOURS.value, BATCH_SIZE.value,
                min(data.num_workers, os.cpu_count() or 1))
    found, classes = compare(samples, real, *settings), compare_classes(parts, *settings)
    if not distributed.is_main():
        return
    record = {"score": ("crop-" if CROPS.value else "") + model.score_name, "value": found.pop("frechet"),
              "num_samples": found.pop("count_a"), "num_real_images": found.pop("count_b"),
              "samples": str(samples.folder), "size": list(size), "sampling": samples.settings, **found}
    record["unlike_the_paper"] = departures(record)
    if PER_CONDITION.value:
        record |= {"per_condition": classes, "named_by_colour": named_by_colour(
            parts, *(build_dataset(real_settings(data), train) for train in (True, False)))}
    if OUTPUT.value is not None:
        with replacing(OUTPUT.value) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(summary(record))
    print(f"protocol: {describe(record)}")
    for line in describe_classes(record):
        print(line)


def check_flags():
    """UserError for flags that do not go together."""
    if SAMPLES.value and OPTIONS.given():
        raise UserError(f"--{OPTIONS.given()[0]} is for making samples, but --samples names a folder; leave one out")
    if REAL.value and not Path(REAL.value).is_dir():
        raise UserError(f"--real={REAL.value} is not a folder; give the folder with the real images")
    if REAL.value and SPLIT.present:
        raise UserError("--split selects images of a config's data set; with --real all images of the folder are used")
    if CROP_SIZE.value and not CROPS.value:
        raise UserError(f"--crop_size={CROP_SIZE.value} needs --crops, the number of crops")
    if CROPS.value and REAL_SIZE.value:
        raise UserError("--crops compares images at the resolution of the samples; leave out --real_img_size")
    check_output_file(OUTPUT.value, "output")


def read_configs():
    """(latent config or None, autoencoder config)."""
    latent, autoencoder = config.read_trained_stages(CONFIG, DECODER_CONFIG)
    if not SAMPLES.value and (autoencoder is None or latent is None and autoencoder.model.z_dim):
        raise UserError("--samples is missing; give a folder, or --config and --decoder_config to make the samples")
    if autoencoder is None and not REAL.value:
        raise UserError("the real images are missing; give --real FOLDER, or a stage-1 config such as "
                        f"--{'config' if latent is None else 'decoder_config'} configs/ffhq_256_config.py")
    return latent, autoencoder or autoencoder_config(64)


def real_images(data, sample_size):
    """Data sets of the selected split, or of all images in --real, at the size at which they are compared."""
    split = "all" if REAL.value else SPLIT.value or paper_split(data.name)
    parts = {"train": [True], "heldout": [False], "all": [True, False]}[split]
    size = sample_size if REAL.value or CROPS.value else None
    if REAL_SIZE.value:
        size = parse_image_size(REAL_SIZE.value, None, flag="real_img_size")
    return [build_dataset(real_settings(data), train, size) for train in parts]


def real_settings(data):
    """A config of the real images: section data of the config, or the folder --real."""
    settings = ConfigDict({"data": data.copy_and_resolve_references()})
    if REAL.value:
        settings.data.update(name="folder", root_dir=REAL.value, condition="class" if PER_CONDITION.value else "none")
    return settings


def check_images(num_samples, sample_size, real, crop_size):
    """UserError for too few or too small images; warnings if a comparison would mislead."""
    if num_samples < (NUM_SAMPLES.value or 0):
        raise UserError(f"--num_samples={NUM_SAMPLES.value} but --samples={SAMPLES.value} has only {num_samples} "
                        "images; make more, or lower it")
    num_real, real_size, fewest = sum(map(len, real)), real[0].size, max(MIN_IMAGES, NEIGHBOURS.value + 1)
    for name, count in (("samples", num_samples), ("real images", num_real)):
        if count < fewest:
            raise UserError(f"{count} {name} are too few for a score; at least {fewest} are needed")
    if CROPS.value and crop_size > min(sample_size):
        raise UserError(f"--crop_size={crop_size} does not fit into samples of {sample_size[0]}x{sample_size[1]}; "
                        "lower it, or score whole images without --crops")
    if sample_size != real_size:
        logging.warning("samples are %dx%d but real images %dx%d, data.img_size of the stage-1 config; --real_img_size "
                        "sets another", *sample_size, *real_size)
    if min(num_samples, num_real) < FEW:
        logging.warning("%d samples and %d real images: below %d the Fréchet distance is biased upwards; compare it "
                        "only with scores of equally many images", num_samples, num_real, FEW)


if __name__ == "__main__":
    cli.run(main, shared=True)
