"""What experiments/benchmark.py measures: each suite returns rows (dicts) of a table.

The reference is experiments/lib/reference.py: the same parameters on dense NCHW images in float32, with all distances
from the grid to the points computed anew each time, nothing kept, and plain loops for AdamW and EMA.

Measuring: interleaved medians, peak memory, what the machine can do at most.
"""

import copy
import platform
import statistics
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data.coordinates import Coordinates
from diffusion.gaussian_diffusion import build_diffusion
from diffusion.sampling import decode
from experiments.lib.reference import ReferenceDecoder, ReferenceEncoder, nearest_points
from models.build import build_decoder, build_encoder
from models.interpolation import knn_to_grid, nearest_pixels
from models.sparse_conv import BACKENDS, available_backends, sparse_conv
from utils import rng
from utils.device import autocast, resolve_dtype

DENSITIES = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
OPERATOR = {"batch": 4, "size": (128, 128), "channels": 64, "kernel": 7}
KNN = [((64, 64), 32), ((256, 256), 128)]  # size of the image, side of the grid; points at a quarter of the pixels


def operator(device, repeats):
    """(a) The depthwise operator, forward and backward, by backend and density."""
    rows, bandwidth = [], copy_bandwidth(device)
    batch, size, channels, kernel = OPERATOR.values()
    weight = torch.randn(kernel, kernel, channels, device=device, requires_grad=True)
    names = [n for n in available_backends() if device.type in BACKENDS[n].devices and BACKENDS[n].depthwise]
    for density in DENSITIES:
        coords = Coordinates.random(batch, size, int(size[0] * size[1] * density),
                                    generator=rng.generator(device, "benchmark"), device=device)
        features = torch.randn(batch, coords.num_points, channels, device=device, requires_grad=True)
        grad = torch.randn_like(features)

        def run(name, coords=coords, features=features, grad=grad):
            sparse_conv(features, weight, coords, name).backward(grad)

        seconds = interleaved({name: lambda name=name: run(name) for name in names}, repeats, device)
        moved = 5 * features.nbytes  # features in and out, their gradients in and out, features for the weight's
        for name, value in seconds.items():
            rows.append({"density": density, "backend": name, "ms": 1e3 * value,
                         "of torch_dense": value / seconds["torch_dense"], "MB moved at least": moved / 1e6,
                         "share of copy bandwidth": moved / value / bandwidth})
    return rows


def knn(device, repeats):
    """(b) The three nearest points of every node of the grid, by method."""
    rows = []
    for batch in (1, 8):
        for size, grid in KNN:
            if batch > 1 and size[0] > 64:
                continue  # the matrix of all distances would not fit
            coords = Coordinates.random(batch, size, size[0] * size[1] // 4,
                                        generator=rng.generator(device, "benchmark"), device=device)
            coords.table  # noqa: B018  # shared with the operator, so not part of the search
            arms = {"search by distance": lambda c=coords, g=grid: nearest_pixels(c, g, 3),
                    "cdist and topk": lambda c=coords, g=grid: nearest_points(c, g, 3, ties_by_index=False)}
            seconds = interleaved(arms, repeats, device)
            for name, value in seconds.items():
                rows.append({"image": f"{batch} x {size[0]}²", "grid": f"{grid}²", "method": name, "ms": 1e3 * value,
                             "of brute force": value / seconds["cdist and topk"]})
    return rows


class Step:
    """One training step of a config on random images; `reference` takes the slow path."""

    def __init__(self, cfg, device, reference=False):
        torch.manual_seed(0)
        networks = {"encoder": build_encoder(cfg), "decoder": build_decoder(cfg)}
        self.modules = nn.ModuleDict(networks).to(device).train()
        self.cfg, self.device, self.reference = cfg, device, reference
        self.dtype = torch.float32 if reference else resolve_dtype(cfg.train, device)
        self.parameters = list(self.modules.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.encoder, self.decoder = self.modules["encoder"], self.modules["decoder"]
        if reference:
            self.encoder, self.decoder = ReferenceEncoder(self.encoder), ReferenceDecoder(self.decoder)
        options = {"foreach": False} if reference else {"fused": True}
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, **options)
        self.diffusion = build_diffusion(cfg)
        self.step = 0

    def draw(self):
        """What a step begins with: images, noise, time steps and two sets of coordinates."""
        cfg, device = self.cfg, self.device
        batch, side = cfg.train.batch_size, cfg.data.img_size
        shape = (batch, cfg.data.channels, side, side)
        generators = rng.sample_generators(device, range(batch), "benchmark", self.step)
        coords = [Coordinates.random(batch, (side, side), cfg.mc_integral.q_sample, cfg.mc_integral.type, generators,
                                     device) for _ in range(2)]
        t = (rng.rand((batch,), generators, device) * self.diffusion.num_steps).long()
        return rng.rand(shape, generators, device) * 2 - 1, rng.randn(shape, generators, device), t, *coords

    def loss(self, images, noise, t, seen, coords):
        with autocast(self.device, self.dtype):
            z = self.encoder(seen.gather(images), seen)
            terms = self.diffusion.training_losses(
                lambda values, time: self.decoder(values, time, z, coords), images, t, coords, noise)
        return terms["loss"].mean()

    def update(self):
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def average_weights(self):
        if self.reference:
            for kept, parameter in zip(self.average, self.parameters, strict=True):
                kept.mul_(0.995).add_(parameter, alpha=0.005)
        else:
            torch._foreach_lerp_(self.average, self.parameters, 0.005)

    def __call__(self):
        self.step += 1
        loss = self.loss(*self.draw())
        loss.backward()
        self.update()
        if self.step % self.cfg.train.ema_update_every == 0:
            self.average_weights()
        return loss.item()


def training(cfg, device, repeats, against):
    """(c) The training step by subsampling rate: time, memory, operations."""
    rows, peak = [], {}
    for rate in (1, 2, 4, 8):
        case = copy.deepcopy(cfg)
        case.mc_integral.q_sample = cfg.data.img_size**2 // rate
        arms = {"fast": Step(case, device)}
        if against and rate in (4, 8):
            arms["reference"] = Step(case, device, reference=True)
        seconds = interleaved(arms, repeats, device)
        for name, step in arms.items():
            memory = peak_memory(step, device)
            with FlopCounterMode(display=False) as counter:
                step()
            flops = counter.get_total_flops()
            if step.dtype not in peak:
                peak[step.dtype] = matmul_peak(device, step.dtype)
            rows.append({"rate": f"1/{rate}", "path": name, "dtype": str(step.dtype).removeprefix("torch."),
                         "ms": 1e3 * seconds[name], "images/s": cfg.train.batch_size / seconds[name],
                         "peak MB": memory / 1e6, "dense GFLOP": flops / 1e9,
                         "share of matmul peak": flops / seconds[name] / peak[step.dtype],
                         "times faster": seconds["reference"] / seconds[name] if "reference" in seconds else None})
    return rows


def parts(cfg, device, repeats):
    """(c) The same step, part by part; the sparse layers alone are those of both networks without their grid U-Nets."""
    rows = []
    for rate in (1, 2, 4, 8):
        case = copy.deepcopy(cfg)
        case.mc_integral.q_sample = cfg.data.img_size**2 // rate
        step = Step(case, device)
        drawn = step.draw()
        step()

        def sparse(step=step, drawn=drawn):
            step.modules.zero_grad()  # or else gradients would be added to those of the call before
            images, noise, t, seen, coords = drawn
            with autocast(step.device, step.dtype):
                _sparse_layers(step.encoder, step.decoder, images, t, seen, coords).backward()

        def backward(step=step, drawn=drawn):
            step.modules.zero_grad()
            step.loss(*drawn).backward()

        def fresh(step=step):
            images, _, _, *sets = step.draw()
            for coords in sets:
                knn_to_grid(coords.gather(images), coords, cfg.model.uno_res, cfg.model.knn_neighbours)

        backward()
        gradients = [parameter.grad.clone() for parameter in step.parameters]

        def update(step=step, gradients=gradients):
            for parameter, gradient in zip(step.parameters, gradients, strict=True):
                parameter.grad = gradient
            step.update()

        seconds = interleaved({
            "draws and nearest points": fresh, "forward": lambda s=step, d=drawn: s.loss(*d),
            "forward and backward": backward, "sparse layers of it": sparse, "AdamW and clipping": update,
            "EMA": step.average_weights}, repeats, device)
        rows.append({"rate": f"1/{rate}", **{f"{name}, ms": 1e3 * value for name, value in seconds.items()}})
    return rows


def _sparse_layers(encoder, decoder, images, t, seen, coords):
    grid, _ = encoder.points_to_grid(seen.gather(images), seen)
    whole, decoder.grid_unet = decoder.grid_unet, _Through()
    try:
        z = grid.float().mean() + images.new_zeros(len(images), decoder.conditioning.latent.in_features)
        return decoder(coords.gather(images), t.float(), z, coords).square().mean()
    finally:
        decoder.grid_unet = whole


class _Through(nn.Module):
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
            decode(network, diffusions[sampler], z, size, sampler, generators, cfg.data.channels)

    arms = {("fast", sampler): lambda s=sampler: run(decoder, s, dtype) for sampler in diffusions}
    if against:
        arms["reference", "ddim"] = lambda: run(ReferenceDecoder(decoder), "ddim", torch.float32)
    seconds = interleaved(arms, repeats, device)
    slow = seconds.get(("reference", "ddim"))
    return [{"sampler": sampler, "steps": steps, "path": path, "s/image": value / batch,
             "times faster": slow / value if slow else None} for (path, sampler), value in seconds.items()]


SHORTEST = 2e-3  # seconds of a turn
SHORT = 10 * SHORTEST  # a function that takes less is called again in its turn


def synchronise(device):
    """Wait until `device` has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(arms, repeats, device):
    """Median seconds of each of {name: function}. After a warm-up they take turns, so that a change in the load of a
    shared machine hits all of them alike. A function that takes less than SHORT is called again until SHORTEST has
    passed, and the mean of those calls counts: the time with what it needs in the caches, and not of the first call,
    which finds there what the others left."""
    times = {name: [] for name in arms}
    for turn in range(repeats + 1):
        for name, function in arms.items():
            seconds = _mean_seconds(function, device)
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def _mean_seconds(function, device):
    synchronise(device)
    first = _seconds(function, device)
    if first >= SHORT:
        return first
    calls, passed = 0, 0.0
    while passed < SHORTEST:
        calls, passed = calls + 1, passed + _seconds(function, device)
    return passed / calls


def _seconds(function, device):
    started = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - started


def peak_memory(function, device):
    """Largest number of bytes in tensors while function() runs, beyond those there were before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    used = largest = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        used += event.nbytes()
        largest = max(largest, used)
    return largest


def copy_bandwidth(device):
    """Bytes read and written per second by copies of a tensor of 256 MB."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, 5, device)["copy"]
    return 2 * source.nbytes / seconds


def matmul_peak(device, dtype):
    """Floating-point operations per second of a product of two 2048² matrices."""
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    seconds = interleaved({"product": lambda: a @ a}, 5, device)["product"]
    return 2 * 2048**3 / seconds


def machine(device):
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:  # not Linux
        pass
    return f"{name}, {torch.get_num_threads()} threads"
