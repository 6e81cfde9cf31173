"""The optimiser step, which leaves out bad steps, the learning rate, and the moving average of the weights."""

import copy
import logging
import math
from typing import NamedTuple

import torch
from torch import nn


class Optimiser:
    """AdamW over an nn.ModuleDict, with loss scaling for float16, gradient clipping and skipping of bad steps.

    The gradient of every network, an entry of the dictionary, is clipped to optimizer.clip_gradient_norm on its own.

    A step leaves weights and moments unchanged if
      - the loss or a gradient is not finite: the run stops, or with train.nonfinite=skip goes on, at most
        train.max_nonfinite_skips times in a row
      - optimizer.gradient_skip is set and the gradient norm exceeds optimizer.gradient_skip_threshold
      - float16 gradients overflow, which lowers the loss scale: a normal event

    The decision stays on the device, where fused AdamW reads it, so the host never waits for a GPU. Diagnostics are
    copied asynchronously and checked one step later on a GPU, at once on a CPU.
    """

    def __init__(self, config, modules, device, dtype):
        optimizer = config.optimizer
        self.config, self.device = config, device
        self.networks = {name: parameters for name, network in modules.items()
                         if (parameters := [p for p in network.parameters() if p.requires_grad])}
        self.adamw = torch.optim.AdamW(
            [p for parameters in self.networks.values() for p in parameters], lr=optimizer.learning_rate,
            betas=(optimizer.adam_beta1, optimizer.adam_beta2), weight_decay=optimizer.get("weight_decay", 0.0),
            fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.skipped = 0  # steps left out by optimizer.gradient_skip
        self.nonfinite = 0  # steps left out by train.nonfinite=skip
        self.in_a_row = 0  # of these, up to now without a good step between them
        self._reports = []  # of steps not yet checked

    def backward(self, loss):
        """Accumulate the gradients of a scalar loss."""
        self.scaler.scale(loss).backward()

    def apply(self, step, terms):
        """Update the weights from the accumulated gradients and clear these.

        step     number of the step, from 0
        terms    {name: scalar tensor}, with the "loss"; named in the error if they are not finite
        Returns (whether the step was applied, gradient norm over all networks), scalar tensors on the device. Raises
        FloatingPointError if a step was bad; it names the step, its samples and what is not finite.
        """
        optimizer = self.config.optimizer
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate(self.config, step)
        self.scaler.unscale_(self.adamw)
        limit = optimizer.clip_gradient_norm or math.inf
        norms = torch.stack([nn.utils.clip_grad_norm_(parameters, limit) for parameters in self.networks.values()])
        norm = torch.linalg.vector_norm(norms)

        finite, loss_finite = norm.isfinite(), terms["loss"].detach().isfinite()
        scaled = self.scaler.scale(torch.ones((), device=self.device)) > 1
        bad = ~loss_finite | ~finite & ~scaled
        large = finite & (norm > (optimizer.gradient_skip_threshold if optimizer.gradient_skip else math.inf))
        applied = finite & loss_finite & ~large
        self.adamw.found_inf = (~applied).float()  # as GradScaler.step does: fused AdamW then changes nothing
        self.adamw.step()
        self.scaler.update()
        self.adamw.zero_grad(set_to_none=True)

        names = [f"loss term {name}" for name in terms] + [f"gradient norm of {name}" for name in self.networks]
        values = torch.stack([bad, large, *(term.detach() for term in terms.values()), *norms]).float()
        self._reports.append(_Report(step, names, *_to_host(values)))
        self.settle(behind=0 if self.device.type == "cpu" else 1)
        return applied, norm

    def settle(self, behind=0):
        """Check all steps but the last `behind`: count those left out, and raise FloatingPointError for a bad one."""
        while len(self._reports) > behind:
            self._check(self._reports.pop(0))

    def _check(self, report):
        if report.event is not None:
            report.event.synchronize()
        bad, large, *values = report.values.tolist()
        self.skipped += int(large)
        if not bad:
            self.in_a_row = 0
            return
        train = self.config.train
        first = report.step * train.batch_size
        wrong = ", ".join(f"{name} = {value}" for name, value in zip(report.names, values, strict=True)
                          if not math.isfinite(value))
        what = f"not finite in step {report.step}, samples {first} to {first + train.batch_size - 1}: {wrong}"
        if train.nonfinite == "stop":
            raise FloatingPointError(f"{what}; the last checkpoint is unchanged. Lower optimizer.learning_rate, set "
                                     "train.precision=fp32, or skip such steps with train.nonfinite=skip")
        if self.in_a_row >= train.max_nonfinite_skips:
            raise FloatingPointError(f"{what}; the {self.in_a_row} steps before it were skipped as well, and "
                                     "train.max_nonfinite_skips allows no more. Lower optimizer.learning_rate")
        self.nonfinite += 1
        self.in_a_row += 1
        logging.warning("%s; the step is skipped", what)

    def state_dict(self):
        return {"adamw": self.adamw.state_dict(), "scaler": self.scaler.state_dict(), "skipped": self.skipped,
                "nonfinite": self.nonfinite, "in_a_row": self.in_a_row}

    def load_state_dict(self, state):
        """Restore moments and counts. Options such as the learning rate stay those of this run's config."""
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.adamw.param_groups]
        self.adamw.load_state_dict(state["adamw"])
        for group, option in zip(self.adamw.param_groups, options, strict=True):
            group.update(option)
        # Copied: fused AdamW needs the memory layout of the weights, and a checkpoint is mapped from its file.
        for parameter, moments in self.adamw.state.items():
            for name, value in moments.items():
                moments[name] = (torch.empty_like(parameter) if value.shape == parameter.shape
                                 else torch.empty_like(value)).copy_(value)
        if state["scaler"]:  # empty unless the run used float16
            self.scaler.load_state_dict(state["scaler"])
        self.skipped, self.nonfinite, self.in_a_row = state["skipped"], state["nonfinite"], state["in_a_row"]


class _Report(NamedTuple):
    step: int
    names: list  # of values[2:]
    values: torch.Tensor  # on the host: bad, large, loss terms, gradient norm of each network
    event: object  # recorded after the copy of the values; None on a CPU


def _to_host(values):
    """(copy of the values on the host, event to wait for before reading it, None on a CPU), without waiting."""
    if values.device.type == "cpu":
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def learning_rate(config, step):
    """Learning rate of a step (from 0): linear warm-up over optimizer.warmup_steps, then optimizer.decay."""
    optimizer = config.optimizer
    rise = min(1.0, (step + 1) / max(1, optimizer.warmup_steps))
    fall = 0.5 * (1 + math.cos(math.pi * step / config.train.max_steps)) if optimizer.decay == "cosine" else 1.0
    return optimizer.learning_rate * rise * fall


class EMA:
    """Exponential moving average of the weights: a copy of `modules` in eval mode, without gradients.

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
        """Call after step number `step`, from 1."""
        if step % self.every == 0:
            torch._foreach_lerp_(self._averaged, self._source, 1 - self.decay)
            for kept, current in self._buffers:
                kept.copy_(current)
