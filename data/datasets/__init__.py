"""The registry of data sets."""

import logging

from PIL import ImageColor

from data.datasets.folder import FFHQ, CelebA, Folder
from data.datasets.functions import Functions
from data.datasets.lmdb import Churches, is_lmdb
from data.datasets.photos import Photos, Tissue
from data.datasets.prepared import Prepared
from utils import distributed
from utils.errors import UserError

DATASETS = {dataset.name: dataset for dataset in (Photos, Tissue, Folder, FFHQ, CelebA, Churches, Functions)}


def build_dataset(config, train, img_size=None):
    """The training or the held-out images of a checked stage-1 config, an ImageDataset.

    img_size   int or (H, W) instead of config.data.img_size
    If data.root_dir is an LMDB written by data/prepare.py, the images come from there, whatever data.name is. Raises
    UserError if the data set is unknown, missing or damaged.
    """
    data = config.data
    size = data.img_size if img_size is None else img_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    if data.name not in DATASETS:
        raise UserError(f"data.name={data.name!r} is not one of {', '.join(DATASETS)}")
    if data.name == Functions.name:
        counts = data.num_functions, data.num_heldout_functions
        dataset = Functions(data.function, counts, train, size, data.channels)
    elif is_lmdb(data.root_dir):
        dataset = Prepared(data.root_dir, train, size, data.channels, data.name)
    else:
        dataset = DATASETS[data.name](data.root_dir, train, size, data.channels)
        dataset.reading = reading(data)
    if data.condition != "none":
        dataset.add_conditions(data.condition, data.condition_source)
    return dataset


def reading(data):
    """Section data of a config as arguments of data.images.read_image."""
    try:
        ImageColor.getrgb(data.background)
    except ValueError as error:
        raise UserError(f"data.background={data.background!r} is not a colour; use a name or a code such as white, "
                        "#808080 or rgb(0, 0, 0)") from error
    return {"background": data.background, "white_level": data.white_level}


def log_images(*sources):
    """Log how many images are used from where, and what is left out; for the start of every script.

    sources   each an ImageDataset, or anything with describe() and notes()
    """
    for source in sources if distributed.is_main() else ():
        logging.info("\n  ".join([source.describe(), *source.notes()]))
