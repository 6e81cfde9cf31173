"""The suites of experiments/benchmark.py, each of which returns the rows (dicts) of a table, and how they measure.

The training step is that of utils.trainer.Trainer with the loss of train_inf_ae_diffusion.py, on random images. The
reference is experiments/lib/reference.py: the same networks in dense, contiguous form, in float32.
"""

import functools
import itertools
import statistics
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data.coordinates import Coordinates
from data.loader import Batch
from diffusion.gaussian_diffusion import build_diffusion
from diffusion.sampling import decode
from diffusion.timestep_samplers import build_timestep_sampler
from experiments.lib.reference import ReferenceDecoder, ReferenceTrainer, nearest_points
from models.build import build_decoder
from models.interpolation import nearest_pixels
from models.kernels import BACKENDS, obstacle
from models.sparse_conv import sparse_conv
from utils import rng
from utils.config import micro_batch_size
from utils.device import autocast, resolve_dtype
from utils.trainer import Trainer

MIN_TURN = 2e-3  # seconds for which a short function is repeated
SHORT = 10 * MIN_TURN  # seconds of one call


def interleaved(arms, repeats, device):
    """Median seconds of {name: function}.

    After a warm-up the functions take turns, so that a change in the load of the machine affects all of them. Short
    functions are repeated for MIN_TURN after a call that is not counted, as other functions have evicted its caches.
    """
    times = {name: [] for name in arms}
    for turn in range(repeats + 1):
        for name, function in arms.items():
            seconds = _seconds_of_turn(function, device)
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def _seconds_of_turn(function, device):
    _synchronise(device)
    first = _seconds(function, device)
    if first >= SHORT:
        return first
    calls, passed = 0, 0.0
    while passed < MIN_TURN:
        calls, passed = calls + 1, passed + _seconds(function, device)
    return passed / calls


def _seconds(function, device):
    started = time.perf_counter()
    function()
    _synchronise(device)
    return time.perf_counter() - started


def _synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(function, device):
    """Largest number of bytes in tensors during function(), beyond those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes), default=0)


def copy_bandwidth(device):
    """Bytes read and written per second by copies of a tensor of 256 MB."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / interleaved({"copy": lambda: target.copy_(source)}, 5, device)["copy"]


def matmul_peak(device, dtype):
    """Floating-point operations per second of a product of two 2048² matrices."""
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    return 2 * 2048**3 / interleaved({"product": lambda: a @ a}, 5, device)["product"]


DENSITIES = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
RATES = (1, 2, 4, 8)  # pixels per sampled point
REFERENCE_RATES = (4, 8)
OPERATOR = {"batch": 4, "size": (128, 128), "channels": 64, "kernel": 7}
KNN = [(1, (64, 64), 32), (8, (64, 64), 32), (1, (256, 256), 128)]  # batch, image size, grid size


def operator(device, repeats):
    """(a) The depthwise operator, forward and backward, by backend and density."""
    rows, bandwidth = [], copy_bandwidth(device)
    batch, size, channels, kernel = OPERATOR.values()
    weight = torch.randn(kernel, kernel, channels, device=device, requires_grad=True)
    names = ["torch_dense", *(name for name in BACKENDS if not obstacle(name, device, depthwise=True))]
    for density in DENSITIES:
        coords = _random_coords(batch, size, density, device)
        features = torch.randn(batch, coords.num_points, channels, device=device, requires_grad=True)
        grad = torch.randn_like(features)

        def run(name, coords=coords, features=features, grad=grad):
            sparse_conv(features, weight, coords, name).backward(grad)

        seconds = interleaved({name: functools.partial(run, name) for name in names}, repeats, device)
        moved = 5 * features.nbytes  # features, twice, output and both gradients
        rows += [{"density": density, "backend": name, "ms": 1e3 * value,
                  "of torch_dense": value / seconds["torch_dense"], "MB moved at least": moved / 1e6,
                  "share of copy bandwidth": moved / value / bandwidth} for name, value in seconds.items()]
    return rows


def knn(device, repeats):
    """(b) The three nearest points of every grid node, by method."""
    rows = []
    for batch, size, grid in KNN:
        coords = _random_coords(batch, size, 1 / 4, device)
        coords.table  # noqa: B018  # shared with the operator, and therefore not part of the search
        seconds = interleaved({
            "search by distance": functools.partial(nearest_pixels, coords, grid, 3),
            "cdist and topk": functools.partial(nearest_points, coords, grid, 3, torch.float32)}, repeats, device)
        rows += [{"image": f"{batch} x {size[0]}²", "grid": f"{grid}²", "method": name, "ms": 1e3 * value,
                  "of brute force": value / seconds["cdist and topk"]} for name, value in seconds.items()]
    return rows


def training(stage_1, cfg, device, repeats, against):
    """(c) The training step by subsampling rate: time, memory, operations."""
    rows, peak = [], functools.cache(matmul_peak)
    for rate in RATES:
        case = _with_rate(cfg, rate)
        trainers = {"fast": make_trainer(stage_1, case, device)}
        if against and rate in REFERENCE_RATES:
            trainers["reference"] = make_trainer(stage_1, case, device, reference=True)
        batches = random_batches(case, device)
        steps = {name: functools.partial(trainer.training_step, batches) for name, trainer in trainers.items()}
        seconds = interleaved(steps, repeats, device)
        for name, step in steps.items():
            with FlopCounterMode(display=False) as counter:
                step()
            flops, dtype = counter.get_total_flops(), trainers[name].dtype
            rows.append({"rate": f"1/{rate}", "path": name, "dtype": str(dtype).removeprefix("torch."),
                         "ms": 1e3 * seconds[name], "images/s": cfg.train.batch_size / seconds[name],
                         "peak MB": peak_memory(step, device) / 1e6, "dense GFLOP": flops / 1e9,
                         "share of matmul peak": flops / seconds[name] / peak(device, dtype),
                         "times faster": seconds["reference"] / seconds[name] if "reference" in seconds else None})
    return rows


def parts(stage_1, cfg, device, repeats):
    """(c) The same step in parts. Sparse layers: both networks without the grid U-Net."""
    rows = []
    for rate in RATES:
        seconds = interleaved(parts_of_step(stage_1, _with_rate(cfg, rate), device), repeats, device)
        rows.append({"rate": f"1/{rate}", **{f"{name}, ms": 1e3 * value for name, value in seconds.items()}})
    return rows


def parts_of_step(stage_1, cfg, device):
    """{name: function} for the parts of a training step; functions with a backward pass replace all gradients."""
    trainer = make_trainer(stage_1, cfg, device)
    modules, batch = trainer.modules, next(random_batches(cfg, device))
    size, z_dim = batch.images.shape[-2:], cfg.model.z_dim

    def draw():
        for _ in modules:
            generators = rng.sample_generators(device, batch.index, "benchmark")
            coords = Coordinates.random(len(batch.images), size, cfg.mc_integral.q_sample, cfg.mc_integral.type,
                                        generators, device)
            nearest_pixels(coords, cfg.model.uno_res, cfg.model.knn_neighbours)
        return coords

    def forward():
        with autocast(device, trainer.dtype):
            return trainer.loss(batch, 0)

    def backward():
        modules.zero_grad()
        terms = forward()
        terms["loss"].backward()
        return terms

    def sparse_layers():
        modules.zero_grad()
        decoder, coords = modules["decoder"], draw()
        values, grid_unet = coords.gather(batch.images), decoder.grid_unet
        decoder.grid_unet = _NoGridUNet()
        try:
            with autocast(device, trainer.dtype):
                x, _ = modules["encoder"].points_to_grid(values, coords)
                z = x.float().mean() + values.new_zeros(len(values), z_dim)
                loss = decoder(values, values.new_zeros(len(values)), z, coords).mean()
        finally:
            decoder.grid_unet = grid_unet
        loss.backward()

    terms = {name: term.detach() for name, term in backward().items()}
    gradients = [parameter.grad for parameter in modules.parameters()]

    def update():
        for parameter, gradient in zip(modules.parameters(), gradients, strict=True):
            parameter.grad = gradient
        trainer.optimiser.apply(0, terms)

    return {"draws and nearest points": draw, "forward": forward, "forward and backward": backward,
            "sparse layers": sparse_layers, "AdamW and clipping": update, "EMA": lambda: trainer.ema.update(0)}


class _NoGridUNet(nn.Module):
    def forward(self, grid, modulation):
        return grid


def sampling(cfg, device, repeats, against, steps):
    """(d) Images of the training size from random weights, by sampler."""
    torch.manual_seed(0)
    decoder = build_decoder(cfg).to(device).eval()
    batch, size = cfg.train.sample_size, (cfg.data.img_size,) * 2
    diffusions = {sampler: build_diffusion(cfg, steps, sampler) for sampler in ("ddim", "dpm_solver")}
    z, dtype = torch.randn(batch, cfg.model.z_dim, device=device), resolve_dtype(cfg.train, device)

    def run(network, sampler, dtype):
        generators = rng.sample_generators(device, range(batch), "benchmark")
        with autocast(device, dtype):
            decode(network, diffusions[sampler], z, size, generators, cfg.data.channels)

    arms = {("fast", sampler): functools.partial(run, decoder, sampler, dtype) for sampler in diffusions}
    if against:
        arms["reference", "ddim"] = functools.partial(run, ReferenceDecoder(decoder), "ddim", torch.float32)
    seconds = interleaved(arms, repeats, device)
    slow = seconds.get(("reference", "ddim"))
    return [{"sampler": sampler, "steps": steps, "path": path, "s/image": value / batch,
             "times faster": slow / value if slow else None} for (path, sampler), value in seconds.items()]


def make_trainer(stage_1, cfg, device, reference=False):
    """A Trainer, or a ReferenceTrainer, of a config; it has read and written no file.

    stage_1   the module train_inf_ae_diffusion
    """
    modules, timesteps = stage_1.build_modules(cfg), build_timestep_sampler(cfg)
    loss = functools.partial(stage_1.training_loss, diffusion=build_diffusion(cfg), timesteps=timesteps, cfg=cfg)
    if reference:
        return ReferenceTrainer(cfg, modules, loss, device)
    return Trainer(cfg, "autoencoder", modules, loss, device)


def random_batches(cfg, device):
    """Endless data.loader.Batch of random images."""
    count, side = micro_batch_size(cfg), cfg.data.img_size
    for number in itertools.count():
        images = rng.rand((count, cfg.data.channels, side, side), rng.generator(device, "benchmark", number), device)
        yield Batch(2 * images - 1, torch.arange(number * count, (number + 1) * count))


def _random_coords(batch, size, density, device):
    return Coordinates.random(batch, size, int(size[0] * size[1] * density),
                              generator=rng.generator(device, "benchmark"), device=device)


def _with_rate(cfg, rate):
    case = cfg.copy_and_resolve_references()
    case.mc_integral.q_sample = cfg.data.img_size**2 // rate
    return case
