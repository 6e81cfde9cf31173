r"""Compare samples at several resolutions: are they the same images?

    python experiments/compare_resolutions.py --reference demo/samples_1x --samples demo/samples_2x,demo/samples_4x \
        [--output comparison.json]

The folders are those of generate_samples.py. The larger image of a pair is reduced to the size of the smaller one, with
antialiasing. A window is compared with its part of the reference, which must have the size of the whole image. Prints
the PSNR in dB of 8-bit images and, as a baseline, the PSNR of different images.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch.nn.functional as F
from absl import flags

from data.datasets import log_images
from experiments.lib.image_folders import SampleFolder
from experiments.metrics.images import psnr
from utils import cli
from utils.errors import UserError
from utils.files import check_output_file, write_json

REFERENCE = flags.DEFINE_string("reference", None, "folder of images")
SAMPLES = flags.DEFINE_list("samples", None, "folders with the same images as the reference under the same names")
OUTPUT = flags.DEFINE_string("output", None, "JSON file for the scores")


def main():
    if not SAMPLES.value:
        raise UserError("--samples is missing; give one folder or more, separated by commas")
    check_output_file(OUTPUT.value, "output")
    scores = [compare(REFERENCE.value, folder) for folder in SAMPLES.value]
    if OUTPUT.value:
        write_json(OUTPUT.value, scores)
    for row in scores:
        print("{folder}: {count} images of {0}x{1}, PSNR {psnr:.2f} dB (lowest {least_psnr:.2f}; of different images "
              "{psnr_of_others:.2f})".format(*row["size"], **row))


def compare(reference, folder):
    """Scores of a folder: number and size of images, mean and lowest PSNR, and mean PSNR of each image against the
    reference of another."""
    originals, whole = read_folder("reference", reference)
    images, part = read_folder("samples", folder)
    names = [name for name in images if name in originals]
    window, size, whole_size = part.settings.get("window"), part.settings.get("size"), whole.settings.get("size")
    if len(names) < 2:
        raise UserError(f"--samples={folder} and --reference={reference} have fewer than two images in common")
    if window and whole_size != size:
        raise UserError(f"--reference={reference} has images of {whole_size} pixels; the windows in --samples={folder} "
                        f"are of images of {size}")
    same, other = [], []
    for place, name in enumerate(names):
        image = part[images[name]]
        same.append(psnr(*to_one_size(whole[originals[name]], image, window)))
        other.append(psnr(*to_one_size(whole[originals[names[place - 1]]], image, window)))
    return {"folder": str(folder), "size": list(image.shape[1:]), "count": len(names), "psnr": sum(same) / len(same),
            "least_psnr": min(same), "psnr_of_others": sum(other) / len(other)}


def read_folder(flag, folder):
    """({file name: index}, SampleFolder) of a folder of generate_samples.py."""
    if not folder or len(list(Path(folder).glob("*.png"))) < 2:
        raise UserError(f"--{flag}={folder} must be a folder with two images or more, from generate_samples.py")
    samples = SampleFolder(folder)
    log_images(samples)
    return {path.name: index for index, path in enumerate(samples.files) if path.parent == samples.folder}, samples


def to_one_size(reference, image, window):
    """Both uint8 images [C, H, W] as float64 of one size; of the reference only the window ((top, bottom), (left,
    right)), unless it is None."""
    reference, image = reference.double(), image.double()
    if window:
        (top, bottom), (left, right) = window
        reference = reference[:, top:bottom, left:right]
    smaller = min(reference.shape[1:], image.shape[1:], key=lambda size: size[0] * size[1])
    return [one if one.shape[1:] == smaller else
            F.interpolate(one[None], smaller, mode="bicubic", antialias=True)[0].clamp(0, 255)
            for one in (reference, image)]


if __name__ == "__main__":
    cli.run(main)
