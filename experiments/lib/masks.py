"""Masks of the known pixels for inpainting: drawn, or from an image file."""

import torch
from PIL import Image, ImageDraw

from data.coordinates import Coordinates
from data.images import UNREADABLE, read_image, to_tensor
from utils import rng
from utils.errors import UserError

KINDS = ("centre", "half", "strokes", "pixels")
STROKES, CORNERS, STROKE_WIDTH = 4, 4, 1 / 9  # per mask, per stroke, and as a share of the shorter side
KNOWN_SHARE = 1 / 4  # of the pixels of a mask of kind "pixels"


def make_masks(kind, size, indices, seed, **reading):
    """bool [N, 1, H, W], True for known pixels, for the images with these global indices.

    kind   centre    the middle half of each axis is unknown
           half      the right half is unknown
           strokes   random brush strokes are unknown, different ones in each image
           pixels    a random quarter of the pixels is known, another one in each image
           path      an image file of this size; pixels nearer to white than to black are unknown
    reading   further arguments of data.images.read_image, for a file
    Raises UserError if there is no such mask, or if it leaves nothing known or nothing unknown.
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
        known[:] = _read(kind, size, reading)
    if known.all() or not known.any():
        raise UserError(f"--mask={kind} leaves {'nothing unknown' if known.all() else 'nothing known'}; white pixels "
                        "are unknown, black ones known")
    return known


def _generators(indices, seed):
    return rng.sample_generators("cpu", indices, seed, "mask")


def _strokes(size, generator):
    """bool [1, H, W], False on random polylines with round joints."""
    height, width = size
    image = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(image)
    thickness = max(round(STROKE_WIDTH * min(size)), 1)
    for corners in torch.rand(STROKES, CORNERS, 2, generator=generator) * torch.tensor([width, height]):
        draw.line([tuple(corner) for corner in corners.tolist()], fill=255, width=thickness, joint="curve")
    return to_tensor(image) <= 127


def _read(path, size, reading):
    try:
        mask = read_image(path, channels=1, **reading)
    except UNREADABLE as error:
        raise UserError(f"--mask={path} is neither one of {', '.join(KINDS)} nor a readable image "
                        f"({error})") from error
    height, width = mask.shape[1:]
    if (height, width) != tuple(size):
        raise UserError(f"--mask={path} has {height}x{width} pixels, the images {size[0]}x{size[1]}; "
                        "resize the mask, or set --sample_img_size")
    return mask <= 127
