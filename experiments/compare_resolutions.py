"""How far samples of one model at different sizes are the same images, and a window that part of the whole.

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

from utils import cli
from utils.errors import UserError
from utils.files import replacing
from utils.images import read_image
from utils.similarity import psnr

REFERENCE = flags.DEFINE_string("reference", None, "folder of images")
SAMPLES = flags.DEFINE_list("samples", None, "folders to compare with it: the first of each have to be the same images")
OUTPUT = flags.DEFINE_string("output", None, "also write the figures to this JSON file")


def read_folder(flag, folder):
    """(images by name, settings) of a folder that generate_samples.py has written."""
    files = sorted(Path(folder).glob("*.png")) if folder else []
    if len(files) < 2:
        raise UserError(f"--{flag}={folder} must be a folder with two images or more, from generate_samples.py")
    record = Path(folder) / "settings.json"
    return {file.name: file for file in files}, json.loads(record.read_text()) if record.is_file() else {}


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
    originals, made = read_folder("reference", reference)
    images, settings = read_folder("samples", folder)
    names = [name for name in images if name in originals]
    window = settings.get("window")
    if len(names) < 2:
        raise UserError(f"--samples={folder} and --reference={reference} have fewer than two images in common")
    if window and made.get("size") != settings["size"]:
        raise UserError(f"--reference={reference} has images of {made.get('size')} pixels; the windows in --samples="
                        f"{folder} are of images of {settings['size']}")
    same, other = [], []
    for place, name in enumerate(names):
        image = read_image(images[name])
        same.append(psnr(*pair(read_image(originals[name]), image, window)))
        other.append(psnr(*pair(read_image(originals[names[place - 1]]), image, window)))
    return {"folder": str(folder), "size": list(image.shape[1:]), "count": len(names), "psnr": sum(same) / len(same),
            "least_psnr": min(same), "psnr_of_others": sum(other) / len(other)}


def main():
    if not SAMPLES.value:
        raise UserError("--samples is missing; give one folder or more, separated by commas")
    figures = [compare(REFERENCE.value, folder) for folder in SAMPLES.value]
    for row in figures:
        print(f"{row['folder']}: {row['count']} images of {row['size'][0]}x{row['size'][1]}, PSNR {row['psnr']:.2f} dB "
              f"(least {row['least_psnr']:.2f}; of images that do not belong together {row['psnr_of_others']:.2f})")
    if OUTPUT.value:
        with replacing(OUTPUT.value) as temporary:
            temporary.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
