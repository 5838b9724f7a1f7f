"""The midpoint method in sigma, at a geometric mean: "DPM2" of the k-diffusion family."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oss_exp.solvers.base import Singlestep, State, VelocityFn, rowwise


@dataclass(frozen=True)
class DPM2(Singlestep):
    """Second order: eps is taken at sigma'^r sigma^(1-r) and extrapolated along the step (2206.00364, App. D.2, alpha).

    r = 1/2 is the midpoint of k-diffusion's DPM2. The steps from t = 1 and into t = 0, which have no geometric mean in
    sigma, are Euler's, with one call.
    """

    order = 2
    evals_per_step = 2

    r: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.r, int | float) or not 0 < self.r <= 1:
            raise ValueError(f"r must be in (0, 1], got {self.r!r}")

    def advance(self, f: VelocityFn, state: State, t_next: Tensor, order: int | Tensor | None = None) -> State:
        t_next = t_next.expand_as(state.t)
        x, v = state.x, state.outputs[0]
        euler = self.euler(state, t_next)
        inner = (state.t < 1) & (t_next > 0)
        if not bool(inner.any()):
            return replace(state, x=euler, t=t_next)
        start, end = torch.where(inner, state.t, 0.6), torch.where(inner, t_next, 0.4)
        sigma = (end / (1 - end)) ** self.r * (start / (1 - start)) ** (1 - self.r)
        middle = sigma / (1 + sigma)
        x_middle = self.euler(replace(state, t=start), middle)
        eps_change = x_middle + rowwise(1 - middle, x) * f(x_middle, middle) - x - rowwise(1 - start, x) * v
        corrected = euler + rowwise((end - start) / (1 - start) / (2 * self.r), x) * eps_change
        return replace(state, x=corrected.where(rowwise(inner, x).bool(), euler), t=t_next)

    def nfe(self, times: Tensor) -> int:
        return super().nfe(times) - 1 - (len(times) > 2 and float(times[0]) == 1)
