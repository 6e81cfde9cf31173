"""Write any data set to one LMDB at one size, for later runs to read instead of the files.

    python data/prepare.py --config configs/ffhq_256_config.py --config.data.root_dir=/data/ffhq --output /data/ffhq_256

Both parts, training and held-out, are stored as PNG (lossless). The script can be stopped at any time, even by SIGKILL;
the same command continues. An unfinished LMDB is refused by every reader. To use it, set --config.data.root_dir to the
output.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from data.datasets import build_dataset, log_images
from data.datasets.functions import Functions
from data.datasets.prepared import write_prepared
from utils import cli, config
from utils.errors import UserError

CONFIG = config.define_config_flag("config", "autoencoder config, for example configs/ffhq_256_config.py")
OUTPUT = flags.DEFINE_string("output", None, "folder of the LMDB")
SIZE = flags.DEFINE_integer("size", None, "side of the images in pixels; default: data.img_size", lower_bound=1)
WORKERS = flags.DEFINE_integer("workers", os.cpu_count(), "number of processes that read and encode", lower_bound=0)


def main():
    cfg = config.read_autoencoder_config(CONFIG)
    if OUTPUT.value is None:
        raise UserError("--output is missing; give the folder to write to")
    if cfg.data.name == Functions.name:
        raise UserError("data.name='function' is evaluated at any resolution, not read; there is nothing to prepare")
    train_set, held_out_set = (build_dataset(cfg, train, SIZE.value) for train in (True, False))
    log_images(train_set, held_out_set)
    record = write_prepared(train_set, held_out_set, OUTPUT.value, WORKERS.value)
    train, held_out = record["parts"]["train"], record["parts"]["held_out"]
    skipped = sum(part["seen"] - part["stored"] for part in (train, held_out))
    print(f"{OUTPUT.value}: {train['stored']} training and {held_out['stored']} held-out images, {skipped} unreadable; "
          f"use it with --config.data.root_dir={OUTPUT.value}")


if __name__ == "__main__":
    cli.run(main)
