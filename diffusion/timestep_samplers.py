"""Timestep samplers: the step of each training sample and its unbiased loss weight (docs/method.md, 3.9)."""

import torch

from utils import distributed
from utils.errors import UserError

ALPHA_FALLS = 0.15, 0.7  # fractions of the training between which alpha of JumpTimes falls from 1
LAST_ALPHA, LAST_TIME = 0.03, 0.98


class UniformSampler:
    """Draws all steps with equal probability and weight 1; has no state."""

    settled = 0  # training step from which on the distribution is a fixed one

    def __init__(self, steps):
        self.steps = steps

    def probabilities(self, device="cpu"):
        """Probability of every step, float64 [steps]."""
        return torch.full((self.steps,), 1 / self.steps, dtype=torch.float64, device=device)

    def sample(self, uniform, step):
        """Steps t int64 [B] and weights 1 / (steps · p_t) float32 [B] from uniform draws [B, 2] in [0, 1).

        step    of the training, which JumpTimes depends on; it alone uses the second column of the draws
        """
        probabilities = self.probabilities(uniform.device)
        t = torch.searchsorted(probabilities.cumsum(dim=0), uniform[:, 0].double(), right=True)
        t = t.clamp(max=self.steps - 1)
        return t, (1 / (self.steps * probabilities[t])).float()

    def record(self, t, losses):
        """Store the unweighted losses [B] at the steps t [B] of one micro-batch until `end_step`."""

    def end_step(self):
        """Update from the recorded losses of all ranks, in sample order; call after every optimiser step."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        """Raises UserError for the state of another sampler."""
        if state:
            raise UserError("diffusion.schedule_sampler='uniform', but the checkpoint was saved with another sampler; "
                            "use the config of the run")


class LossSecondMomentSampler(UniformSampler):
    """Importance sampling by loss, p_t proportional to sqrt(E[L_t²]) (Nichol and Dhariwal 2021, eq. 18).

    The expectation is over the last `history` losses of each step. A fraction uniform_share of the draws is uniform;
    all are until every step has a full history. The tables move to the device of the arguments and never make it wait.
    """

    def __init__(self, steps, history=10, uniform_share=0.001):
        super().__init__(steps)
        self.history = history
        self.uniform_share = uniform_share
        # one more row than steps, for the losses that are discarded
        self._losses = torch.zeros(steps + 1, history, dtype=torch.float64)
        self._counts = torch.zeros(steps + 1, dtype=torch.int64)
        self._recorded = []

    def _to(self, device):
        self._losses, self._counts = self._losses.to(device), self._counts.to(device)

    def probabilities(self, device="cpu"):
        """Probability of every step, float64 [steps]."""
        self._to(device)
        uniform = super().probabilities(device)
        rms = self._losses[:-1].square().mean(dim=1).sqrt()
        informed = (self._counts[:-1] >= self.history).all() & (rms.sum() > 0)
        return torch.where(informed, (1 - self.uniform_share) * rms / rms.sum() + self.uniform_share * uniform, uniform)

    def record(self, t, losses):
        self._recorded.append((t, losses.detach()))

    def end_step(self):
        t, losses = (distributed.gather(torch.cat(column)) for column in zip(*self._recorded, strict=True))
        self._recorded = []
        self.update(t, losses)

    def update(self, t, losses):
        """Add the unweighted losses [B] at the steps t [B] to the history.

        Non-finite losses are discarded, because a single one would determine all later draws.
        """
        self._to(t.device)
        losses = losses.detach().double()
        t, order = torch.where(losses.isfinite(), t, self.steps).sort(stable=True)
        losses = losses[order]
        new = torch.zeros_like(self._counts).scatter_add(0, t, torch.ones_like(t))
        # rank of each loss among those of its step in this batch; of more than `history`, the last ones are kept
        rank = torch.arange(len(t), device=t.device) - (new.cumsum(dim=0) - new)[t]
        row = torch.where(rank < new[t] - self.history, self.steps, t)
        self._losses[row, (self._counts[t] + rank) % self.history] = losses
        self._counts += new

    def state_dict(self):
        return {"losses": self._losses[:-1].clone(), "counts": self._counts[:-1].clone()}

    def load_state_dict(self, state):
        """Raises UserError for the state of another sampler or of another number of steps."""
        if "losses" not in state or state["losses"].shape != self._losses[:-1].shape:
            raise UserError(f"diffusion.schedule_sampler='loss-second-moment' with diffusion.steps={self.steps}, but "
                            "the checkpoint was saved with other values; use the config of the run")
        self._losses[:-1] = state["losses"]
        self._counts[:-1] = state["counts"]


class JumpTimes(UniformSampler):
    """Times t <= s <= r of the jump objective, in [0, 1] (docs/method.md, 8.3).

    Half of the samples are flow matching, t = s = r with t uniform. For the others (t, r) are two uniforms in order, or
    r = 1 for half of them, and s = alpha r + (1 - alpha) t. t is at most LAST_TIME: the weight of the loss is infinite
    at 1. alpha is 1 at first, so that velocities are learnt before what depends on them, and then falls geometrically.
    """

    def __init__(self, max_steps):
        self.max_steps = max_steps
        self.settled = round(ALPHA_FALLS[1] * max_steps)

    def alpha(self, step):
        """alpha in training step `step`, a float."""
        first, last = ALPHA_FALLS
        return LAST_ALPHA ** min(max((step / self.max_steps - first) / (last - first), 0.0), 1.0)

    def sample(self, uniform, step):
        """Times (t, s, r) float32 [B, 3] and weights 1, float32 [B], from uniform draws [B, 2] in [0, 1)."""
        first, second = uniform.unbind(1)
        matching = second < 0.5
        t = torch.where(matching, first, 1 - (1 - first).sqrt())  # the smaller of two uniforms has this distribution
        t = LAST_TIME * t
        r = torch.where(second < 0.75, 1, t + (1 - t) * (4 * second - 3))
        r = torch.where(matching, t, r)
        alpha = self.alpha(step)
        return torch.stack([t, alpha * r + (1 - alpha) * t, r], dim=1), torch.ones_like(t)


SCHEDULE_SAMPLERS = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentSampler}


def build_timestep_sampler(config):
    """The sampler named by diffusion.schedule_sampler, over diffusion.steps steps; JumpTimes for few_step."""
    if config.diffusion.objective == "few_step":
        return JumpTimes(config.train.max_steps)
    return SCHEDULE_SAMPLERS[config.diffusion.schedule_sampler](config.diffusion.steps)
