"""The networks of the autoencoder (docs/method.md, 4) as a first implementation would write them, and their training.

Images are contiguous NCHW, convolutions dense, nearest points found from all distances, and nothing is cached. The
networks share the parameters of those that they are made from. Tests and `experiments/benchmark.py --against reference`
compare with this module.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.blocks import resize_kernel


class ReferenceDecoder(nn.Module):
    """The forward pass of a SparseUNet: values [B, L, C], t [B], z [B, Z], coords -> [B, L, out]."""

    def __init__(self, fast):
        super().__init__()
        self.fast = fast

    def forward(self, values, t, z, coords, max_points=None, condition=None):
        fast = self.fast
        modulation = film_vectors(fast.conditioning, fast.time(t), z)
        grid, skips = points_to_grid(fast.points_to_grid, values, coords, modulation)
        grid = grid_unet(fast.grid_unet, grid, modulation)
        x = fast.linear_back(grid_to_points(grid, coords))
        for merge, block in zip(fast.merges, fast.blocks, strict=True):
            x = F.linear(torch.cat([x, skips.pop()], dim=-1), merge.weight, merge.bias)
            x = sparse_block(block, x, coords, modulation)
        return fast.linear_out(x)


class ReferenceEncoder(nn.Module):
    """The forward pass of a SparseEncoder without stochastic encoding: values [B, L, C], coords -> z [B, Z]."""

    def __init__(self, fast):
        super().__init__()
        self.fast = fast

    def forward(self, values, coords, generator=None, max_points=None):
        grid, _ = points_to_grid(self.fast.points_to_grid, values, coords)
        x, _ = grid_down(self.fast.grid_down, grid)
        return self.fast.linear_out(pointwise(self.fast.linear_grid, x).mean(dim=(2, 3)))


class ReferenceTrainer:
    """utils.trainer.Trainer.training_step for one process: the reference networks in float32, and loops for AdamW and
    EMA. The loss and the config are those of the Trainer."""

    dtype = torch.float32

    def __init__(self, config, modules, loss, device):
        self.config, self.loss, self.step = config, loss, 0
        self.modules = modules.to(device).train()
        self.networks = {"encoder": ReferenceEncoder(modules["encoder"]), "decoder": ReferenceDecoder(
            modules["decoder"])}
        optimizer = config.optimizer
        self.adamw = torch.optim.AdamW(
            self.modules.parameters(), lr=optimizer.learning_rate, betas=(optimizer.adam_beta1, optimizer.adam_beta2),
            weight_decay=optimizer.get("weight_decay", 0.0), foreach=False)
        self.average = [parameter.detach().clone() for parameter in self.modules.parameters()]

    def training_step(self, batches):
        """One update; returns the loss."""
        train = self.config.train
        loss = self.loss(self.networks, next(batches), self.step)["loss"]
        loss.backward()
        for network in self.modules.values():
            nn.utils.clip_grad_norm_(network.parameters(), self.config.optimizer.clip_gradient_norm, foreach=False)
        self.adamw.step()
        self.adamw.zero_grad()
        self.step += 1
        if self.step % train.ema_update_every == 0:
            for kept, parameter in zip(self.average, self.modules.parameters(), strict=True):
                kept.mul_(train.ema_decay).add_(parameter.detach(), alpha=1 - train.ema_decay)
        return loss.item()


def points_to_grid(module, values, coords, modulation=None):
    """(grid [B, base, G, G], outputs [B, L, nf] of the sparse blocks) for values [B, L, C]."""
    x, skips = module.linear_in(values), []
    for block in module.blocks:
        x = sparse_block(block, x, coords, modulation)
        skips.append(x)
    return knn_to_grid(module.linear_out(x), coords, module.resolution, module.neighbours), skips


def sparse_block(block, x, coords, modulation=None):
    """A SparseBlock on x [B, L, nf]."""
    kernel = resize_kernel(block.kernel, coords.size, block.train_size)
    x = x + sparse_conv(film(block.film_conv, block.norm_conv(x), modulation), kernel, coords, block.consistent)
    hidden, _, out = block.mlp
    return x + out(F.gelu(hidden(film(block.film_mlp, block.norm_mlp(x), modulation))))


def sparse_conv(features, weight, coords, consistent=False):
    """The operator K of features [B, L, C]: scatter, convolve, gather. A convolution of the mask counts neighbours.

    The consistent estimate takes the centre tap out of the sum and adds it once.
    """
    kh, kw, channels = weight.shape[:3]
    image = scatter(features, coords)
    present = scatter(torch.ones_like(features[:, :, :1]), coords)
    padding = (kh // 2, kw // 2)
    count = F.conv2d(present, present.new_ones(1, 1, kh, kw), padding=padding)
    if weight.dim() == 3:
        total = F.conv2d(image, weight.permute(2, 0, 1)[:, None].contiguous(), padding=padding, groups=channels)
    else:
        total = F.conv2d(image, weight.permute(3, 2, 0, 1).contiguous(), padding=padding)
    if not consistent:
        return gather(total / count.clamp(min=1), coords) * (kh * kw)
    tap = weight[kh // 2, kw // 2]
    centre = features * tap if weight.dim() == 3 else features @ tap
    return centre + (gather(total, coords) - centre) * (kh * kw - 1) / gather(count - 1, coords).clamp(min=1)


def scatter(values, coords):
    """values [B, L, C] -> contiguous [B, C, H, W], zero at absent pixels."""
    batch, _, channels = values.shape
    canvas = values.new_zeros(batch, channels, coords.size[0] * coords.size[1])
    index = coords.index[:, None].expand(-1, channels, -1)
    return canvas.scatter(2, index, values.transpose(1, 2)).unflatten(2, coords.size)


def gather(image, coords):
    """image [B, C, H, W] -> [B, L, C]."""
    index = coords.index[:, None].expand(-1, image.shape[1], -1)
    return image.flatten(2).gather(2, index).transpose(1, 2)


def knn_to_grid(features, coords, grid_size, k):
    """features [B, L, C] -> [B, C, G, G]: the weighted mean of the k nearest points of every grid node."""
    place, distance = nearest_points(coords, grid_size, k)
    weight = 1 / distance.square().clamp(min=1e-20)
    weight = weight / weight.sum(dim=2, keepdim=True)
    rows = features.gather(1, place.flatten(1)[:, :, None].expand(-1, -1, features.shape[2]))
    rows = rows.unflatten(1, place.shape[1:])
    grid = (rows * weight[:, :, :, None].to(rows.dtype)).sum(dim=2)
    return grid.transpose(1, 2).unflatten(2, (grid_size, grid_size)).contiguous()


def nearest_points(coords, grid_size, k, dtype=torch.float64):
    """(place int64 [B, G * G, n], distance float32, likewise) by torch.cdist and topk, n = k + 8 or all points.

    The distance is infinite for points farther than the k-th, with a margin for the rounding of equal distances.
    """
    axis = (torch.arange(grid_size, device=coords.device, dtype=dtype) + 0.5) / grid_size
    nodes = torch.stack([axis.repeat(grid_size), axis.repeat_interleave(grid_size)], dim=1)  # (x, y)
    height, width = coords.size
    points = torch.stack([(coords.index % width + 0.5) / width, (coords.index // width + 0.5) / height], dim=2)
    distance = torch.cdist(nodes.expand(len(points), -1, -1), points.to(dtype))
    distance, place = distance.topk(min(k + 8, coords.num_points), dim=2, largest=False)
    margin = 1 + 1e3 * torch.finfo(dtype).eps
    return place, distance.where(distance <= margin * distance[..., k - 1 : k], torch.inf).float()


def grid_to_points(grid, coords):
    """grid [B, C, G, G] -> [B, L, C] by F.grid_sample at the pixel centres, (x, y) in [-1, 1]."""
    height, width = coords.size
    x, y = (coords.index % width + 0.5) / width, (coords.index // width + 0.5) / height
    where = torch.stack([x, y], dim=2) * 2 - 1
    sampled = F.grid_sample(grid, where[:, :, None].to(grid.dtype), padding_mode="border", align_corners=False)
    return sampled[:, :, :, 0].transpose(1, 2)


def grid_unet(unet, grid, modulation=None):
    """A GridUNet on grid [B, base, G, G]."""
    x, skips = grid_down(unet.down, grid, modulation)
    for stages, up in zip(unet.stages, unet.ups, strict=True):
        for stage in stages:
            x = grid_stage(stage, torch.cat([x, skips.pop()], dim=1), modulation)
        if isinstance(up, nn.ConvTranspose2d):
            x = F.conv_transpose2d(x, up.weight.contiguous(), up.bias, up.stride, up.padding)
        else:
            x = convolution(up, x)
    hidden, _, out = unet.head
    return pointwise(out, F.gelu(pointwise(hidden, x)))


def grid_down(down, grid, modulation=None):
    """(output, outputs of all stages for the skip connections) of a GridDown on grid [B, base, G, G]."""
    x, skips = pointwise(down.stem, grid), []
    for stages, halve in zip(down.stages, down.downs, strict=True):
        for stage in stages:
            x = grid_stage(stage, x, modulation)
            skips.append(x)
        x = convolution(halve, x)
    for stage in down.middle:
        x = grid_stage(stage, x, modulation)
    return x, skips


def grid_stage(stage, x, modulation):
    """A residual block and, if the stage has one, attention, on x [B, C, G, G]."""
    block = stage.block
    h = convolution(block.conv_in, F.gelu(channel_norm(block.norm_in, x)))
    h = film(block.film, channel_norm(block.norm_out, h), modulation, channels=1)
    h = convolution(block.conv_out, block.dropout(F.gelu(h)))
    x = (x if isinstance(block.shortcut, nn.Identity) else pointwise(block.shortcut, x)) + h
    return x if isinstance(stage.attention, nn.Identity) else attention(stage.attention, x)


def attention(module, x):
    """x + Linear(softmax(q k^T / sqrt(32)) v) for x [B, C, G, G], with an explicit attention matrix."""
    batch, _, height, width = x.shape
    heads = module.heads
    q, k, v = pointwise(module.qkv, channel_norm(module.norm, x)).flatten(2).view(batch, 3, heads, 32, -1).unbind(1)
    share = torch.softmax(torch.einsum("bhci,bhcj->bhij", q, k) / 32**0.5, dim=-1)
    mixed = torch.einsum("bhij,bhcj->bhci", share, v).reshape(batch, heads * 32, height, width)
    return x + pointwise(module.out, mixed)


def film(module, h, modulation=None, channels=2):
    """(h (1 + scale_t) + shift_t)(1 + scale_z); `channels` is the axis of the channels of h."""
    if modulation is None:
        return h
    shape = [len(h), *[1] * (h.dim() - 1)]
    shape[channels] = -1
    scale_t, shift_t, scale_z = (vector.reshape(shape) for vector in modulation[module.index])
    return (h * (1 + scale_t) + shift_t) * (1 + scale_z)


def film_vectors(conditioning, t, z):
    """(scale_t, shift_t, scale_z), each [B, width], of every FiLM layer in order of its index, by its own Linears:
    slices of the stacked ones."""
    def linear(module, x, first, width):
        return F.linear(x, module.weight[first : first + width], module.bias[first : first + width])

    vectors, row, total = [], 0, sum(conditioning.widths)
    for group, (width, count) in enumerate(conditioning.groups):
        for layer in range(count):
            scale_t = linear(conditioning.time, F.gelu(t), row, width)
            shift_t = linear(conditioning.time, F.gelu(t), total + row, width)
            hidden = F.gelu(linear(conditioning.latent, z, row, width))
            last, bias = conditioning.latent_weights[group][layer], conditioning.latent_biases[group][layer, 0]
            vectors.append((scale_t, shift_t, hidden @ last + bias))
            row += width
    return vectors


def channel_norm(norm, x):
    """LayerNorm over the channels of [B, C, H, W]."""
    variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
    return (x - mean) * (variance + norm.eps).rsqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def convolution(module, x):
    """A Conv2d on x [B, C, G, G]."""
    return F.conv2d(x, module.weight.contiguous(), module.bias, module.stride, module.padding)


def pointwise(linear, x):
    """A Linear over the channels of x [B, C, G, G], as a 1x1 convolution."""
    return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)
