"""The sparse operator K: its definition, its dense form in plain PyTorch, and the choice of a kernel."""

import math

import torch
import torch.nn.functional as F
from scipy.fft import next_fast_len

from models.kernels import AUTO, BACKENDS, obstacle
from utils.errors import UserError

NAMES = ("torch_dense", *BACKENDS)
# From this many taps on, by type of device, FFTs are used; they transform at most FFT_CHUNK values at a time, to bound
# the memory. On two CPU cores, at 256² pixels and 64 channels: 29² taps 27 ms by F.conv2d and 31 ms by FFT, 57² taps
# 118 and 43 ms. Not measured on a GPU. By arithmetic for an A100, at 1024² pixels and 64 channels in half precision:
# the kernel reads 2 bytes per value and tap from the L2 cache, at 5 TB/s 0.03 ms per tap; the FFTs of image and weight
# read or write 4 bytes per value about 20 times, at 1.5 TB/s 3.6 ms. They are equal at 11² to 13² taps; 17² leaves a
# margin. A chunk of 2^26 values takes 1 GB; at 2048² it saves nine tenths of the launches.
FFT_TAPS = {"cpu": 33**2, "cuda": 17**2}
FFT_CHUNK = {"cpu": 2**20, "cuda": 2**26}


def sparse_conv(features, weight, coords, backend="auto", consistent=False):
    """Monte Carlo estimate of a convolution integral over the points N(c) in the window of each point c.

        (K h)(c) = kh kw / |N(c)| · sum over c' in N(c) of weight(c' - c) h(c')        (docs/method.md, 4.2)

    This estimate counts c itself always, but its neighbours only with the share q of the pixels that are present, so
    its mean depends on q. The consistent one has the same mean at every q; only its first term is left if c is alone:

        (K h)(c) = weight(0) h(c) + (kh kw - 1) / (|N(c)| - 1) · sum over c' ≠ c in N(c) of weight(c' - c) h(c')

    features    [B, L, C] at the L coordinates, float32, bfloat16, float16 or float64
    weight      [kh, kw, C] depthwise, or [kh, kw, C, D] full; kh and kw odd. weight[i, j] multiplies the neighbour at
                row offset i - kh // 2 and column offset j - kw // 2, a cross-correlation as in F.conv2d
    coords      data.coordinates.Coordinates of the L points
    backend     auto, torch_dense or a name in models.kernels.BACKENDS
    consistent  use the second estimate
    Returns [B, L, C] or [B, L, D] in the dtype of the features. Raises UserError if the backend cannot be used, and
    ValueError for wrong shapes.
    """
    if features.shape[:2] != coords.index.shape:
        raise ValueError(f"features are {tuple(features.shape)}, but there are {tuple(coords.index.shape)} coordinates")
    if weight.dim() not in (3, 4) or weight.shape[0] % 2 == 0 or weight.shape[1] % 2 == 0:
        raise ValueError(f"weight must be [kh, kw, C] or [kh, kw, C, D] with kh and kw odd, got {tuple(weight.shape)}")
    if weight.shape[2] != features.shape[2]:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit features of {features.shape[2]} channels")
    neighbour_sum = _choose(backend, features, weight, coords)
    if not consistent:
        return (neighbour_sum(features, weight, coords) * _factor(features, weight, coords, 0)).to(features.dtype)
    kh, kw = weight.shape[:2]
    centre = torch.arange(kh * kw, device=weight.device).view(kh, kw, *[1] * (weight.dim() - 2)) == kh * kw // 2
    others = neighbour_sum(features, weight.masked_fill(centre, 0), coords)
    tap = weight[kh // 2, kw // 2].to(features.dtype)
    own = features * tap if weight.dim() == 3 else features @ tap
    return torch.addcmul(own, others, _factor(features, weight, coords, 1)).to(features.dtype)


def _factor(features, weight, coords, without):
    """(kh kw - without) / (|N(c)| - without), [B, L, 1] in at least float32; `without` pixels are not estimated."""
    taps, dtype = math.prod(weight.shape[:2]) - without, torch.promote_types(features.dtype, torch.float32)
    count = neighbour_counts(coords, weight.shape[:2])
    return coords.cached(("factor", *weight.shape[:2], without, dtype),
                         lambda: (taps / (count - without).clamp(min=1).to(dtype))[:, :, None])


def dense_neighbour_sum(features, weight, coords):
    """The neighbour sum in plain PyTorch: a convolution of the image, with zeros for absent pixels.

    Its cost does not depend on the number of points.
    """
    kh, kw, channels = weight.shape[:3]
    depthwise = weight.dim() == 3
    image = coords.scatter(features)
    if depthwise and kh * kw >= FFT_TAPS[image.device.type]:
        image = fft_depthwise(image, weight).to(features.dtype)
    else:
        kernel = (weight[:, :, None] if depthwise else weight).permute(3, 2, 0, 1).to(features.dtype)
        image = F.conv2d(image, kernel, padding=(kh // 2, kw // 2), groups=channels if depthwise else 1)
    return coords.gather(image)


def neighbour_counts(coords, kernel_size):
    """|N(c)|, the number of points in the window (kh, kw) around each point, itself included: float32 [B, L]."""
    return coords.cached(("neighbour counts", tuple(kernel_size)), lambda: _neighbour_counts(coords, *kernel_size))


def _neighbour_counts(coords, kh, kw):
    count = (coords.table >= 0).float().view(coords.batch, *coords.size)
    for axis, k, padding in ((1, kh, (0, 0, kh // 2 + 1, kh // 2)), (2, kw, (kw // 2 + 1, kw // 2))):
        up_to = F.pad(count, padding).cumsum(axis)  # integers, far below 2^24
        count = up_to.narrow(axis, k, coords.size[axis - 1]) - up_to.narrow(axis, 0, coords.size[axis - 1])
    return count.flatten(1).gather(1, coords.index)


def fft_depthwise(image, weight):
    """Depthwise convolution by FFT: image [B, C, H, W], weight [kh, kw, C] -> [B, C, H, W], as F.conv2d with padding.

    Computes in float32, or float64 for a float64 image, and returns that dtype.
    """
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    channels = max(FFT_CHUNK[image.device.type] // image[:, 0].numel(), 1)
    with torch.autocast(image.device.type, enabled=False):
        parts = zip(image.split(channels, dim=1), weight.to(image.dtype).split(channels, dim=2), strict=True)
        return torch.cat([_fft_depthwise(*part) for part in parts], dim=1)


def _fft_depthwise(image, weight):
    size, taps = image.shape[-2:], weight.shape[:2]
    # The image and half a kernel of zeros, which serves as the padding of both ends.
    padded = [next_fast_len(max(length + k // 2, k), real=True) for length, k in zip(size, taps, strict=True)]
    kernel = F.pad(weight.permute(2, 0, 1), (0, padded[1] - taps[1], 0, padded[0] - taps[0]))
    kernel = kernel.roll([-(k // 2) for k in taps], dims=(1, 2))  # the centre tap to the corner
    spectrum = torch.fft.rfft2(image.contiguous(), s=padded) * torch.fft.rfft2(kernel).conj()
    return torch.fft.irfft2(spectrum, s=padded)[..., : size[0], : size[1]]


def available_backends():
    """Names of the backends that can be used on this machine."""
    return ["torch_dense", *(name for name, backend in BACKENDS.items() if not backend.unavailable_reason(False))]


def resolve_backend(name, device, depthwise):
    """The backend that `name` stands for: torch_dense, a name of models.kernels.BACKENDS, or auto.

    device     torch.device of the features; None: not known yet
    depthwise  whether the weight is [kh, kw, C]
    Raises UserError if the backend does not exist or cannot be used here.
    """
    if name == "auto":
        return next((other for other in AUTO if not obstacle(other, device, depthwise)), "torch_dense")
    if name not in NAMES:
        raise UserError(f"model.backend={name!r} is not one of auto, {', '.join(NAMES)}; use auto")
    reason = "" if name == "torch_dense" else obstacle(name, device, depthwise)
    if reason:
        usable = [other for other in BACKENDS if not obstacle(other, device, depthwise)]
        raise UserError(f"model.backend={name!r} cannot be used: {reason}; usable here: "
                        f"{', '.join(['auto', 'torch_dense', *usable])}")
    return name


def _choose(backend, features, weight, coords):
    """The function that computes the neighbour sum."""
    name = resolve_backend(backend, features.device, weight.dim() == 3)
    # FFTs are faster than any loop
    large = weight.dim() == 3 and math.prod(weight.shape[:2]) >= FFT_TAPS[features.device.type]
    rounds = features.dtype == torch.float64 and name != "numba"
    # On a CPU and all pixels, a dense convolution is twice as fast as the loop forward, but slower backward.
    dense = name == "numba" and coords.is_raster and not torch.is_grad_enabled()
    if name == "torch_dense" or large or rounds or dense:
        return dense_neighbour_sum
    return BACKENDS[name].neighbour_sum
