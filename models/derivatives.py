"""Gradients that are written by hand."""

import functools

import torch


def first_order_only(backward):
    """Decorator of the backward of a torch.autograd.Function that has no second derivatives: to ask for them is an
    error. PyTorch's once_differentiable would give zeros where the gradient that comes in is a constant, as that of
    a sum."""

    @functools.wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled():  # in a backward pass: with create_graph=True
            raise RuntimeError("create_graph=True asks for second derivatives, which this gradient, written by hand, "
                               "does not have; leave create_graph out")
        return backward(ctx, *grads)

    return checked
