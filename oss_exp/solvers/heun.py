"""Heun's second-order method."""

from dataclasses import dataclass, replace

from torch import Tensor

from oss_exp.solvers.base import Solver, State, VelocityFn, rowwise


@dataclass(frozen=True)
class Heun(Solver):
    """Euler, then the mean of the slopes at both ends (trapezoid in t); plain Euler into t = 0.

    arXiv 2206.00364, Alg. 1 takes the slope in sigma; in canonical t it is another second-order method, not the same
    numbers. The last step is Euler's as there, since a correction at t = 0 would ask the network about clean data.
    """

    order = 2
    evals_per_step = 2

    def observe(self, f: VelocityFn, state: State) -> State:
        return replace(state, outputs=(f(state.x, state.t),), times=(state.t,))

    def advance(self, f: VelocityFn, state: State, t_next: Tensor) -> State:
        t_next = t_next.expand_as(state.t)
        step = rowwise(t_next - state.t, state.x)
        slope = state.outputs[0]
        x_euler = state.x + step * slope
        if bool((t_next == 0).all()):
            return replace(state, x=x_euler, t=t_next)
        corrected = state.x + step * 0.5 * (slope + f(x_euler, t_next))
        return replace(state, x=corrected.where(rowwise(t_next, corrected) > 0, x_euler), t=t_next)

    def nfe(self, num_steps: int) -> int:
        return super().nfe(num_steps) - 1
