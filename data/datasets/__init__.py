"""The registry of data sets."""

from data.datasets.folder import FFHQ, CelebA, Folder
from data.datasets.functions import Functions
from data.datasets.lmdb import Churches, Prepared, is_lmdb
from data.datasets.photos import Photos
from utils.errors import UserError

DATASETS = {dataset.name: dataset for dataset in (Photos, Folder, FFHQ, CelebA, Churches, Functions)}


def build_dataset(config, train, img_size=None):
    """The training or the held-out images of a stage-1 config.

    img_size   int or (H, W), in place of config.data.img_size
    Returns an ImageDataset, whose items are uint8 [C, H, W]. Where data.root_dir is an LMDB written by data/prepare.py,
    the images come from there, whatever the data set. Raises UserError for every mistake in the config or the files.
    """
    data = config.data
    size = data.img_size if img_size is None else img_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    if len(size) != 2 or min(size) < 1:
        raise UserError(f"data.img_size={size} must be a positive number of pixels, or two: (height, width)")
    if data.channels not in (1, 3):
        raise UserError(f"data.channels={data.channels} must be 1 (grey) or 3 (RGB)")
    if data.name not in DATASETS:
        raise UserError(f"data.name={data.name!r} is not one of {', '.join(DATASETS)}")
    if data.name == Functions.name:
        return Functions(data.function, (data.num_functions, data.num_heldout_functions), train, size, data.channels)
    if is_lmdb(data.root_dir):
        return Prepared(data.root_dir, train, size, data.channels, data.name)
    return DATASETS[data.name](data.root_dir, train, size, data.channels)
