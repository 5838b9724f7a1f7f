"""A solver's steps as weighted sums, in which two solvers can be compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oss_exp.solvers.base import Solver
from oss_exp.solvers.sampling import walk
from oss_exp.tensors import rowwise


def solver_sums(solver: Solver, times: Tensor, orders: Sequence[Tensor] | None = None) -> Tensor:
    """Return the states after all steps, as sums over the first state and each call's x0.

    The solver runs on unit vectors that stand for these, so gradients reach the times.

    Args:
        solver: takes the steps, with one network call each.
        times: (K+1,).
        orders: of the K steps; None means the solver's own.

    Returns:
        (K, 1 + K) coefficients, the calls in their order.

    Raises:
        ValueError: a step calls the network twice.
    """
    count = len(times) - 1
    if solver.evals_per_step > 1 and count > 1:  # a single step, into t = 0, is Euler's
        raise ValueError(
            f"{solver} calls the network again within a step, which is no sum over earlier calls; "
            "use a multistep solver"
        )
    basis = torch.eye(count + 1, dtype=torch.float64, device=times.device)
    states: list[Tensor] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        states.append(x[0])
        return (x - basis[len(states)]) / rowwise(t, x)

    *_, last = walk(solver, velocity, basis[:1], times, orders)
    return torch.stack([*states[1:], last.x[0]])
