"""Operators of inverse problems by name, for the flag --operator (docs/inverse_problems.md)."""

import math
import re

import torch

from data.datasets.functions import load_function
from diffusion.operators import Blur, Channels, Downsampling, Mask, Physics, Points, Projections, Stack
from experiments.lib.masks import KINDS, make_masks
from utils import rng
from utils.errors import UserError

FORMS = "mask:SHARE, mask:KIND, downsampling:SIDE, blur:WIDTH, projections:COUNT, points:COUNT or module:attribute"
ADJOINT_TOLERANCE = 1e-3


def build_operator(text, image_shape, noise, seed, index, device):
    """The operator that --operator names, for image `index`.

    text          terms joined by "+"; a term may end in "@" and a channel number. Random pixels and points depend on
                  the seed and the index of the image.
    image_shape   (C, H, W)
    noise         standard deviation of the noise in the data
    Raises UserError for a term that is none of FORMS, or whose A_adjoint is not the adjoint of A.
    """
    terms = text.split("+")
    parts = [_term(text, term, image_shape, noise, rng.generator("cpu", seed, "operator", index, place), seed, index,
                   device) for place, term in enumerate(terms)]
    operator = parts[0] if len(parts) == 1 else Stack(parts, image_shape, device)
    _check(text, operator, image_shape, device)
    return operator


def _term(text, term, image_shape, noise, generator, seed, index, device):
    term, _, channel = term.partition("@")
    channels, size = image_shape[0], image_shape[1:]
    if channel and not (channel.isdigit() and int(channel) < channels):
        raise UserError(f"--operator={text}: @{channel} must be a channel, 0 to {channels - 1}")
    if channel:
        inner = _term(text, term, (1, *size), noise, generator, seed, index, device)
        return Channels(inner, [int(channel)], channels)
    name, _, value = term.partition(":")
    try:
        match name:
            case "mask" if value in KINDS:
                return Mask(make_masks(value, size, [index], seed).to(device), noise)
            case "mask":
                return Mask(_random_pixels(size, _between(value, 0, 1), generator).to(device), noise)
            case "downsampling":
                side = _count(value)
                if side > min(size):
                    raise ValueError
                return Downsampling(size, (side, side), noise, device)
            case "blur":
                return Blur(_between(value, 0, 1), noise)
            case "projections":
                return Projections(size, _count(value), noise, device)
            case "points":
                return Points(torch.rand(1, _count(value), 2, generator=generator).to(device), size, noise)
    except ValueError:
        raise UserError(f"--operator={text}: {term!r} is not one of {FORMS}, with a share, width or number that fits "
                        f"images of {size[0]}x{size[1]}") from None
    if not re.fullmatch(r"[\w.]+:[\w.]+", term):
        raise UserError(f"--operator={text}: {term!r} is not one of {FORMS}")
    operator = load_function(term, "--operator")
    if isinstance(operator, type) or not hasattr(operator, "A_adjoint"):
        operator = operator(image_shape, noise)
    if hasattr(operator, "noise_model"):  # of deepinv, whose noise is a method
        operator = Physics(operator.to(device), noise)
    missing = [name for name in ("A", "A_adjoint", "noise") if not hasattr(operator, name)]
    if missing:
        raise UserError(f"--operator={text}: {term!r} made an object without {' and '.join(missing)}; see "
                        "diffusion/operators.py")
    return operator


def _random_pixels(size, share, generator):
    pixels = math.prod(size)
    chosen = torch.randperm(pixels, generator=generator)[:max(round(share * pixels), 1)]
    return (torch.zeros(pixels).index_fill(0, chosen, 1) > 0).view(1, 1, *size)


def _count(value):
    count = int(value)
    if count < 1:
        raise ValueError
    return count


def _between(value, low, high):
    number = float(value)
    if not low < number <= high:
        raise ValueError
    return number


def _check(text, operator, image_shape, device):
    """UserError unless <A x, y> = <x, A* y> for random x and y."""
    image = rng.randn((1, *image_shape), rng.generator("cpu", "image")).to(device)
    data = operator.A(image)
    other = rng.randn(data.shape, rng.generator("cpu", "data")).to(device)
    back = operator.A_adjoint(other)
    if back.shape != image.shape:
        raise UserError(f"--operator={text}: A_adjoint returned {list(back.shape)} for images {list(image.shape)}")
    difference = ((data * other).sum() - (image * back).sum()).abs()
    if difference > ADJOINT_TOLERANCE * data.norm() * other.norm():
        raise UserError(f"--operator={text}: A_adjoint is not the adjoint of A; <A x, y> and <x, A* y> differ by "
                        f"{difference.item():.3g}")
