"""Heun's second-order method."""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from oss_exp.checks import require_choice
from oss_exp.solvers.base import Singlestep, State
from oss_exp.tensors import rowwise
from oss_exp.velocity import VelocityFn

Clock = Literal["t", "sigma"]


@dataclass(frozen=True)
class Heun(Singlestep):
    """An Euler step, corrected with the mean of the slopes at both ends; Euler alone into t = 0.

    See Karras et al. 2022, arXiv 2206.00364, Algorithm 1.

    Args:
        clock: "t" takes the slope v in flow time. "sigma" takes the slope eps in
            sigma = t / (1 - t), as in the paper. They are two second-order methods with
            different results. In sigma a step from t = 1, where sigma is infinite, is
            Euler's.
    """

    order = 2

    clock: Clock = "t"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(get_args(Clock), clock=self.clock)

    @property
    def singular_at(self) -> tuple[float, ...]:
        return (0.0,) if self.clock == "t" else (1.0, 0.0)

    def inner_step(self, f: VelocityFn, state: State, t_next: Tensor) -> Tensor:
        slope = state.outputs[0]
        step = rowwise(t_next - state.t, state.x)
        euler = self.euler(state, t_next)
        change = f(euler, t_next) - slope
        if self.clock == "t":
            return euler + step * 0.5 * change

        # Half a step in sigma times the change of eps = x + (1 - t) v, in the scale of t'.
        start = rowwise(state.t, euler)
        end = rowwise(t_next, euler)
        eps_change = (euler - state.x) + (1 - end) * (change + slope) - (1 - start) * slope
        return euler + 0.5 * step / (1 - start) * eps_change
