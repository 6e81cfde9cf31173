"""What super_resolution.py compares: small images and the truth, interpolations that need no model, and the scores."""

import torch
from PIL.Image import Resampling

from data.images import read_image, to_tensor
from data.loader import to_float
from diffusion.guidance import Downsampling
from experiments.lib.image_folders import folder_images, heldout_images
from experiments.metrics.images import psnr, ssim
from utils.errors import UserError
from utils.images import to_pil, to_uint8


def read_inputs(cfg, folder, low_size, size_of, count):
    """(inputs uint8 [N, C, h, w], truth uint8 [N, C, H, W] or None, (H, W), where they are from).

    folder     of inputs, the value of --input, for which there is no truth; None: held-out images are the truth, and
               what Downsampling makes of them the inputs
    low_size   (h, w) of inputs made from held-out images
    size_of    (h, w) -> (H, W)
    """
    if folder is not None:
        low, source = folder_images("input", folder, cfg.data.channels, count, cfg.model.knn_neighbours)
        return low, None, _checked(low.shape[-2:], size_of), source
    size = _checked(low_size, size_of)
    truth, source = heldout_images(cfg, size, count)
    return to_uint8(Downsampling(size, low_size).forward(to_float(truth))), truth, size, source


def _checked(low_size, size_of):
    size = size_of(low_size)
    if size[0] < low_size[0] or size[1] < low_size[1] or size == tuple(low_size):
        raise UserError(f"--sample_img_size={size[0]}x{size[1]} is no larger than the inputs, "
                        f"{low_size[0]}x{low_size[1]}; choose a larger one")
    return size


def interpolations(low, size, constraint):
    """{method: images float [B, C, H, W]} from inputs uint8: Pillow's bicubic and Lanczos interpolation, and
    backprojected, the bicubic one changed as little as it takes to give the input back when it is resized."""
    made = {name: to_float(torch.stack([to_tensor(to_pil(image).resize(size[::-1], method)) for image in low]))
            for name, method in (("bicubic", Resampling.BICUBIC), ("lanczos", Resampling.LANCZOS))}
    return {**made, "backprojected": constraint.enforce(made["bicubic"].to(constraint.data.device))}


def score(folders):
    """{method: means over its PNGs} from {name: ImageFolder}, of which "inputs" and "truth" are no methods.

    psnr [dB] and ssim      against the truth, where there is one
    consistency_psnr [dB]   of what Downsampling makes of them against the inputs
    """
    scores, count = {}, folders["inputs"].total
    sizes = [read_image(folders[name].file(0)).shape[1:] for name in ("bicubic", "inputs")]
    operator = Downsampling(*sizes)
    for name in [name for name in folders if name not in ("inputs", "truth")]:
        rows = []
        for i in range(count):
            image, low = (read_image(folders[folder].file(i)) for folder in (name, "inputs"))
            row = {"consistency_psnr": psnr(operator.forward(image.double()), low)}
            if "truth" in folders:
                truth = read_image(folders["truth"].file(i))
                row = {"psnr": psnr(image, truth), "ssim": ssim(image, truth), **row}
            rows.append(row)
        scores[name] = {what: sum(row[what] for row in rows) / count for what in rows[0]}
    return scores
