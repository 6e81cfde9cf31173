"""Super-resolution apart from the model: inputs and truth, interpolations to compare with, and scores."""

import torch
from PIL.Image import Resampling

from data.images import read_image, to_tensor
from data.loader import to_float
from diffusion.operators import Downsampling
from experiments.lib.image_folders import folder_images, heldout_images
from experiments.metrics.images import psnr, ssim
from utils.errors import UserError
from utils.images import to_pil, to_uint8


def read_inputs(cfg, folder, input_size, result_size, count):
    """(inputs uint8 [N, C, h, w], truth uint8 [N, C, H, W] or None, (H, W), origin of the images as plain data).

    folder       of inputs, the value of --input, for which there is no truth; None: held-out images are the truth, and
                 the inputs are made from them by Downsampling
    input_size   (h, w) of inputs made from held-out images
    result_size  (h, w) -> (H, W)
    """
    if folder is not None:
        inputs, origin = folder_images(cfg, folder, count)
        return inputs, None, _larger(inputs.shape[-2:], result_size), origin
    size = _larger(input_size, result_size)
    truth, origin = heldout_images(cfg, size, count)
    return to_uint8(Downsampling(size, input_size).A(to_float(truth))), truth, size, origin


def _larger(input_size, result_size):
    size = result_size(input_size)
    if size[0] < input_size[0] or size[1] < input_size[1] or size == tuple(input_size):
        raise UserError(f"--sample_img_size={size[0]}x{size[1]} is no larger than the inputs, "
                        f"{input_size[0]}x{input_size[1]}; choose a larger size")
    return size


def interpolations(inputs, size, constraint):
    """{method: images float [B, C, H, W]} for uint8 inputs: Pillow's bicubic and Lanczos interpolation and, as
    `backprojected`, the image nearest to the bicubic one that meets the constraint."""
    channels = [to_pil(channel[None]) for channel in inputs.flatten(0, 1)]
    images = {name: to_float(torch.cat([to_tensor(channel.resize(size[::-1], method)) for channel in channels])
                             .unflatten(0, inputs.shape[:2]))
              for name, method in (("bicubic", Resampling.BICUBIC), ("lanczos", Resampling.LANCZOS))}
    return {**images, "backprojected": constraint.enforce(images["bicubic"].to(constraint.data.device))}


def score(folders):
    """{method: means over its PNGs} for {name: ImageFolder}; every folder but "inputs" and "truth" is a method.

    psnr [dB], ssim         against the truth, if there is one
    consistency_psnr [dB]   of the image reduced by Downsampling against the input
    """
    scores, count = {}, folders["inputs"].total
    sizes = [read_image(folders[name].file(0)).shape[1:] for name in ("bicubic", "inputs")]
    operator = Downsampling(*sizes)
    for name in [name for name in folders if name not in ("inputs", "truth")]:
        rows = []
        for i in range(count):
            image, low = (read_image(folders[folder].file(i)) for folder in (name, "inputs"))
            row = {"consistency_psnr": psnr(operator.A(image.double()), low)}
            if "truth" in folders:
                truth = read_image(folders["truth"].file(i))
                row = {"psnr": psnr(image, truth), "ssim": ssim(image, truth), **row}
            rows.append(row)
        scores[name] = {key: sum(row[key] for row in rows) / count for key in rows[0]}
    return scores
