"""Triton kernels of the sparse operator, which read it off as it is written.

    (K h)(p)  = kh kw / |N(p)| · sum over taps of weight[tap] h(p + tap), where there is a point at p + tap
    (K* g)(p) = kh kw · sum over taps of weight[-tap]ᵀ g(p + tap) / |N(p + tap)|        the adjoint: gradient in h
    dκ[tap]   = kh kw · sum over points p of h(p + tap) g(p)ᵀ / |N(p)|                  gradient in the weight

A program owns a block of points and of channels and looks at the window of its points one tap at a time: the table says
which points lie there, and their features are loaded, mostly from cache, for the windows of neighbours overlap. The
adjoint gathers as well, because neighbours are mutual: p + tap sees p at -tap. So every result is written once, by one
program, and nothing is added atomically: the same input gives the same bits.

The points of all images are numbered through. Arguments that the kernels share:

    features, grad   [N, channels], contiguous
    weight           [kh · kw, C], or [kh · kw, C, D] with strides
    position         int32 or int64 [N], where each point is in the table
    table            int32 [B, H + kh - 1, W + kw - 1], the point of each pixel or -1: of absent ones and of those
                     around an image, so that a neighbour is one addition away and no edge has to be looked out for
    share            float32 [N], 1 / |N(p)|
    points N, stride W + kw - 1 of the table, channels C (of a full kernel: inputs and outputs)

Sums are taken in float32. Multiplying by shares first and by kh kw last keeps half precision within its range.
Blocks need not divide anything: what lies beyond an edge is masked. Imported only where Triton is installed.
"""

import triton
import triton.language as tl


@triton.jit
def neighbours(tap, table, position, exists, stride, KH: tl.constexpr, KW: tl.constexpr):
    """(the points, int64, that a block of points sees at a tap, which of them are present)."""
    near = tl.load(table + position + (tap // KW - KH // 2) * stride + tap % KW - KW // 2, mask=exists, other=-1)
    return near.to(tl.int64), near >= 0


@triton.jit
def rows(matrix, point, present, channel, channels):
    """Block [P, Q] of matrix [N, channels]: rows point, columns channel; zero where a point is not present."""
    mask = present[:, None] & (channel < channels)[None, :]
    return tl.load(matrix + point[:, None] * channels + channel[None, :], mask=mask, other=0.0)


@triton.jit
def shares(share, point, present):
    """1 / |N| of a block of points, a column [P, 1]."""
    return tl.load(share + point, mask=present, other=1.0)[:, None]


@triton.jit
def depthwise(
    features, weight, position, table, share, out, points, stride, channels,
    KH: tl.constexpr, KW: tl.constexpr, ADJOINT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[p] = (K h)(p), or (K* h)(p). Programs: blocks of points, blocks of channels."""
    point = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = point < points
    at = tl.load(position + point, mask=exists, other=0)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tap in range(KH * KW):
        near, present = neighbours(tap, table, at, exists, stride, KH, KW)
        h = rows(features, near, present, channel, channels).to(tl.float32)
        if ADJOINT:
            h *= shares(share, near, present)
            tap = KH * KW - 1 - tap
        w = tl.load(weight + tap * channels + channel, mask=channel < channels, other=0.0)
        total += w.to(tl.float32)[None, :] * h
    if not ADJOINT:
        total *= shares(share, point, exists)
    place = point.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(out + place, KH * KW * total, mask=exists[:, None] & (channel < channels)[None, :])


@triton.jit
def full(
    features, weight, position, table, share, out, points, stride, inputs, outputs,
    tap_stride, input_stride, output_stride, KH: tl.constexpr, KW: tl.constexpr, ADJOINT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """The same with a matrix per tap, by which the gathered block of features is multiplied on tensor cores.

    The strides are those of [tap, input, output], so that the adjoint passes transposed matrices. Features and weight
    have one dtype. Programs: blocks of points, blocks of outputs.
    """
    point = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    output = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    exists = point < points
    at = tl.load(position + point, mask=exists, other=0)
    total = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    slices = tl.cdiv(inputs, BLOCK_I)
    for step in range(KH * KW * slices):  # one loop, so that the next tap is fetched while this one is multiplied
        tap = step // slices
        channel = step % slices * BLOCK_I + tl.arange(0, BLOCK_I)
        near, present = neighbours(tap, table, at, exists, stride, KH, KW)
        h = rows(features, near, present, channel, inputs)
        if ADJOINT:
            h = (h.to(tl.float32) * shares(share, near, present)).to(h.dtype)
            tap = KH * KW - 1 - tap
        place = tap * tap_stride + channel[:, None] * input_stride + output[None, :] * output_stride
        w = tl.load(weight + place, mask=(channel < inputs)[:, None] & (output < outputs)[None, :], other=0.0)
        total = tl.dot(h, w, total, input_precision=PRECISION)
    if not ADJOINT:
        total *= shares(share, point, exists)
    place = point.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(out + place, KH * KW * total, mask=exists[:, None] & (output < outputs)[None, :])


@triton.jit
def depthwise_weight_gradient(
    features, grad, position, table, share, out, points, stride, channels, span,
    KH: tl.constexpr, KW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[part, tap] = what points part · span ... (part + 1) · span - 1 add to dκ[tap]; float32 [parts, kh · kw, C].

    The parts are added up afterwards, in order. Programs: parts and taps, blocks of channels. The taps of a part run
    side by side and so find its points in the cache.
    """
    part, tap = tl.program_id(0) // (KH * KW), tl.program_id(0) % (KH * KW)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, span, BLOCK_P):
        point = part * span + first + tl.arange(0, BLOCK_P)
        exists = point < points
        at = tl.load(position + point, mask=exists, other=0)
        near, present = neighbours(tap, table, at, exists, stride, KH, KW)
        h = rows(features, near, present, channel, channels).to(tl.float32)
        g = rows(grad, point.to(tl.int64), present, channel, channels).to(tl.float32)
        total += h * (g * shares(share, point, present))
    total = KH * KW * tl.sum(total, axis=0)
    tl.store(out + tl.program_id(0).to(tl.int64) * channels + channel, total, mask=channel < channels)


@triton.jit
def full_weight_gradient(
    features, grad, position, table, share, out, points, stride, inputs, outputs, span,
    KH: tl.constexpr, KW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """The same with a matrix per tap; out float32 [parts, kh · kw, C, D]. Programs: parts and taps, inputs, outputs."""
    part, tap = tl.program_id(0) // (KH * KW), tl.program_id(0) % (KH * KW)
    channel = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    output = tl.program_id(2) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_I, BLOCK_O), tl.float32)
    for first in range(0, span, BLOCK_P):
        point = part * span + first + tl.arange(0, BLOCK_P)
        exists = point < points
        at = tl.load(position + point, mask=exists, other=0)
        near, present = neighbours(tap, table, at, exists, stride, KH, KW)
        h = rows(features, near, present, channel, inputs)
        g = rows(grad, point.to(tl.int64), present, output, outputs)
        g = (g.to(tl.float32) * shares(share, point, present)).to(h.dtype)
        total = tl.dot(tl.trans(h), g, total, input_precision=PRECISION)
    place = (tl.program_id(0).to(tl.int64) * inputs + channel)[:, None] * outputs + output[None, :]
    tl.store(out + place, KH * KW * total, mask=(channel < inputs)[:, None] & (output < outputs)[None, :])
