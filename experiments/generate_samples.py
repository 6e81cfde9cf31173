r"""Sample a folder of images, 00000.png, 00001.png, …, at any resolution.

    python experiments/generate_samples.py --config configs/ffhq_latent_config.py \
        --decoder_config configs/ffhq_256_config.py [--sample_img_size 512] [--num_samples 64] [--output samples/512] \
        [--window 0.25 0.25 0.5 0.5]

A model without an encoder (model.z_dim=0) has no latent model; give its own config as --config.
Image i is a function of run.seed and i: it does not depend on the batch size or, under torchrun, on the number of
processes. The same command resumes an interrupted run.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from experiments.lib.sampling import arrays_flag, define_sampling_flags, make_samples
from utils import cli, config, distributed

CONFIG = config.define_config_flag("config", "latent config, for example configs/ffhq_latent_config.py, or config of a "
                                   "model without an encoder")
DECODER_CONFIG = config.define_config_flag("decoder_config", "config of the trained autoencoder")
OPTIONS = define_sampling_flags()
NUM_SAMPLES = flags.DEFINE_integer("num_samples", None, "number of images; default: data.fid_samples", lower_bound=1)
WINDOW = flags.DEFINE_string("window", None, "x0 y0 x1 y1, fractions of the image: sample this part only, at the "
                             "resolution of --sample_img_size")
ARRAYS = arrays_flag()
OUTPUT = flags.DEFINE_string("output", None, "folder for the images; default: samples/<experiment>_<size>")


def main():
    latent, autoencoder = config.read_trained_stages(CONFIG, DECODER_CONFIG)
    autoencoder = autoencoder or config.read_trained_autoencoder_config(DECODER_CONFIG)
    folder = make_samples(latent, autoencoder, OPTIONS, NUM_SAMPLES.value, OUTPUT.value, WINDOW.value,
                          ARRAYS.value)
    if distributed.is_main():
        print(f"{folder.total} images in {folder.path}")


if __name__ == "__main__":
    cli.run(main, shared=True, several=["window"])
