"""Flags that several scripts share; a script calls each function once."""

import math

from absl import flags

from diffusion.gaussian_diffusion import EVALUATIONS, resolve_sampler
from diffusion.mollifier import WIENER_EPS
from diffusion.samplers import NAMES, SAMPLERS
from utils.errors import UserError

MAX_POINTS = 2**20  # 3 GB with 64 features in float32


def float_flag(name, default, text, low=0.0, high=None):
    """A flag that holds a finite number between low and high."""
    holder = flags.DEFINE_float(name, default, text, lower_bound=low, upper_bound=high)
    flags.register_validator(name, lambda value: value is None or math.isfinite(value), "it must be a finite number")
    return holder


def size_flag(what):
    """--sample_img_size: the size of `what`."""
    return flags.DEFINE_string("sample_img_size", None, f"size of {what} in pixels, SIDE or HEIGHTxWIDTH; default: the "
                               "training resolution")


def sampler_flag():
    """--sampler"""
    return flags.DEFINE_enum("sampler", None, NAMES, "sampler of images; default: " + _by_objective(
        {objective: names[0] for objective, names in SAMPLERS.items()}))


def steps_flag(default=None):
    """--sampling_steps; the default is a number, or None for one that depends on diffusion.objective."""
    text = "" if default else "; default: " + _by_objective(EVALUATIONS)
    return flags.DEFINE_integer("sampling_steps", default, "network evaluations per image" + text, lower_bound=1)


def eta_flag():
    """--eta"""
    return float_flag("eta", 0.0, "noise of ddim: 0 for none, 1 for as much as ddpm", high=1.0)


def inv_snr_flag():
    """--inv_snr"""
    return float_flag("inv_snr", WIENER_EPS, "inverse signal-to-noise ratio of the Wiener filter that sharpens images",
                      low=1e-6)


def max_points_flag():
    """--max_points"""
    return flags.DEFINE_integer("max_points", MAX_POINTS, "most pixels, of all images together, that the network "
                                "processes at a time; lower it to save memory", lower_bound=1)


def input_flag():
    """--input"""
    return flags.DEFINE_string("input", None, "folder of images of one size, instead of held-out images")


def check_eta(eta, sampler, cfg):
    """UserError if the flag --eta is set for a sampler other than ddim; sampler: the flag --sampler."""
    name = resolve_sampler(cfg, sampler.value)
    if eta.value and name != "ddim":
        raise UserError(f"--eta={eta.value} applies to --sampler=ddim only; leave it out with {name}")


def _by_objective(defaults):
    return ", ".join(f"{value} for diffusion.objective={objective}" for objective, value in defaults.items())
