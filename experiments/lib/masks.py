"""Which pixels of an image are known, for inpainting: drawn masks, and masks from a file."""

import torch
from PIL import Image, ImageDraw

from data.coordinates import Coordinates
from data.images import UNREADABLE
from utils import rng
from utils.errors import UserError

KINDS = ("centre", "half", "strokes", "pixels")
STROKES, CORNERS, STROKE_WIDTH = 4, 4, 1 / 9  # of a mask, of a stroke, and of the shorter side
KNOWN_SHARE = 1 / 4  # of the pixels of a mask of kind "pixels"


def make_masks(kind, size, indices, seed):
    """bool [N, 1, H, W], True where a pixel is known, for the images with these global indices.

    kind   centre    unknown is the middle half of each axis
           half      the right half
           strokes   what random brush strokes cover, other ones in each image
           pixels    all but a random quarter of the pixels, other ones in each image
           or the path of an image of this size, of which what is nearer to white than to black is unknown
    Raises UserError where there is no such mask, or nothing is known or unknown.
    """
    height, width = size
    known = torch.ones(len(indices), 1, height, width, dtype=torch.bool)
    if kind == "centre":
        known[:, :, height // 4:height - height // 4, width // 4:width - width // 4] = False
    elif kind == "half":
        known[..., width // 2:] = False
    elif kind == "strokes":
        known = torch.stack([_strokes(size, generator) for generator in _generators(indices, seed)])
    elif kind == "pixels":
        count = max(round(KNOWN_SHARE * height * width), 1)
        coords = Coordinates.random(len(indices), size, count, generator=_generators(indices, seed))
        known = coords.scatter(torch.ones(len(indices), count, 1)) > 0
    else:
        known[:] = _read(kind, size)
    if known.all() or not known.any():
        raise UserError(f"--mask={kind} leaves {'nothing unknown' if known.all() else 'nothing known'}; white pixels "
                        "are unknown, black ones known")
    return known


def _generators(indices, seed):
    return rng.sample_generators("cpu", indices, seed, "mask")


def _strokes(size, generator):
    """Polylines with round joints, bool [1, H, W], True beside them."""
    height, width = size
    image = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(image)
    thickness = max(round(STROKE_WIDTH * min(size)), 1)
    for corners in torch.rand(STROKES, CORNERS, 2, generator=generator) * torch.tensor([width, height]):
        draw.line([tuple(corner) for corner in corners.tolist()], fill=255, width=thickness, joint="curve")
    return _white(image).logical_not()


def _read(path, size):
    try:
        with Image.open(path) as image:
            image = image.convert("L")
    except UNREADABLE as error:
        raise UserError(f"--mask={path} is neither one of {', '.join(KINDS)} nor an image that can be read "
                        f"({type(error).__name__})") from error
    if image.size != (size[1], size[0]):
        raise UserError(f"--mask={path} has {image.height}x{image.width} pixels, the images {size[0]}x{size[1]}; "
                        "resize the mask, or set --sample_img_size")
    return _white(image).logical_not()


def _white(image):
    """bool [1, H, W] of a grey Pillow image."""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, image.height, image.width) > 127
