"""Sampling from trained models: the models of a run with their diffusion process, flags, and folders of samples.

A script calls each of the functions that define a flag once.
"""

import functools
import math
import re
from typing import NamedTuple

import torch
from absl import flags

from data.datasets import build_dataset
from diffusion import sampling
from diffusion.gaussian_diffusion import EVALUATIONS, resolve_sampler, sampling_diffusion
from diffusion.mollifier import WIENER_EPS
from diffusion.samplers import NAMES, SAMPLERS
from diffusion.window import check_window, decode_window
from experiments.lib.image_folders import ImageFolder
from models.large_images import check_max_points
from models.load import autoencoder_path, latent_path, load_autoencoder, load_latent_model
from utils import config, rng
from utils.checkpoint import identity
from utils.device import autocast, resolve_device, resolve_dtype
from utils.errors import UserError

MAX_SIDE = 2**16  # pixels of an image of which a window is sampled
MAX_PIXELS = 2**26  # of an image or window: their features take about 120 GB in a model of the paper's size
LATENTS = 256  # drawn at a time: their network is small, and as slow on a GPU for 16
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


def arrays_flag():
    """--save_npy"""
    return flags.DEFINE_bool("save_npy", False, "write 00000.npy, … as well: float32 [C, H, W], before "
                             "rounding to 8 bits")


def check_eta(eta, sampler, cfg):
    """UserError if the flag --eta is set for a sampler other than ddim; sampler: the flag --sampler."""
    name = resolve_sampler(cfg, sampler.value)
    if eta.value and name != "ddim":
        raise UserError(f"--eta={eta.value} applies to --sampler=ddim only; leave it out with {name}")


def _by_objective(defaults):
    return ", ".join(f"{value} for diffusion.objective={objective}" for objective, value in defaults.items())


class ConditionFlags(NamedTuple):
    """Flags of conditions and guidance, as absl holds them."""

    condition: flags.FlagHolder
    scale: flags.FlagHolder
    interval: flags.FlagHolder

    def guidance(self):
        """diffusion.sampling.Guidance"""
        try:
            first, last = map(float, self.interval.value)
        except ValueError:
            first, last = 1, 0
        if not 0 <= first < last <= 1:
            raise UserError(f"--guidance_interval={','.join(self.interval.value)} must be two fractions of the chain "
                            "in order, such as 0.2,0.8")
        return sampling.Guidance(self.scale.value, (first, last))


def condition_flags():
    """Define the flags of ConditionFlags."""
    return ConditionFlags(
        flags.DEFINE_string("condition", None, "name or index of a class, a .npy file of vectors, data for those of "
                            "the held-out images in turn, or none; default: data, or none with --input"),
        float_flag("guidance_scale", 1.0, "weight of the condition in classifier-free guidance; 1 for no guidance",
                   high=1e3),
        flags.DEFINE_list("guidance_interval", ["0", "1"], "fractions of the chain, from noise to image, between which "
                          "guidance acts"))


class TrainedAutoencoder:
    """A trained autoencoder in eval mode, on its device, and the diffusion process that images are sampled by.

    cfg         checked stage-1 config of the run
    steps       network evaluations per image; None: as many as suit the objective
    sampler     one of diffusion.samplers.SAMPLERS; None: the objective's first
    max_points  pixels of all images together that the network takes at a time
    run         section of a config with the device and the seed; by default that of cfg
    inv_snr     epsilon of the Wiener filter
    control     ConditionFlags; None: no conditions, no guidance
    has_data    False if the images have no conditions of their own
    UserError if the run has no checkpoint, or one that does not fit cfg.
    """

    def __init__(self, cfg, steps=None, sampler=None, max_points=MAX_POINTS, run=None,
                 inv_snr=WIENER_EPS, control=None, has_data=True):
        run = run or cfg.run
        self.cfg, self.seed, self.max_points = cfg, run.seed, max_points
        self.diffusion = sampling_diffusion(cfg, steps, sampler, inv_snr)
        self.sampler, self.steps = self.diffusion.sampler, self.diffusion.evaluations
        self.device = resolve_device(run.device)
        self.dtype = resolve_dtype(cfg.train, self.device)
        modules, self.conditions = load_autoencoder(cfg, self.device)
        self.encoder, self.decoder = modules["encoder"], modules["decoder"]
        self.identity = identity(autoencoder_path(cfg))
        self._set_conditions(control, has_data)

    def _set_conditions(self, control, has_data):
        """Set `guidance`; `given`, the conditions of samples in turn, or None; `from_data`, whether `use_data` sets
        them; and `settings`, for the record."""
        self.guidance, self.given, self.from_data, self.settings = sampling.UNGUIDED, None, False, {}
        if control is None:
            return
        if self.conditions is None:
            for holder in control:
                if holder.present:
                    raise UserError(f"--{holder.name} needs a model with conditions, and this one was trained with "
                                    "data.condition='none'; leave it out")
            return
        self.guidance = control.guidance()
        text = control.condition.value or ("data" if has_data else "none")
        self.from_data = text == "data"
        if self.from_data and not has_data:
            raise UserError("--condition=data needs held-out images, and those of --input have no conditions; give "
                            "another, or none")
        if text not in ("data", "none"):
            self.given = self.conditions.parse(text)
        self.settings = {"condition": text, "guidance": [self.guidance.scale, *self.guidance.interval]}
        if self.cfg.model.condition != "latent":
            self.check_dropout(self.cfg)

    def check_dropout(self, cfg):
        """UserError if samples need a model without a condition, and that of a config was never trained so."""
        if not cfg.model.condition_dropout and (
                self.guidance.scale != 1 or self.settings.get("condition") == "none"):
            raise UserError(f"--guidance_scale and --condition=none need a model that was trained without conditions "
                            f"too, and {cfg.run.experiment} has model.condition_dropout=0; give a condition, and leave "
                            "the scale at 1")

    def use_data(self, dataset, values=None):
        """Take conditions of a data set, a list of `values` or all in turn, if --condition asks for those of the data.

        UserError if the model was trained on others.
        """
        if self.from_data:
            if not self.conditions.same(dataset.conditions):
                raise UserError(f"the images of data.root_dir='{dataset.root}' have other conditions than the model, "
                                f"which takes {self.conditions.describe()}; restore them, or give --condition")
            self.given = dataset.condition_values if values is None else torch.stack(values)
            self.settings["conditions_of"] = dataset.fingerprint()

    def condition(self, indices):
        """Conditions int64 [B] or float32 [B, D] of the images or samples with these indices; None for none."""
        if self.given is None:
            return None
        return self.given[torch.as_tensor(indices) % len(self.given)].to(self.device)

    def check_size(self, size):
        """UserError if max_points is too few for images of size (H, W)."""
        check_max_points(self.decoder, size, self.max_points // self.guidance.evaluations)

    def generators(self, indices, purpose):
        """One torch.Generator per image: a function of the seed, the purpose and the global index of the image."""
        return rng.sample_generators(self.device, indices, self.seed, purpose)

    @property
    def classes(self):
        """Names of the classes of samples in turn; None if they have none."""
        if self.given is None or self.given.dim() > 1:
            return None
        return [self.conditions.names[place] for place in self.given.tolist()]

    def encode(self, images, known=None):
        """Latents [B, Z] of images [B, C, H, W], as diffusion.sampling.encode."""
        with autocast(self.device, self.dtype):
            return sampling.encode(self.encoder, images, known, self.max_points)

    def decode(self, z, size, draw=sampling.decode, **options):
        """Images [B, C, H, W] for latents z [B, Z] by diffusion.sampling.decode, which takes the options, or by `draw`
        with the same signature."""
        with autocast(self.device, self.dtype):
            return draw(self.decoder, self.diffusion, z, size, channels=self.cfg.data.channels,
                        max_points=self.max_points, guidance=self.guidance, **options)

    def invert(self, images, z, condition=None):
        """States [B, C, H, W] that the sampler leads back to the images, as diffusion.sampling.invert."""
        with autocast(self.device, self.dtype):
            return sampling.invert(self.decoder, self.diffusion, images, z, max_points=self.max_points,
                                   condition=condition, guidance=self.guidance)


def latent_source(cfg, autoencoder, sampler=None, steps=None):
    """(indices -> latents [B, Z], their settings as plain data) from the trained model of a latent config.

    Latents are on the device of the TrainedAutoencoder. Latent i is a function of run.seed and i.
    steps, sampler   network evaluations and sampler; None: as diffusion.gaussian_diffusion.sampling_diffusion says
    """
    diffusion = sampling_diffusion(cfg, steps, sampler)
    dtype = resolve_dtype(cfg.train, autoencoder.device)
    followed = None if autoencoder.cfg.model.condition == "decoder" else autoencoder.conditions
    if followed:
        autoencoder.check_dropout(cfg)
    model, mean, std = load_latent_model(cfg, autoencoder.device, autoencoder.encoder, followed)

    def draw(indices):
        generators = rng.sample_generators(autoencoder.device, indices, cfg.run.seed, "latent")
        with autocast(autoencoder.device, dtype):
            return sampling.sample_latents(model, diffusion, mean, std, generators,
                                           condition=autoencoder.condition(indices), guidance=autoencoder.guidance)

    return draw, {"latent_sampler": diffusion.sampler, "latent_steps": diffusion.evaluations,
                  "latent_model": identity(latent_path(cfg))}


class SamplingFlags(NamedTuple):
    """Flags that say how samples are made, as absl holds them."""

    size: flags.FlagHolder
    sampler: flags.FlagHolder
    steps: flags.FlagHolder
    eta: flags.FlagHolder
    inv_snr: flags.FlagHolder
    latent_sampler: flags.FlagHolder
    latent_steps: flags.FlagHolder
    max_points: flags.FlagHolder
    control: ConditionFlags

    def given(self):
        """Names of those on the command line."""
        return [holder.name for holder in (*self[:-1], *self.control) if holder.present]


def define_sampling_flags():
    """Define the flags of SamplingFlags; call it once in a script."""
    return SamplingFlags(
        size_flag("the samples"), sampler_flag(), steps_flag(), eta_flag(), inv_snr_flag(),
        flags.DEFINE_enum("latent_sampler", None, NAMES, "sampler of latents; default: ddpm, or that of images if the "
                          "objective is another"),
        flags.DEFINE_integer("latent_sampling_steps", None, "network evaluations per latent; default: all steps, or as "
                             "many as for images if the objective is not ddpm", lower_bound=1),
        max_points_flag(), condition_flags())


def make_samples(cfg, decoder_cfg, options, total, output=None, window=None, arrays=False):
    """Samples 0 to total − 1 of a trained pair of models, as an ImageFolder; existing images are kept.

    cfg, decoder_cfg   checked configs of the latent model (None if there is no encoder) and of the autoencoder
    options            SamplingFlags
    total              number of samples; None: data.fid_samples of cfg
    output             the folder; None: samples/<experiment>_<height>x<width>[_<window>]
    window             "x0 y0 x1 y1", fractions of the image: sample this part only
    arrays             write float32 arrays as well
    Image i is a function of run.seed and i: it does not depend on the batch size or on interruptions.
    """
    if cfg is not None:
        config.check_same_latent(cfg, decoder_cfg)
    elif decoder_cfg.model.z_dim:
        raise UserError("an autoencoder is sampled with a latent model; give the latent config as --config and the "
                        "autoencoder's as --decoder_config (only a model with model.z_dim=0 is sampled alone)")
    own = cfg or decoder_cfg
    size = parse_image_size(options.size.value, decoder_cfg.data.img_size, whole=window is None)
    spans = parse_window(window, size)
    check_eta(options.eta, options.sampler, decoder_cfg)
    autoencoder = TrainedAutoencoder(decoder_cfg, options.steps.value, options.sampler.value, options.max_points.value,
                                     own.run, options.inv_snr.value, options.control)
    if autoencoder.from_data:
        autoencoder.use_data(build_dataset(decoder_cfg, train=False))
    name = "{}_{}x{}".format(own.run.experiment, *size)
    draw = {}
    if spans:
        check_image_size([end - first for first, end in spans], f"--window={window}")
        check_window(autoencoder.diffusion)
        draw["draw"] = functools.partial(decode_window, window=spans)
        name += "_rows_{}_{}_columns_{}_{}".format(*spans[0], *spans[1])
    else:
        autoencoder.check_size(size)
    settings = {"size": list(size), "window": spans and [list(span) for span in spans], "seed": own.run.seed,
                "sampler": autoencoder.sampler, "steps": autoencoder.steps, "eta": options.eta.value,
                "inv_snr": options.inv_snr.value, "decoder": autoencoder.identity, **autoencoder.settings}
    if autoencoder.classes:
        settings["classes"] = autoencoder.classes
    if cfg is None:
        settings["latent_model"] = "none"

        def draw_latents(indices):
            return torch.zeros(len(indices), 0, device=autoencoder.device)
    else:
        draw_latents, made = latent_source(cfg, autoencoder, options.latent_sampler.value, options.latent_steps.value)
        settings |= made

    folder = ImageFolder(output or f"samples/{name}", total or own.data.fid_samples, settings, arrays=arrays)
    at_once = own.train.sample_size
    for indices, progress in folder.missing_batches(max(LATENTS, at_once), autoencoder.steps):
        latents = draw_latents(indices)
        for first in range(0, len(indices), at_once):
            part, z = indices[first:first + at_once], latents[first:first + at_once]
            folder.save(part, autoencoder.decode(
                z, size, eta=options.eta.value, generators=autoencoder.generators(part, "image"),
                progress=functools.partial(_advance, progress, len(part) / len(indices)),
                condition=autoencoder.condition(part), **draw))
    return folder


def _advance(progress, share, evaluations):
    progress(share * evaluations)


def parse_image_size(text, default, flag="sample_img_size", whole=True):
    """(H, W) from "256", "192x256" or None, which means default x default; `flag` is named in the error.

    whole   False if only a window of the image is sampled
    """
    if text is None:
        return default, default
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    size = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if min(size) < 16:
        raise UserError(f"--{flag}={text} must be a number of pixels, at least 16, or HEIGHTxWIDTH")
    if max(size) > MAX_SIDE:
        raise UserError(f"--{flag}={text} must be at most {MAX_SIDE} pixels")
    if whole:
        check_image_size(size, f"--{flag}={text}")
    return size


def check_image_size(size, flag):
    """UserError if images or windows of size (H, W), which `flag` (--name=value) asks for, are too large to sample."""
    if math.prod(size) > MAX_PIXELS:
        raise UserError(f"{flag} asks for {size[0]}x{size[1]} pixels; at most {MAX_PIXELS}, such as 8192x8192, can be "
                        "sampled at once; lower it, or sample a smaller --window by generate_samples.py")


def parse_window(text, size):
    """((top, bottom), (left, right)) in pixels of an image of size (H, W): all pixels that the window "x0 y0 x1 y1", in
    fractions of the image, touches. None for None."""
    if text is None:
        return None
    try:
        x0, y0, x1, y1 = (float(word) for word in re.split(r"[\s,]+", text.strip()))
    except ValueError:
        x0 = y0 = x1 = y1 = -1.0
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise UserError(f"--window={text} must be four numbers x0 y0 x1 y1, the left, upper, right and lower end of "
                        "the window as fractions of the image, with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1")
    spans = [(min(math.floor(round(first * length, 6)), length - 1), math.ceil(round(end * length, 6)))
             for first, end, length in ((y0, y1, size[0]), (x0, x1, size[1]))]
    return tuple((first, max(end, first + 1)) for first, end in spans)
