"""The neighbour sum as a PyTorch operator with gradients, from two kernels.

    (S h)(p) = sum over taps of weight[tap] h(p + tap), over the points that exist

Neighbours are mutual, so the gradient in h is the neighbour sum of the incoming gradient with the kernel turned by
180°. Being custom operators, they are opaque to autocast, and torch.compile traces around them without a graph break.
"""

import torch

Tensor = torch.Tensor


def define_operator(name, device_types, neighbour_sum, weight_gradient):
    """A differentiable (features, weight, geometry) -> [B, L, C or D] from two kernels.

    neighbour_sum     (features [B, L, C], weight [kh, kw, C] or [kh, kw, C, D], *geometry) -> [B, L, C or D]
    weight_gradient   (features, grad [B, L, C or D], weight, *geometry) -> like the weight: sum over points p of
                      h(p + tap) grad(p), an outer product for full weights
    geometry          list of tensors, what the kernels know of the coordinates
    Results have the dtype of the features and of the weight. Second derivatives are supported.
    """

    def forward(features: Tensor, weight: Tensor, geometry: list[Tensor]) -> Tensor:
        return neighbour_sum(features, weight, *geometry)

    def backward(features: Tensor, grad: Tensor, weight: Tensor, geometry: list[Tensor]) -> Tensor:
        return weight_gradient(features, grad, weight, *geometry)

    options = {"mutates_args": (), "device_types": device_types}
    forward_op = torch.library.custom_op(f"infty_diff::{name}", forward, **options)
    backward_op = torch.library.custom_op(f"infty_diff::{name}_weight_gradient", backward, **options)

    def forward_gradients(ctx, grad):
        features, weight, *geometry = ctx.saved_tensors
        grad_features = forward_op(grad, _turned(weight), geometry) if ctx.needs_input_grad[0] else None
        grad_weight = backward_op(features, grad, weight, geometry) if ctx.needs_input_grad[1] else None
        return grad_features, grad_weight, [None] * len(geometry)

    def backward_gradients(ctx, grad):
        features, incoming, _, *geometry = ctx.saved_tensors
        grad_features = forward_op(incoming, _turned(grad), geometry) if ctx.needs_input_grad[0] else None
        grad_incoming = forward_op(features, grad, geometry) if ctx.needs_input_grad[1] else None
        return grad_features, grad_incoming, None, [None] * len(geometry)

    forward_op.register_autograd(forward_gradients, setup_context=_save_inputs)
    backward_op.register_autograd(backward_gradients, setup_context=_save_inputs)
    forward_op.register_fake(lambda features, weight, _: features.new_empty(*features.shape[:2], weight.shape[-1]))
    backward_op.register_fake(lambda features, grad, weight, _: weight.new_empty(weight.shape))
    return forward_op


def _turned(weight):
    return weight.flip(0, 1) if weight.dim() == 3 else weight.flip(0, 1).transpose(2, 3)


def _save_inputs(ctx, inputs, output):
    *tensors, geometry = inputs
    ctx.save_for_backward(*tensors, *geometry)
