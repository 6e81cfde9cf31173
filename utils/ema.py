"""Exponential moving average of weights."""

import copy

import torch


class EMA:
    """A second copy of `modules`, started from their weights and always in eval mode.

    After every `every` steps: ema <- decay · ema + (1 − decay) · weights. Buffers are copied.
    """

    def __init__(self, modules, decay, every):
        self.modules = copy.deepcopy(modules).eval().requires_grad_(False)
        self.decay = decay
        self.every = every
        self._averaged = list(self.modules.parameters())
        self._source = list(modules.parameters())
        self._buffers = list(zip(self.modules.buffers(), modules.buffers(), strict=True))

    @torch.no_grad()
    def update(self, step):
        """Call after optimiser step number `step` (the first is 1)."""
        if step % self.every == 0:
            torch._foreach_lerp_(self._averaged, self._source, 1 - self.decay)
            for kept, current in self._buffers:
                kept.copy_(current)
