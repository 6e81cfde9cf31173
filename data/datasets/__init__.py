"""The registry of data sets."""

from data.datasets.folder import FFHQ, CelebA, Folder
from data.datasets.functions import Functions
from data.datasets.lmdb import is_lmdb
from data.datasets.lsun import Churches
from data.datasets.photos import Photos
from data.datasets.prepared import Prepared
from utils.errors import UserError

DATASETS = {dataset.name: dataset for dataset in (Photos, Folder, FFHQ, CelebA, Churches, Functions)}


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
        return Functions(data.function, (data.num_functions, data.num_heldout_functions), train, size, data.channels)
    if is_lmdb(data.root_dir):
        return Prepared(data.root_dir, train, size, data.channels, data.name)
    return DATASETS[data.name](data.root_dir, train, size, data.channels)
