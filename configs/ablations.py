"""Ablation axes: functions from a stage-1 config to its variants, {name: {field: changed value}}.

A variant without changes is the base config. `experiments/ablate.py` trains and scores the variants.
"""


def subsampling(base):
    """Fraction of the pixels in a training step; the paper uses a quarter.

    Published for FFHQ-128: FID_CLIP 3.15, 4.12, 4.75 and 6.48.
    """
    return {f"1/{rate}": {"mc_integral.q_sample": base.data.img_size**2 // rate} for rate in (1, 2, 4, 8)}


def sampling_kind(base):
    """Choice of the random pixels. Published for FFHQ-128: FID_CLIP 4.75 uniform, 7.63 quasi Monte Carlo."""
    return {kind: {"mc_integral.type": kind} for kind in ("uniform", "halton", "stratified")}


def kernel(base):
    """Depthwise or full kernels of the sparse operator. Published for FFHQ-128: FID_CLIP 4.75 and 5.63."""
    return {"depthwise": {"model.depthwise_sparse": True}, "full": {"model.depthwise_sparse": False}}


def operator(base):
    """Estimate of the sparse operator: the paper's, or one whose mean does not depend on the fraction of the pixels."""
    return {kind: {"model.operator": kind} for kind in ("paper", "consistent")}


def mollifier(base):
    """Standard deviation of the mollifier in pixels at the training resolution; 0 is plain DDPM."""
    return {f"sigma {sigma:g}": {"diffusion.gaussian_filter_std": sigma} for sigma in (0.0, 0.5, 1.0, 2.0)}


def parameterisation(base):
    """Prediction of the network. Preconditioning is off, since only one of the four supports it."""
    plain = {"diffusion.precondition": False, "diffusion.balance_loss": False}
    return {kind: {"diffusion.model_mean_type": kind, **plain}
            for kind in ("mollified_epsilon", "epsilon", "v", "xstart")}


def neighbours(base):
    """Number of nearest points averaged by each grid node in the interpolation to the grid."""
    return {f"k {k}": {"model.knn_neighbours": k} for k in (1, 3, 8)}


def grid(base):
    """Layers of the grid U-Net: 3×3 convolutions or Fourier layers."""
    return {kind: {"model.uno_conv_type": kind} for kind in ("conv", "spectral")}


def encoder(base):
    """Diffusion autoencoder, or a diffusion model without an encoder."""
    return {"encoder": {}, "none": {"model.z_dim": 0, "model.stochastic_encoding": False}}


def seed(base):
    """Only the seed varies; differences on other axes have to exceed this spread."""
    return {f"seed {seed}": {"run.seed": seed} for seed in range(base.run.seed, base.run.seed + 3)}


AXES = {axis.__name__: axis for axis in (
    encoder, grid, kernel, mollifier, neighbours, operator, parameterisation, sampling_kind, seed, subsampling)}


def get_variants(axis, base):
    """{name: {field: value}} of an axis, without fields that have that value in `base` already."""
    return {name: {field: value for field, value in fields.items() if _lookup(base, field) != value}
            for name, fields in AXES[axis](base).items()}


def _lookup(config, field):
    section, name = field.split(".")
    return config[section][name]
