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
    """Euler, then the mean of the slopes at both ends; plain Euler into t = 0 (Karras et al., 2206.00364, Alg. 1).

    clock `t`: the slope is v, in flow time. `sigma`: the slope is eps, in sigma = t / (1 - t), as in the paper; it is
    another second-order method, not the same numbers, and a step from t = 1, where sigma is infinite, is Euler's too.
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
        slope, step = state.outputs[0], rowwise(t_next - state.t, state.x)
        euler = self.euler(state, t_next)
        change = f(euler, t_next) - slope
        if self.clock == "t":
            return euler + step * 0.5 * change
        # Half a step in sigma times the change of eps = x + (1 - t) v, all seen at t'.
        start = rowwise(state.t, euler)
        eps_change = (
            (euler - state.x)
            + (1 - rowwise(t_next, euler)) * (change + slope)
            - (1 - start) * slope
        )
        return euler + 0.5 * step / (1 - start) * eps_change
