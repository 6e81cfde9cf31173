"""AdamW for weights of any layout in memory."""

import torch
from torch import nn


class AdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW, on views of the weights whose dimensions are in the order of memory.

    Its kernel for a CPU copies what is not contiguous, as convolutions in channels_last are not: more than half of its
    time with kernels of some size. And it pairs numbers by their places in memory, so that a gradient of another layout
    than its weight's would be added to the wrong numbers, without a word.

    parameters   iterable of nn.Parameter; the weights stay where they are and are updated there
    options      of torch.optim.AdamW
    """

    def __init__(self, parameters, **options):
        self._weights = [(parameter, _order_of_memory(parameter)) for parameter in parameters]
        views = [nn.Parameter(parameter.detach().permute(order)) for parameter, order in self._weights]
        super().__init__(views, fused=True, **options)

    def take_gradients(self):
        """Take over the gradients of the weights, which have none then. Returns the views, whose gradients they are
        now, in the order of the parameters."""
        views = [view for group in self.param_groups for view in group["params"]]
        for view, (parameter, order) in zip(views, self._weights, strict=True):
            gradient, parameter.grad = parameter.grad, None
            view.grad = None if gradient is None else gradient.permute(order).contiguous()
        return views


def _order_of_memory(tensor):
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
