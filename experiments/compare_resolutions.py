r"""How far samples of one model at different sizes are the same images, and a window that part of the whole.

    python experiments/compare_resolutions.py --reference demo/samples_1x --samples demo/samples_2x,demo/samples_4x \
        [--output comparison.json]

Folders are those of generate_samples.py. The larger image of a pair is reduced to the size of the smaller one, with an
antialiasing filter, and a window is compared with that part of the reference, which then has to be of the size that the
window is of. Prints the PSNR in dB, of 8-bit images, and beside it that of images that do not belong together.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch.nn.functional as F
from absl import flags

from experiments.lib.image_folders import SampleFolder
from experiments.metrics.images import psnr
from utils import cli
from utils.errors import UserError
from utils.files import check_output_file, replacing

REFERENCE = flags.DEFINE_string("reference", None, "folder of images")
SAMPLES = flags.DEFINE_list("samples", None, "folders to compare with it: the first of each have to be the same images")
OUTPUT = flags.DEFINE_string("output", None, "also write the figures to this JSON file")


def read_folder(flag, folder):
    """({name: place}, SampleFolder) of a folder that generate_samples.py has written."""
    if not folder or len(list(Path(folder).glob("*.png"))) < 2:
        raise UserError(f"--{flag}={folder} must be a folder with two images or more, from generate_samples.py")
    made = SampleFolder(folder)
    return {path.name: place for place, path in enumerate(made.files) if path.parent == made.folder}, made


def pair(reference, image, window):
    """What is to be the same in two uint8 images [C, H, W]: as float64, of one size."""
    reference, image = reference.double(), image.double()
    if window:
        (top, bottom), (left, right) = window
        reference = reference[:, top:bottom, left:right]
    small = min(reference.shape[1:], image.shape[1:], key=lambda size: size[0] * size[1])
    return [one if one.shape[1:] == small else _reduced(one, small) for one in (reference, image)]


def _reduced(image, size):
    return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(0, 255)


def compare(reference, folder):
    """Figures for a folder: count, size, mean and least PSNR, and the mean PSNR of each image with the next one."""
    originals, whole = read_folder("reference", reference)
    images, made = read_folder("samples", folder)
    names = [name for name in images if name in originals]
    window, size, whole_size = made.settings.get("window"), made.settings.get("size"), whole.settings.get("size")
    if len(names) < 2:
        raise UserError(f"--samples={folder} and --reference={reference} have fewer than two images in common")
    if window and whole_size != size:
        raise UserError(f"--reference={reference} has images of {whole_size} pixels; the windows in --samples={folder} "
                        f"are of images of {size}")
    same, other = [], []
    for place, name in enumerate(names):
        image = made[images[name]]
        same.append(psnr(*pair(whole[originals[name]], image, window)))
        other.append(psnr(*pair(whole[originals[names[place - 1]]], image, window)))
    return {"folder": str(folder), "size": list(image.shape[1:]), "count": len(names), "psnr": sum(same) / len(same),
            "least_psnr": min(same), "psnr_of_others": sum(other) / len(other)}


def main():
    if not SAMPLES.value:
        raise UserError("--samples is missing; give one folder or more, separated by commas")
    check_output_file(OUTPUT.value, "output")
    figures = [compare(REFERENCE.value, folder) for folder in SAMPLES.value]
    for row in figures:
        print(f"{row['folder']}: {row['count']} images of {row['size'][0]}x{row['size'][1]}, PSNR {row['psnr']:.2f} dB "
              f"(least {row['least_psnr']:.2f}; of images that do not belong together {row['psnr_of_others']:.2f})")
    if OUTPUT.value:
        with replacing(OUTPUT.value) as temporary:
            temporary.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
