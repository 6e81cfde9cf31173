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
from diffusion.gaussian_diffusion import build_diffusion, sampling_diffusion
from diffusion.mollifier import GaussianMollifier
from experiments.lib.image_folders import ImageFolder, SampleFolder
from experiments.lib.sampling import TrainedAutoencoder
from experiments.metrics.fid import MIN_IMAGES, compare
from experiments.metrics.images import denoising_errors, reconstruction_scores
from models.build import build_decoder, build_encoder
from utils import config
from utils.device import ROOT, autocast
from utils.errors import UserError
from utils.files import write_json
from utils.logging import read_metrics, seconds_per_step, training_seconds
from utils.shutdown import Stopped

COMMON_BLUR = 1.0  # pixels: images of all variants are compared after this blur, whatever their own mollifier
EVALUATION_BATCH = 64
CALIBRATION_STEPS = 40  # of a run that is discarded, to convert minutes to steps
NEVER = 10**9


class Variant(NamedTuple):
    """A variant: its axis and name, the fields that it changes, and its run. Variants without changes share a run."""

    axis: str
    name: str
    changes: dict
    experiment: str

    def config(self, base, output):
        """The checked stage-1 config; UserError if the changes contradict the base."""
        changed = base.copy_and_resolve_references()
        changed.update_from_flattened_dict(self.changes)
        changed.run.output_dir, changed.run.experiment = str(output), self.experiment
        config.check_autoencoder_config(changed, f"{self.axis}, {self.name}: config")
        build_diffusion(changed)
        with torch.device("meta"):  # shapes only
            build_encoder(changed), build_decoder(changed)
        return changed


class FirstImages(Subset):
    """The first `count` images of a data set, or all it has, as a data set."""

    def __init__(self, dataset, count):
        super().__init__(dataset, range(min(count, len(dataset))))
        self.name, self.size, self.train, self.in_memory = dataset.name, dataset.size, dataset.train, dataset.in_memory

    def fingerprint(self):
        return f"{self.dataset.fingerprint()} {len(self)}"

    def describe(self):
        return f"the first {len(self)} of {self.dataset.describe()}"


def make_variant(axis, name, changes):
    """The Variant with a run of its own or, without changes, with the run called base."""
    return Variant(axis, name, changes, f"{axis}/{re.sub('[^A-Za-z0-9.]+', '_', name)}" if changes else "base")


def check_runs(base, configs, heldout, sampling_steps, sampler):
    """UserError for what training or scoring would refuse hours later."""
    for one in configs:
        config.micro_batch_size(one)
        sampling_diffusion(one, sampling_steps, sampler)
    config.check_batch_fits(base, len(build_dataset(base, train=True)), "images")
    if len(heldout) < MIN_IMAGES:
        raise UserError(f"{len(heldout)} held-out images are too few for a score; at least {MIN_IMAGES} are needed")


def config_arguments(arguments):
    """The arguments of a command line that set --config and its fields."""
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
    """Run the training script until `steps`, from its checkpoint if there is one; True if it succeeded.

    arguments    the command line's own --config and --config.… flags; those of the variant follow
    experiment   in place of the config's
    Raises Stopped if the script was stopped by a signal.
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
        except KeyboardInterrupt:  # the script got the signal as well, and saves its state
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if code in (75, 130):
        raise Stopped("stopped; the same command resumes", code)
    return code == 0


def steps_in(minutes, variant_config, changes, arguments):
    """Training steps within a time budget, measured by a short run and recorded for further calls; None if it fails."""
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
    write_json(record, {"minutes": minutes, "steps": steps})
    return steps


def evaluate(variant_config, heldout, sampler, sampling_steps, feature_model):
    """Scores and costs of a trained variant, comparable between variants: a dict of numbers.

    heldout         data set of held-out images, to encode, decode and compare with
    feature_model   experiments.metrics.features.FeatureModel
    The decoded images stay in the folder of the run. Without an encoder they are samples, and the PSNR is None.
    """
    autoencoder = TrainedAutoencoder(variant_config, sampling_steps, sampler)
    modules = torch.nn.ModuleDict({"encoder": autoencoder.encoder, "decoder": autoencoder.decoder})
    blur = GaussianMollifier(COMMON_BLUR, variant_config.data.img_size)
    with autocast(autoencoder.device, autoencoder.dtype):
        errors = denoising_errors(modules, build_diffusion(variant_config), heldout, blur, EVALUATION_BATCH,
                                  autoencoder.device).tolist()
    folder = _decode(autoencoder, heldout)
    found = compare(SampleFolder(folder.path, folder.total), [heldout], feature_model,
                    Path(variant_config.run.output_dir) / "statistics")
    originals = torch.cat([images for images, *_ in all_batches(heldout, EVALUATION_BATCH)])
    psnr = reconstruction_scores(originals, folder.load(), blur)["mollified_psnr"]
    metrics = read_metrics(config.run_dir(variant_config) / "metrics.jsonl")
    return {
        # In the last quarter x_t has almost no information about x_0: the estimate is the error of the prediction over
        # sqrt(alpha_bar), which later steps of sampling correct.
        "denoising_error": sum(errors[:3]) / 3, "denoising_errors": errors,
        "validation_losses": next([line.get(f"validation_loss_q{i}") for i in range(1, 5)]
                                  for line in reversed(metrics) if "validation_loss" in line),
        "psnr": psnr if variant_config.model.z_dim else None,
        "score": feature_model.score_name, "frechet": found["frechet"], "kid": found["kid"],
        "kid_standard_error": found["kid_standard_error"],
        "num_decoded": folder.total, "steps": metrics[-1]["step"], "training_seconds": training_seconds(metrics),
        "seconds_per_step": seconds_per_step(metrics),
        "peak_memory_gb": max(line["peak_memory_gb"] for line in metrics if "peak_memory_gb" in line),
        "parameters": sum(parameter.numel() for parameter in modules.parameters()),
    }


def _decode(autoencoder, heldout):
    """ImageFolder of the held-out images, encoded and decoded."""
    steps = autoencoder.steps
    folder = ImageFolder(config.run_dir(autoencoder.cfg) / "decoded", len(heldout), {
        "size": list(heldout.size), "sampler": autoencoder.sampler, "steps": steps, "decoder": autoencoder.identity})
    for indices, progress in folder.missing_batches(EVALUATION_BATCH, steps):
        images, _, condition = next(all_batches(Subset(heldout, indices), len(indices), autoencoder.device))
        generators = autoencoder.generators(indices, "ablation")
        folder.save(indices, autoencoder.decode(autoencoder.encode(images), heldout.size, generators=generators,
                                                progress=progress, condition=condition))
    return folder
