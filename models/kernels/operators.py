"""Kernels as PyTorch operators: opaque to autocast, and traced by torch.compile without a graph break."""

import torch

Tensor = torch.Tensor


def define_neighbour_sum(name, device_types, neighbour_sum, weight_gradient):
    """The neighbour sum as a differentiable operator (features, weight, geometry) -> [B, L, C or D].

        (S h)(p) = sum over taps of weight[tap] h(p + tap), over the points that exist

    Neighbours are mutual, so the gradient in h is the neighbour sum of the incoming gradient with the kernel turned by
    180°. Second derivatives are supported.

    neighbour_sum     (features [B, L, C], weight [kh, kw, C] or [kh, kw, C, D], *geometry) -> [B, L, C or D]
    weight_gradient   (features, grad [B, L, C or D], weight, *geometry) -> like the weight: sum over points p of
                      h(p + tap) grad(p), an outer product for full weights
    geometry          list of tensors, what the kernels know of the coordinates
    Results have the dtype of the features and of the weight.
    """

    def forward(features: Tensor, weight: Tensor, geometry: list[Tensor]) -> Tensor:
        return neighbour_sum(features, weight, *geometry)

    def backward(features: Tensor, grad: Tensor, weight: Tensor, geometry: list[Tensor]) -> Tensor:
        return weight_gradient(features, grad, weight, *geometry)

    forward_op = _define(name, device_types, forward)
    backward_op = _define(f"{name}_weight_gradient", device_types, backward)

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


def define_nearest_pixels(name, device_types, search):
    """The operator (table, height, width, grid_size, k, slots) -> (place, squared_distance) of a kernel.

    search  (table, height, width, grid_size, k, place, squared_distance), which writes the pixels that it finds into
            the last two; see models.interpolation.nearest_pixels
    """

    def results(table, grid_size, slots):
        place = torch.zeros(len(table), grid_size**2, slots, dtype=torch.int64, device=table.device)
        return place, torch.full(place.shape, torch.inf, device=table.device)

    def forward(
        table: Tensor, height: int, width: int, grid_size: int, k: int, slots: int
    ) -> tuple[Tensor, Tensor]:
        found = results(table, grid_size, slots)
        search(table.contiguous(), height, width, grid_size, k, *found)
        return found

    operator = _define(name, device_types, forward)
    operator.register_fake(lambda table, height, width, grid_size, k, slots: results(table, grid_size, slots))
    return operator


def _define(name, device_types, function):
    return torch.library.custom_op(f"infty_diff::{name}", function, mutates_args=(), device_types=device_types)


def _turned(weight):
    return weight.flip(0, 1) if weight.dim() == 3 else weight.flip(0, 1).transpose(2, 3)


def _save_inputs(ctx, inputs, output):
    *tensors, geometry = inputs
    ctx.save_for_backward(*tensors, *geometry)
