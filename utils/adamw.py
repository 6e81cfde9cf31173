"""AdamW for weights in any order of memory."""

import torch
from torch import nn


class AdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW, on views of the weights whose dimensions are in the order of memory.

    Its kernel for a CPU copies a gradient that is not contiguous, as those of convolutions in channels_last are: more
    than half of its time with kernels of some size. And it pairs numbers by their places in memory, so that a gradient
    or a moment of another layout than its weight's would go with the wrong numbers, without a word.

    parameters   iterable of nn.Parameter, one group; they must stay where they are in memory. ValueError where one has
                 gaps there
    options      of torch.optim.AdamW

    Call take_gradients() before step(), which is a RuntimeError otherwise.
    """

    def __init__(self, parameters, **options):
        self._weights = [(parameter, _order_of_memory(parameter)) for parameter in parameters]
        views = [nn.Parameter(parameter.detach().permute(order)) for parameter, order in self._weights]
        for view in views:
            if not view.is_contiguous():
                raise ValueError(f"a weight {tuple(view.shape)} with strides {view.stride()} has gaps in memory")
        super().__init__(views, fused=True, **options)
        self.register_step_pre_hook(self._check_that_gradients_were_taken)

    def take_gradients(self):
        """Take over the gradients of the weights, which have none then. Returns the views, whose gradients they are
        now, in the order of the parameters. RuntimeError where weights have been moved since the start."""
        views = self.param_groups[0]["params"]
        for view, (parameter, order) in zip(views, self._weights, strict=True):
            if view.data_ptr() != parameter.data_ptr():
                raise RuntimeError("a weight lies elsewhere than when the optimiser was made")
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:  # of a vector there is one order, and vectors are two in three
                gradient = (gradient.permute(order) if len(order) > 1 else gradient).contiguous()
            view.grad = gradient
        return views

    def load_state_dict(self, state_dict):
        """Go on from a state. ValueError where its moments are laid out otherwise than the weights."""
        super().load_state_dict(state_dict)
        for view, (parameter, order) in zip(self.param_groups[0]["params"], self._weights, strict=True):
            moments = self.state[view]
            for name in moments.keys() - {"step"}:
                if moments[name].stride() == parameter.stride() and moments[name].shape == parameter.shape:
                    moments[name] = moments[name].permute(order)  # a state of torch.optim.AdamW
                if moments[name].shape != view.shape or not moments[name].is_contiguous():
                    raise ValueError(f"{name} {tuple(moments[name].shape)} is laid out otherwise than its weight "
                                     f"{tuple(parameter.shape)}")

    def _check_that_gradients_were_taken(self, *_):
        if any(parameter.grad is not None for parameter, _ in self._weights):
            raise RuntimeError("there are gradients that were not taken over; call take_gradients() before step()")


def _order_of_memory(tensor):
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
