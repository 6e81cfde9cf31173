"""Solve linear inverse problems y = A x + n by posterior samples (docs/inverse_problems.md).

    python experiments/inverse_problem.py --config configs/random_fields_config.py --operator points:31 --noise 0.05

The images x are held out, or those of --input. z is a sample with --latent_config, else the encoding of the linear
estimate of x. Writes <output>/originals, linear (the best linear estimates), means, deviations (white is the largest of
an image), samples (sample p of image i has the number i · num_posterior_samples + p), grid.png and scores.json. Image i
is a function of run.seed and i. The same command resumes an interrupted run.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from absl import flags

from data.datasets import build_dataset
from data.datasets.base import spread
from data.loader import to_float
from diffusion.guidance import Constraint, guided_ddim
from diffusion.posterior import PosteriorDenoiser, Spectrum, gaussian_update
from diffusion.samplers import FIRST_ORDER, sample
from diffusion.sampling import images_at_once
from experiments.lib.applications import Application
from experiments.lib.operators import FORMS, build_operator
from experiments.lib.sampling import float_flag
from utils import cli, config, rng
from utils.errors import UserError

APPLICATION = Application("inverse_problems", count=4)
OPERATOR = flags.DEFINE_string("operator", "points:31", f"what is measured: {FORMS}, joined by +; @N after one: of "
                               "channel N")
NOISE = float_flag("noise", 0.05, "standard deviation of the noise in the data; images lie in [-1, 1]", low=1e-4)
RULE = flags.DEFINE_enum("rule", "posterior", ("posterior", "guidance"), "posterior: the covariance of the training "
                         "data; guidance: the gradient of the misfit, by DDIM")
GUIDANCE = float_flag("guidance", 0.3, "lambda of --rule guidance", high=1e6)
POSTERIOR_SAMPLES = flags.DEFINE_integer("num_posterior_samples", 16, "samples for each image", lower_bound=2)
SPECTRUM_IMAGES = 512  # training images that the covariance is estimated from


def main():
    cfg = config.read_trained_autoencoder_config(APPLICATION.config)
    sampler = None
    if RULE.value == "guidance":
        if APPLICATION.sampler.value:
            raise UserError(f"--sampler={APPLICATION.sampler.value} does not apply to --rule=guidance; leave it out")
        sampler = FIRST_ORDER[cfg.diffusion.objective]
    autoencoder = APPLICATION.load(cfg, sampler)
    images, origin = APPLICATION.read_images(autoencoder, APPLICATION.count.value)
    total, *image_shape = images.shape
    size, count = image_shape[1:], POSTERIOR_SAMPLES.value
    if autoencoder.given is not None:
        autoencoder.given = autoencoder.given.repeat_interleave(count, dim=0)  # in the order of all samples
    autoencoder.check_size(size)
    build_operator(OPERATOR.value, image_shape, NOISE.value, cfg.run.seed, 0, autoencoder.device)  # mistakes show here
    draw_latents, latent_model = APPLICATION.latent_sampler(autoencoder)
    results = APPLICATION.results(
        autoencoder, "", dict.fromkeys(("originals", "linear", "means", "deviations"), total),
        {**origin, "size": size, "operator": OPERATOR.value, "noise": NOISE.value, "rule": RULE.value,
         "guidance": GUIDANCE.value, "posterior_samples": count, "latent_model": latent_model})
    folders = results.folders
    all_samples = results.folder("samples", total * count)
    mean, spectrum = training_statistics(cfg, size, autoencoder.device)

    for (index,), progress in results.missing_batches(1, autoencoder.steps):
        truth = to_float(images[index])[None].to(autoencoder.device)
        operator = build_operator(OPERATOR.value, image_shape, NOISE.value, cfg.run.seed, index, autoencoder.device)
        clean = operator.A(truth)
        noise = rng.randn(clean.shape, autoencoder.generators([index], "measurement"), autoencoder.device)
        data = clean + operator.noise * noise
        linear = mean + gaussian_update(operator, data - operator.A(mean), spectrum.apply_covariance)
        if draw_latents:
            z = draw_latents(range(index * count, (index + 1) * count))
        else:
            z = autoencoder.encode(linear.clamp(-1, 1)).expand(count, -1)
        samples = solve(autoencoder, z, operator, data, spectrum, size, index, progress)
        all_samples.save(range(index * count, (index + 1) * count), samples)
        deviation = samples.std(0, keepdim=True)
        if APPLICATION.arrays.value:
            np.save(results.output / f"data_{index:05d}.npy", data[0].cpu().numpy())
        folders["deviations"].save([index], 2 * deviation / deviation.max().clamp(min=1e-6) - 1, deviation)
        results.save([index], {"originals": truth, "linear": linear, "means": samples.mean(0, keepdim=True)})

    scores = score(*(folders[name].load() for name in ("originals", "linear")),
                   all_samples.load().unflatten(0, (total, count)))
    results.write_scores(scores)
    results.write_grid()
    print(f"{total} images, {count} samples each: error of the mean {scores['error']:.4f} (of the best linear estimate "
          f"{scores['linear_error']:.4f}), standard deviation of the samples {scores['deviation']:.4f}, truth within "
          f"two of them {scores['coverage']:.0%}; images in {results.output}")


def training_statistics(cfg, size, device):
    """(mean colour [1, C, 1, 1] as an image of `size`, Spectrum at `size`) of the training data."""
    dataset = build_dataset(cfg, train=True)
    images = to_float(torch.stack([dataset[index] for index in spread(len(dataset), SPECTRUM_IMAGES)]))
    mean = images.mean((0, 2, 3)).view(1, -1, 1, 1).expand(-1, -1, *size).to(device)
    return mean, Spectrum.of_images(images).at(size).to(mean)


def solve(autoencoder, z, operator, data, spectrum, size, index, progress):
    """Posterior samples [P, C, H, W] of image `index`, one per latent of z [P, Z]."""
    samples, diffusion = [], autoencoder.diffusion
    indices = range(index * len(z), (index + 1) * len(z))
    at_once = images_at_once(autoencoder.cfg.train.sample_size, size, autoencoder.max_points)
    for first in range(0, len(z), at_once):
        latents, part = z[first:first + at_once], indices[first:first + at_once]
        generators = autoencoder.generators(part, "posterior")
        repeated = data.expand(len(latents), *data.shape[1:])

        def path(denoise, x, repeated=repeated, generators=generators):
            if RULE.value == "guidance":
                constraint = Constraint(operator, repeated, diffusion.mollifier)
                return guided_ddim(denoise, x, diffusion.schedule, constraint, GUIDANCE.value, limited=True,
                                   generator=generators)
            return sample(PosteriorDenoiser(denoise, diffusion, operator, repeated, spectrum), x, diffusion, generators)

        share = len(latents) / len(z)
        samples.append(autoencoder.decode(latents, size, generators=generators, path=path,
                                          progress=lambda done, share=share: progress(done * share),
                                          condition=autoencoder.condition(part)))
    return torch.cat(samples)


def score(truth, linear, samples):
    """Scores of samples [N, P, C, H, W] against the truth and the best linear estimate of it, [N, C, H, W].

    error           root mean square of mean − truth
    linear_error    the same of the linear estimate, which is the mean of the posterior if x is normal
    deviation       root mean square of the samples' standard deviations
    coverage        share of the true values within two standard deviations of the mean
    """
    error, deviation = samples.mean(1) - truth, samples.std(1)
    squares = {"error": error, "linear_error": linear - truth, "deviation": deviation}
    return {"count": len(truth), **{name: value.square().mean().sqrt().item() for name, value in squares.items()},
            "coverage": (error.abs() <= 2 * deviation).double().mean().item()}


if __name__ == "__main__":
    cli.run(main)
