"""One update of the weights: from gradients to AdamW, or left out where they are not fit to be used.

Exponential moving average of weights.
"""

import copy
import logging
import math
from typing import NamedTuple

import torch

from utils.adamw import AdamW

SHOWN = 3  # tensors that a message names


class Update:
    """AdamW over `modules`, with loss scaling where dtype is float16, clipping, and what keeps bad steps out.

    A step is left out, weights and moments untouched, where
      - the loss or its gradient is not finite: the run stops, or with train.nonfinite=skip goes on, up to
        train.max_nonfinite_skips times in a row
      - optimizer.gradient_skip is set and the norm of the gradient is above optimizer.gradient_skip_threshold
      - float16 gradients overflow because of the loss scale, which then is lowered: a normal event

    Whether to leave a step out is decided on the device, where AdamW reads it, so a GPU is never waited for. What is
    said about it travels to the host by itself and is looked at one step later on a GPU, at once on a CPU.
    """

    def __init__(self, config, modules, device, dtype):
        optimizer = config.optimizer
        self.config, self.device = config, device
        self.names, parameters = zip(*modules.named_parameters(), strict=True)
        self.optimizer = AdamW(
            parameters, lr=optimizer.learning_rate, betas=(optimizer.adam_beta1, optimizer.adam_beta2),
            weight_decay=optimizer.get("weight_decay", 0.0))
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.skipped = 0  # steps left out by optimizer.gradient_skip
        self.nonfinite = 0  # by train.nonfinite=skip
        self.in_a_row = 0  # of these, directly before now
        self._reports = []  # of the steps that have not been looked at

    def backward(self, loss):
        """Add the gradients of a loss to those there are."""
        self.scaler.scale(loss).backward()

    def apply(self, step, terms):
        """Update the weights from the gradients, which are then cleared. Returns (applied, norm of the gradient), both
        scalar tensors on the device.

        terms    {name: scalar tensor} of step number `step` (the first is 0), with the "loss" among them
        Raises FloatingPointError where a step was bad, naming it, its samples and its tensors.
        """
        optimizer = self.config.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        weights = zip(self.names, self.optimizer.take_gradients(), strict=True)
        names, gradients = zip(*[(n, weight.grad) for n, weight in weights if weight.grad is not None], strict=True)
        self.scaler.unscale_(self.optimizer)
        norms = torch.stack(torch._foreach_norm(gradients))
        norm = torch.linalg.vector_norm(norms)

        finite, loss_finite = norm.isfinite(), terms["loss"].detach().isfinite()
        scaled = self.scaler.scale(torch.ones((), device=self.device)) > 1
        bad = ~loss_finite | ~finite & ~scaled
        large = finite & (norm > (optimizer.gradient_skip_threshold if optimizer.gradient_skip else math.inf))
        applied = finite & loss_finite & ~large

        # Both are what fused AdamW looks at, as with torch's own GradScaler.step. It divides the gradients by
        # grad_scale: that clips them to clip_gradient_norm without a pass over them.
        self.optimizer.found_inf = (~applied).float()
        self.optimizer.grad_scale = (norm / (optimizer.clip_gradient_norm or math.inf)).clamp(min=1)
        self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

        values = torch.stack([bad, large, *(term.detach() for term in terms.values())]).float()
        names = [f"loss term {name}" for name in terms] + [f"gradient of {name}" for name in names]
        self._reports.append(_Report(step, names, *_to_host(torch.cat([values, norms.float()]))))
        self.settle(behind=0 if self.device.type == "cpu" else 1)
        return applied, norm

    def settle(self, behind=0):
        """Look at all steps but the last `behind`: count what was left out, and raise FloatingPointError as due."""
        while len(self._reports) > behind:
            self._examine(self._reports.pop(0))

    def _examine(self, report):
        if report.event is not None:
            report.event.synchronize()
        bad, large, *values = report.values.tolist()
        self.skipped += int(large)
        if not bad:
            self.in_a_row = 0
            return
        train = self.config.train
        wrong = [f"{name} = {value}" for name, value in zip(report.names, values, strict=True)
                 if not math.isfinite(value)]
        wrong = [name for name in wrong if name.startswith("loss")] or wrong  # the gradients of a bad loss are bad too
        first = report.step * train.batch_size
        what = (f"not finite in step {report.step}, samples {first} to {first + train.batch_size - 1}: "
                f"{', '.join(wrong[:SHOWN])}{f' and {len(wrong) - SHOWN} more' if len(wrong) > SHOWN else ''}")
        if train.nonfinite == "stop":
            raise FloatingPointError(f"{what}; the last checkpoint is as it was. Lower optimizer.learning_rate, set "
                                     "train.precision=fp32, or leave such steps out with train.nonfinite=skip")
        if self.in_a_row >= train.max_nonfinite_skips:
            raise FloatingPointError(f"{what}; {self.in_a_row} steps before it were left out in a row, as many as "
                                     "train.max_nonfinite_skips allows. Lower optimizer.learning_rate")
        self.nonfinite += 1
        self.in_a_row += 1
        logging.warning("%s; the step is left out", what)

    def state_dict(self):
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "skipped": self.skipped,
                "nonfinite": self.nonfinite, "in_a_row": self.in_a_row}

    def load_state_dict(self, state):
        """Go on from `state`, with the options of this config, which may have changed."""
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, option in zip(self.optimizer.param_groups, options, strict=True):
            group.update(option)
        if state["scaler"]:  # empty if the run was not in float16 until now
            self.scaler.load_state_dict(state["scaler"])
        self.skipped, self.nonfinite, self.in_a_row = state["skipped"], state["nonfinite"], state["in_a_row"]


class _Report(NamedTuple):
    step: int
    names: list  # of values[2:]
    values: torch.Tensor  # on the host: bad, large, loss terms, norm of each gradient
    event: object  # that the values have arrived; None if they have


def _to_host(values):
    """(values on the host, event to wait for before reading them, None on a CPU) without waiting."""
    if values.device.type == "cpu":
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def learning_rate(config, step):
    """Learning rate of a step (the first is 0): a linear rise over optimizer.warmup_steps, then optimizer.decay."""
    optimizer = config.optimizer
    rise = min(1.0, (step + 1) / max(1, optimizer.warmup_steps))
    fall = 0.5 * (1 + math.cos(math.pi * step / config.train.max_steps)) if optimizer.decay == "cosine" else 1.0
    return optimizer.learning_rate * rise * fall


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
