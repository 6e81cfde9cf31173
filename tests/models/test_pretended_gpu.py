"""The networks and the loss on fake tensors, which claim to be on a GPU and have shapes and dtypes but no numbers.

PyTorch refuses to mix devices there as it does on a GPU.
"""

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from data.coordinates import Coordinates
from diffusion import mollifier
from diffusion.gaussian_diffusion import build_diffusion
from models.build import build_decoder, build_encoder, build_latent_model
from tests.models.tiny import SIZE, tiny_config, tiny_latent_config

pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")]
GPU = torch.device("cuda", 0)
BATCH, POINTS = 2, 64


@contextlib.contextmanager
def pretended_gpu(dtype):
    """New tensors are fake, and autocast to `dtype` is on for the GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype != torch.float32)  # torch.autocast would turn it off without a GPU
    torch.set_autocast_dtype("cuda", dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        for function in vars(mollifier).values():  # their caches hold fake tensors
            getattr(function, "cache_clear", lambda: None)()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def moved(network):
    """The network with its parameters and buffers on the GPU."""
    for module in network.modules():
        for held, wrap in ((module._parameters, nn.Parameter), (module._buffers, lambda tensor: tensor)):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = wrap(torch.empty_like(tensor, device=GPU))
    return network


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [
    {}, {"uno_conv_type": "spectral"}, {"depthwise_sparse": False}, {"stochastic_encoding": True},
    {"learn_sigma": True, "uno_dropout": 0.1}, {"z_dim": 0},
])
def test_the_loss_of_stage_1_is_on_the_gpu(dtype, options):
    config = tiny_config(backend="torch_dense", **options)
    diffusion, networks = build_diffusion(config), [build_encoder(config), build_decoder(config)]
    assert diffusion.mollifier.noise_variance > 0  # a number, computed on the CPU and kept
    with pretended_gpu(dtype):
        encoder, decoder = map(moved, networks)
        images = torch.empty(BATCH, 3, SIZE, SIZE, device=GPU)
        seen, coords = (Coordinates._trusted(torch.empty(BATCH, POINTS, dtype=torch.int64, device=GPU), (SIZE, SIZE))
                        for _ in range(2))
        z = encoder(seen.gather(images), seen)
        z = z[0] if isinstance(z, tuple) else z
        terms = diffusion.training_losses(
            lambda values, time: decoder(values, time, z, coords), images,
            torch.empty(BATCH, dtype=torch.int64, device=GPU), coords, torch.empty_like(images))
    for name, term in terms.items():
        assert (term.device, term.dtype, term.shape) == (GPU, torch.float32, (BATCH,)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(SIZE, SIZE), (24, 18)])
def test_the_estimate_of_a_whole_image_is_on_the_gpu(dtype, size):
    config = tiny_config(backend="torch_dense", learn_sigma=True)
    diffusion, network = build_diffusion(config), build_decoder(config).eval()
    with pretended_gpu(dtype), torch.no_grad():
        decoder, coords = moved(network), Coordinates.full(BATCH, size, GPU)
        z = torch.empty(BATCH, config.model.z_dim, device=GPU)
        denoise = diffusion.denoiser(lambda values, time: decoder(values, time, z, coords), coords)
        x = torch.empty(BATCH, 3, *size, device=GPU)
        estimate, variance = denoise.with_variance(x, torch.empty(BATCH, dtype=torch.int64, device=GPU))
        image = diffusion.mollifier.sharpen(estimate)
    for tensor in (estimate, variance, image):
        assert (tensor.device, tensor.dtype, tensor.shape) == (GPU, torch.float32, x.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_of_stage_2_is_on_the_gpu(dtype):
    config = tiny_latent_config()
    diffusion, network = build_diffusion(config), build_latent_model(config)
    with pretended_gpu(dtype):
        latents = torch.empty(BATCH, config.model.z_dim, device=GPU)
        t = torch.empty(BATCH, dtype=torch.int64, device=GPU)
        loss = diffusion.training_losses(moved(network), latents, t, None, torch.empty_like(latents))["loss"]
    assert (loss.device, loss.dtype, loss.shape) == (GPU, torch.float32, (BATCH,))


def test_tensors_of_two_devices_would_be_seen():
    with pretended_gpu(torch.float32), pytest.raises(Exception, match="same device"):
        torch.empty(2, device=GPU) + torch.empty(2)
