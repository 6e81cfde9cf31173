"""The networks and the loss on tensors that say they are on a GPU, with shapes, dtypes and devices but no numbers:
PyTorch refuses to mix devices there as it does on a GPU, so this needs none."""

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from data.coordinates import Coordinates
from diffusion import mollifier
from diffusion.gaussian_diffusion import build_diffusion
from models.build import build_decoder, build_encoder, build_latent_model
from models.interpolation import Mixture
from models.normalisation import normalise
from models.sparse_conv import INTERPRETED
from tests.models.tiny import SIZE, tiny_config, tiny_latent_config

pytestmark = pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="where kernels run, other tests do")
GPU = torch.device("cuda", 0)
BATCH, POINTS, CHANNELS = 2, 64, 3


@contextlib.contextmanager
def pretended_gpu(dtype):
    """Tensors that are made here have no numbers; autocast to `dtype` on the GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype != torch.float32)  # torch.autocast would turn it off: there is no GPU
    torch.set_autocast_dtype("cuda", dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        for function in vars(mollifier).values():  # what they keep has no numbers
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


def without_search(coords, config):
    """Coordinates with nearest points, which would be searched for in numbers."""
    grid = config.model.uno_res
    place = torch.empty(coords.batch, grid**2, 3, dtype=torch.int64, device=coords.device)
    mixture = Mixture(place, torch.empty(place.shape, device=coords.device), coords.num_points)
    coords.cached(("knn_to_grid", grid, 3), lambda: mixture)
    return coords


def subset(config):
    index = torch.empty(BATCH, POINTS, dtype=torch.int64, device=GPU)
    return without_search(Coordinates._trusted(index, (SIZE, SIZE)), config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [
    {}, {"uno_conv_type": "spectral"}, {"depthwise_sparse": False}, {"stochastic_encoding": True},
    {"learn_sigma": True, "uno_dropout": 0.1}, {"z_dim": 0},
])
def test_the_loss_of_stage_1_is_on_the_gpu(dtype, options):
    config = tiny_config(backend="torch_dense", **options)
    diffusion, networks = build_diffusion(config), [build_encoder(config), build_decoder(config)]
    assert diffusion.mollifier.noise_variance > 0  # a number, found on the CPU and kept
    with pretended_gpu(dtype):
        encoder, decoder = map(moved, networks)
        images = torch.empty(BATCH, CHANNELS, SIZE, SIZE, device=GPU)
        t = torch.empty(BATCH, dtype=torch.int64, device=GPU)
        seen, coords = subset(config), subset(config)
        z = encoder(seen.gather(images), seen)
        z = z[0] if isinstance(z, tuple) else z
        terms = diffusion.training_losses(lambda values, time: decoder(values, time, z, coords), images, t, coords,
                                          torch.empty_like(images))
    for name, term in terms.items():
        assert (term.device, term.dtype, term.shape) == (GPU, torch.float32, (BATCH,)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(SIZE, SIZE), (24, 18)])
def test_the_estimate_of_a_whole_image_is_on_the_gpu(dtype, size):
    config = tiny_config(backend="torch_dense", learn_sigma=True)
    diffusion, network = build_diffusion(config), build_decoder(config).eval()
    with pretended_gpu(dtype), torch.no_grad():
        decoder = moved(network)
        index = torch.arange(size[0] * size[1], device=GPU).expand(BATCH, -1)
        coords = without_search(Coordinates._trusted(index, size, raster=True), config)
        z = torch.empty(BATCH, config.model.z_dim, device=GPU)
        denoise = diffusion.denoiser(lambda values, time: decoder(values, time, z, coords), coords)
        x = torch.empty(BATCH, CHANNELS, *size, device=GPU)
        estimate, variance = denoise.with_variance(x, torch.empty(BATCH, dtype=torch.int64, device=GPU))
        image = diffusion.mollifier.sharpen(estimate)
    for tensor in (estimate, variance, image):
        assert (tensor.device, tensor.dtype, tensor.shape) == (GPU, torch.float32, x.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_of_stage_2_is_on_the_gpu(dtype):
    config = tiny_latent_config()
    diffusion, network = build_diffusion(config), build_latent_model(config)
    with pretended_gpu(dtype):
        model = moved(network)
        latents = torch.empty(BATCH, config.model.z_dim, device=GPU)
        t = torch.empty(BATCH, dtype=torch.int64, device=GPU)
        loss = diffusion.training_losses(model, latents, t, None, torch.empty_like(latents))["loss"]
    assert (loss.device, loss.dtype, loss.shape) == (GPU, torch.float32, (BATCH,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_keeps_half_precision_for_the_layer_after_it(dtype):
    norm = nn.LayerNorm(8)
    with pretended_gpu(dtype):
        out = normalise(torch.empty(2, 5, 8, device=GPU, dtype=dtype), moved(norm), gelu=True)
    assert (out.device, out.dtype) == (GPU, dtype)


def test_tensors_of_two_devices_would_be_seen():
    with pretended_gpu(torch.float32), pytest.raises(Exception, match="same device"):
        torch.empty(2, device=GPU) + torch.empty(2)
