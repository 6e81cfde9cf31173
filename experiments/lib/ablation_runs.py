"""One variant of an ablation: its config, its training by the training script, and its scores."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Subset

from data.datasets import build_dataset
from data.loader import all_batches
from diffusion.gaussian_diffusion import build_diffusion
from diffusion.mollifier import GaussianMollifier
from diffusion.sampling import decode, encode, reconstruction_scores
from experiments.lib.image_folders import ImageFolder, SampleFolder
from experiments.metrics.fid import MIN_IMAGES, compare
from experiments.metrics.images import denoising_error
from models.build import build_decoder, build_encoder
from models.load import autoencoder_path, load_autoencoder
from utils import config, rng
from utils.checkpoint import identity
from utils.device import ROOT, autocast, resolve_device, resolve_dtype
from utils.errors import UserError
from utils.files import replacing
from utils.logging import read_metrics, seconds_per_step, training_seconds
from utils.shutdown import Stopped

YARDSTICK = 1.0  # pixels: the blur after which images of all variants are compared, whatever their own mollifier
EVALUATION_BATCH = 64
CALIBRATION_STEPS = 40  # of a run that is thrown away, to turn minutes into steps
NEVER = 10**9


class Variant(NamedTuple):
    """A point on an axis: the fields that it changes, and the name of its run, which all that change nothing share."""

    axis: str
    name: str
    changes: dict
    experiment: str

    def config(self, base, output):
        """The checked stage-1 config; UserError where the changes do not go together with the base."""
        changed = base.copy_and_resolve_references()
        changed.update_from_flattened_dict(self.changes)
        changed.run.output_dir, changed.run.experiment = str(output), self.experiment
        config.check_autoencoder_config(changed, f"{self.axis}, {self.name}: config")
        build_diffusion(changed)
        with torch.device("meta"):  # shapes alone
            build_encoder(changed), build_decoder(changed)
        return changed


class FirstImages(Subset):
    """The first `count` images of a data set, or all it has, as a data set."""

    def __init__(self, dataset, count):
        super().__init__(dataset, range(min(count, len(dataset))))
        self.name, self.size, self.in_memory = dataset.name, dataset.size, dataset.in_memory

    def fingerprint(self):
        return f"{self.dataset.fingerprint()} {len(self)}"

    def describe(self):
        return f"the first {len(self)} of {self.dataset.describe()}"


def make_variant(axis, name, changes):
    """The Variant with a run of its own, or with the one called base."""
    return Variant(axis, name, changes, f"{axis}/{re.sub('[^A-Za-z0-9.]+', '_', name)}" if changes else "base")


def check_runs(base, configs, heldout, sampling_steps):
    """UserError for what training or scoring would refuse, when hours have gone by."""
    for one in configs:
        config.micro_batch_size(one)
        build_diffusion(one, sampling_steps)
    config.check_batch_fits(base, len(build_dataset(base, train=True)), "images")
    if len(heldout) < MIN_IMAGES:
        raise UserError(f"{len(heldout)} held-out images are too few for a score; at least {MIN_IMAGES} are needed")


def config_arguments(arguments):
    """Those of the command line that make up --config and its fields."""
    kept, follows = [], False
    for argument in arguments:
        if follows and not argument.startswith("--"):
            kept.append(argument)
            follows = False
        elif re.match(r"--(no)?config(\.|=|$)", argument):
            kept.append(argument)
            follows = "=" not in argument
        else:
            follows = False
    return kept


def train(variant_config, changes, arguments, steps, experiment=None):
    """Run the training script to `steps`, from its checkpoint if it has one. Stopped where it was asked to stop.

    arguments    the command line's own --config and --config.… flags, which those of the variant follow
    experiment   in place of the one of the config
    Returns whether it ended well; its own words are on stderr.
    """
    fields = {**changes, "run.output_dir": variant_config.run.output_dir,
              "run.experiment": experiment or variant_config.run.experiment, "train.max_steps": steps,
              "train.plot_graph_steps": max(1, min(variant_config.train.plot_graph_steps, steps // 10)),
              "train.plot_samples_steps": NEVER, "train.sample_size": min(8, variant_config.train.sample_size),
              "train.keep_checkpoints": 1}
    command = [sys.executable, str(ROOT / "train_inf_ae_diffusion.py"), *arguments,
               *(f"--config.{name}={value}" for name, value in fields.items())]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            code = process.wait()
        except KeyboardInterrupt:  # it got the signal as well, and is saving
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if code in (75, 130):
        raise Stopped("stopped; the same command goes on", code)
    return code == 0


def steps_in(minutes, variant_config, changes, arguments):
    """Steps that fit into a time budget, from a short run that is thrown away; kept, so that a second call agrees."""
    record = config.run_dir(variant_config) / "budget.json"
    if record.is_file():
        return json.loads(record.read_text())["steps"]
    experiment = f"{variant_config.run.experiment}.calibration"
    folder = Path(variant_config.run.output_dir) / experiment
    shutil.rmtree(folder, ignore_errors=True)
    if not train(variant_config, changes, arguments, CALIBRATION_STEPS, experiment):
        return None
    steps = max(1, round(60 * minutes / seconds_per_step(read_metrics(folder / "metrics.jsonl"))))
    shutil.rmtree(folder)
    with replacing(record) as temporary:
        temporary.write_text(json.dumps({"minutes": minutes, "steps": steps}) + "\n")
    return steps


def evaluate(variant_config, heldout, sampler, sampling_steps, feature_model):
    """What can be compared between all variants, a dict of numbers; the decoded images stay in the run's folder.

    heldout         the held-out images to encode, decode and compare with, a data set
    feature_model   experiments.metrics.features.FeatureModel
    Images decoded without an encoder are samples, which have no originals: their PSNR is None.
    """
    device = resolve_device(variant_config.run.device)
    modules = load_autoencoder(variant_config, device)
    diffusion = build_diffusion(variant_config)
    yardstick = GaussianMollifier(YARDSTICK, variant_config.data.img_size)
    with autocast(device, resolve_dtype(variant_config.train, device)):
        error = denoising_error(modules, diffusion, heldout, yardstick, EVALUATION_BATCH, device)
    folder, originals = _decode(variant_config, modules, heldout, sampler, sampling_steps, device)
    found = compare(SampleFolder(folder.path, folder.total), [heldout], feature_model,
                    Path(variant_config.run.output_dir) / "statistics")
    psnr = reconstruction_scores(originals, folder.load(), yardstick)["mollified_psnr"]
    metrics = read_metrics(config.run_dir(variant_config) / "metrics.jsonl")
    return {
        "denoising_error": error, "psnr": psnr if variant_config.model.z_dim else None,
        "score": feature_model.score_name, "frechet": found["frechet"], "kid": found["kid"],
        "kid_standard_error": found["kid_standard_error"],
        "num_decoded": folder.total, "steps": metrics[-1]["step"], "training_seconds": training_seconds(metrics),
        "seconds_per_step": seconds_per_step(metrics),
        "peak_memory_gb": max(line["peak_memory_gb"] for line in metrics if "peak_memory_gb" in line),
        "parameters": sum(parameter.numel() for parameter in modules.parameters()),
    }


def _decode(variant_config, modules, heldout, sampler, sampling_steps, device):
    """(folder of the held-out images encoded and decoded again, the originals float [N, C, H, W])."""
    diffusion = build_diffusion(variant_config, sampling_steps, sampler)
    folder = ImageFolder(config.run_dir(variant_config) / "decoded", len(heldout), {
        "size": list(heldout.size), "sampler": sampler, "steps": sampling_steps,
        "decoder": identity(autoencoder_path(variant_config))})
    for indices, progress in folder.missing_batches(EVALUATION_BATCH, evaluations=sampling_steps):
        images, index = next(all_batches(Subset(heldout, indices), len(indices), device))
        with autocast(device, resolve_dtype(variant_config.train, device)):
            folder.save(indices, decode(
                modules["decoder"], diffusion, encode(modules["encoder"], images), heldout.size, sampler,
                rng.sample_generators(device, indices, "ablation"), images.shape[1], progress=progress))
    return folder, torch.cat([images for images, _ in all_batches(heldout, EVALUATION_BATCH)])
