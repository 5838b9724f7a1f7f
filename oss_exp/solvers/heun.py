"""Heun's second-order method."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from oss_exp.solvers.base import Singlestep, State, VelocityFn, rowwise


@dataclass(frozen=True)
class Heun(Singlestep):
    """Euler, then the mean of the slopes at both ends; plain Euler into t = 0 (Karras et al., 2206.00364, Alg. 1).

    clock `t`: the slope is v, in flow time. `sigma`: the slope is eps, in sigma = t / (1 - t), as in the paper; it is
    another second-order method, not the same numbers, and a step from t = 1, where sigma is infinite, is Euler's too.
    """

    order = 2
    evals_per_step = 2

    clock: Literal["t", "sigma"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clock not in ("t", "sigma"):
            raise ValueError(f"clock must be t or sigma, got {self.clock!r}")

    def advance(self, f: VelocityFn, state: State, t_next: Tensor, order: int | Tensor | None = None) -> State:
        t_next = t_next.expand_as(state.t)
        t, slope = state.t, state.outputs[0]
        step = rowwise(t_next - t, state.x)
        euler = self.euler(state, t_next)
        corrects = t_next > 0 if self.clock == "t" else (t_next > 0) & (t < 1)
        if not bool(corrects.any()):
            return replace(state, x=euler, t=t_next)
        change = f(euler, torch.where(corrects, t_next, t)) - slope  # nobody asks about clean data
        if self.clock == "t":
            corrected = euler + step * 0.5 * change
        else:  # half a step in sigma times the change of eps = x + (1 - t) v, all seen at t'
            start = rowwise(torch.where(t < 1, t, 0.5), euler)
            eps_change = (euler - state.x) + (1 - rowwise(t_next, euler)) * (change + slope) - (1 - start) * slope
            corrected = euler + 0.5 * step / (1 - start) * eps_change
        return replace(state, x=corrected.where(rowwise(corrects, euler).bool(), euler), t=t_next)

    def nfe(self, times: Tensor) -> int:
        return super().nfe(times) - 1 - (self.clock == "sigma" and len(times) > 2 and float(times[0]) == 1)
