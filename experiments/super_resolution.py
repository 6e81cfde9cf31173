r"""Enlarge images: encode the small one and decode it at a higher resolution.

    python experiments/super_resolution.py --config configs/ffhq_256_config.py --input_img_size 64 --scale 4 \
        [--consistency 1]

With --consistency the estimates of each step agree with the input (docs/method.md, 6.2).

The inputs are held-out images, reduced by bicubic interpolation with antialiasing, or the images of --input. Writes
<output>/inputs, truth and one folder per method, grid.png and scores.json. Image i is a function of run.seed and i.
The same command resumes an interrupted run.

The mollifier removes detail finer than about two pixels of the training resolution. Results beyond that resolution are
therefore interpolations; the command above, for a model of 256² images, adds detail.
"""

import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags
from PIL.Image import Resampling

from data.images import read_image, to_tensor
from data.loader import to_float
from diffusion.guidance import Consistent, Constraint
from diffusion.operators import Downsampling
from diffusion.samplers import sample
from diffusion.sampling import images_at_once
from experiments.lib.applications import Application, check_encoder
from experiments.lib.image_folders import folder_images, heldout_images
from experiments.lib.sampling import check_eta, check_image_size, eta_flag, float_flag, parse_image_size
from experiments.metrics.images import psnr, ssim
from utils import cli, config
from utils.errors import UserError
from utils.images import to_pil, to_uint8

APPLICATION = Application("super_resolution", latents=None, images="the results, instead of --scale")
INPUT_SIZE = flags.DEFINE_string("input_img_size", None, "size of the inputs in pixels, SIDE or HEIGHTxWIDTH; default: "
                                 "the training resolution")
SCALE = flags.DEFINE_integer("scale", 2, "ratio of result to input size", lower_bound=2)
CONSISTENCY = float_flag("consistency", 0.0, "share of the input in the estimate of each step: 0 for none, as in the "
                         "paper, 1 for an estimate that reduces to exactly the input", high=1.0)
ETA = eta_flag()


def main():
    cfg = config.read_trained_autoencoder_config(APPLICATION.config)
    check_encoder(cfg)
    check_flags(cfg)
    autoencoder = APPLICATION.load(cfg)
    small, truth, size, origin = read_inputs(autoencoder)
    input_size, total = list(small.shape[-2:]), len(small)
    autoencoder.check_size(size)
    weights = {"decoded": 0.0, "consistent": CONSISTENCY.value} if CONSISTENCY.value else {"decoded": 0.0}
    names = ["inputs", "bicubic", "lanczos", "backprojected", *weights, *(["truth"] if truth is not None else [])]
    results = APPLICATION.results(
        autoencoder, "_{}x{}".format(*size), dict.fromkeys(names, total),
        {**origin, "input_size": input_size, "size": list(size), "consistency": CONSISTENCY.value, "eta": ETA.value})

    operator = Downsampling(size, input_size, device=autoencoder.device)
    batch_size = images_at_once(cfg.train.sample_size, size, autoencoder.max_points)
    for indices, progress in results.missing_batches(batch_size, autoencoder.steps * len(weights)):
        inputs = to_float(small[indices]).to(autoencoder.device)
        constraint = Constraint(operator, inputs, autoencoder.diffusion.mollifier)
        images = {"inputs": inputs, **interpolations(small[indices], size, constraint)}
        z = autoencoder.encode(inputs)
        for name, weight in weights.items():
            images[name] = enlarge(autoencoder, z, constraint, weight, size, indices, progress)
        if truth is not None:
            images["truth"] = to_float(truth[indices])
        results.save(indices, images)

    scores = score(results.folders)
    results.write_scores({"count": total, "methods": scores})
    results.write_grid()
    for name, row in scores.items():
        print(f"{name:14}" + " · ".join(f"{score} {value:.3f}" for score, value in row.items()))
    print(f"{total} images of {size[0]}x{size[1]} in {results.output}")


def check_flags(cfg):
    """UserError for flags that contradict each other."""
    check_eta(ETA, APPLICATION.sampler, cfg)
    if APPLICATION.size.value is not None and SCALE.present:
        raise UserError(f"--scale={SCALE.value} and --sample_img_size={APPLICATION.size.value} both set the size of "
                        "the results; give one of them")
    if APPLICATION.input.value is not None and INPUT_SIZE.value is not None:
        raise UserError(f"--input_img_size={INPUT_SIZE.value} applies to held-out images only, and images of --input "
                        "keep their size; leave it out")


def read_inputs(autoencoder):
    """(inputs uint8 [N, C, h, w], truth uint8 [N, C, H, W] or None, (H, W), origin of the images as plain data).

    The images of --input have no truth. Held-out images are the truth of inputs made from them by Downsampling.
    """
    cfg, count, folder = autoencoder.cfg, APPLICATION.count.value, APPLICATION.input.value
    if folder is not None:
        inputs, origin = folder_images(cfg, folder, count)
        return inputs, None, result_size(inputs.shape[-2:]), origin
    input_size = parse_image_size(INPUT_SIZE.value, cfg.data.img_size, INPUT_SIZE.name)
    size = result_size(input_size)
    truth, origin = heldout_images(cfg, size, count, autoencoder)
    return to_uint8(Downsampling(size, input_size).A(to_float(truth))), truth, size, origin


def result_size(input_size):
    """(H, W) of the results for inputs of size (h, w)."""
    if APPLICATION.size.value is None:
        size = tuple(SCALE.value * length for length in input_size)
        check_image_size(size, f"--scale={SCALE.value}")
        return size
    size = parse_image_size(APPLICATION.size.value, None)
    if size[0] < input_size[0] or size[1] < input_size[1] or size == tuple(input_size):
        raise UserError(f"--sample_img_size={size[0]}x{size[1]} is no larger than the inputs, "
                        f"{input_size[0]}x{input_size[1]}; choose a larger size")
    return size


def enlarge(autoencoder, z, constraint, weight, size, indices, progress):
    """Samples [B, C, H, W] of the images `indices`, for latents z. Unless weight is 0, they and their estimates meet
    the constraint."""
    generators = autoencoder.generators(indices, "super-resolution")

    def path(denoise, x):
        denoise = Consistent(denoise, constraint, weight) if weight else denoise
        return sample(denoise, x, autoencoder.diffusion, generators, ETA.value)

    images = autoencoder.decode(z, size, generators=generators, progress=progress, path=path,
                                condition=autoencoder.condition(indices))
    return constraint.enforce(images) if weight else images


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
    images = {name: [read_image(folder.file(i)) for i in range(folder.total)] for name, folder in folders.items()}
    low, truth = images.pop("inputs"), images.pop("truth", None)
    operator, scores = Downsampling(images["bicubic"][0].shape[1:], low[0].shape[1:]), {}
    for name, made in images.items():
        reduced = [operator.A(image.double()) for image in made]
        pairs = {"psnr": (psnr, made, truth), "ssim": (ssim, made, truth)} if truth else {}
        pairs["consistency_psnr"] = psnr, reduced, low
        scores[name] = {key: fmean(map(*row)) for key, row in pairs.items()}
    return scores


if __name__ == "__main__":
    cli.run(main)
