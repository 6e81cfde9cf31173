"""Which step of the chain each training sample is noised to, and the weight that keeps its loss unbiased."""

import torch

from utils import distributed
from utils.errors import UserError

SCHEDULE_SAMPLERS = ("uniform", "loss-second-moment")


class UniformSampler:
    """Every one of `steps` steps equally likely, with weight 1. It has no state."""

    def __init__(self, steps):
        self.steps = steps

    def probabilities(self, device="cpu"):
        """Probability of every step, float64 [steps]."""
        return torch.full((self.steps,), 1 / self.steps, dtype=torch.float64, device=device)

    def sample(self, uniform):
        """Steps t int64 [B] and weights 1 / (steps · probability of t) float32 [B], of uniform draws [B] in [0, 1)."""
        probabilities = self.probabilities(uniform.device)
        t = torch.searchsorted(probabilities.cumsum(dim=0), uniform.double(), right=True).clamp(max=self.steps - 1)
        return t, (1 / (self.steps * probabilities[t])).float()

    def record(self, t, losses):
        """Notes the unweighted losses [B] at the steps t [B] of one batch; they count from the next `end_step` on."""

    def end_step(self):
        """Takes in what all processes have recorded, in the order of the samples; call it after every update."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        """Raises UserError if the state is that of another sampler."""
        if state:
            raise UserError(
                "diffusion.schedule_sampler='uniform', but the checkpoint was made with another; "
                "use the config the run was started with"
            )


class LossSecondMomentSampler(UniformSampler):
    """Importance sampling by loss (Nichol and Dhariwal 2021, eq. 18): p_t proportional to sqrt(E[L_t²]).

    The expectation is over the last `history` losses of every step. A share of the draws stays uniform, and all of them
    do until every step has a full history. The tables follow the device of their user, and nothing here makes it wait.
    """

    def __init__(self, steps, history=10, uniform_share=0.001):
        super().__init__(steps)
        self.history = history
        self.uniform_share = uniform_share
        # one row more than there are steps: what is not to be kept is written there
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
        """Remembers the unweighted losses [B] at the steps t [B].

        Losses that are not finite are left out: one of them would decide every later draw.
        """
        self._to(t.device)
        losses = losses.detach().double()
        t, order = torch.where(losses.isfinite(), t, self.steps).sort(stable=True)
        losses = losses[order]
        new = torch.zeros_like(self._counts).scatter_add(0, t, torch.ones_like(t))
        # the rank of a loss among those of its step in this batch; the last ones stay where there are too many
        rank = torch.arange(len(t), device=t.device) - (new.cumsum(dim=0) - new)[t]
        row = torch.where(rank < new[t] - self.history, self.steps, t)
        self._losses[row, (self._counts[t] + rank) % self.history] = losses
        self._counts += new

    def state_dict(self):
        return {"losses": self._losses[:-1].clone(), "counts": self._counts[:-1].clone()}

    def load_state_dict(self, state):
        """Raises UserError if the state is that of another sampler or of another number of steps."""
        if "losses" not in state or state["losses"].shape != self._losses[:-1].shape:
            raise UserError(
                f"diffusion.schedule_sampler='loss-second-moment' with diffusion.steps={self.steps}, but the checkpoint"
                " was made with others; use the config the run was started with"
            )
        self._losses[:-1] = state["losses"]
        self._counts[:-1] = state["counts"]


def build_timestep_sampler(config):
    """The sampler that diffusion.schedule_sampler names, over all diffusion.steps. UserError if it is unknown."""
    name, steps = config.diffusion.schedule_sampler, config.diffusion.steps
    if name == "uniform":
        return UniformSampler(steps)
    if name == "loss-second-moment":
        return LossSecondMomentSampler(steps)
    raise UserError(f"diffusion.schedule_sampler={name!r} is unknown; use one of {', '.join(SCHEDULE_SAMPLERS)}")
