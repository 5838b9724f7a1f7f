"""ODE solvers with explicit state, and the one sampling loop.

A solver remembers nothing: `observe` calls the network at (x, t), `advance` jumps to the next time, and what later
steps need travels in `State`. Legend: M rows, *E event dims, H remembered outputs, K steps.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oss_exp.steps import StepSchedule

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""v = f(x (M, *E), t (M,)) -> (M, *E). M is any multiple of the B bound samples; row m belongs to sample m % B."""


@dataclass(frozen=True, eq=False)
class BoundVelocity:
    """fn(x (M, *E), t (M,), condition (M, ...) or None) with one condition per sample bound, as a VelocityFn.

    Tiles the condition over the rows, feeds the network at most `micro_batch` rows at a time, and can be cut to a few
    samples, which lets a search work through its samples in small groups. A plain VelocityFn is enough everywhere else.
    rows_per_call: network rows that one row of x costs (2 under classifier-free guidance), for honest NFE.
    """

    fn: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    condition: Tensor | None
    micro_batch: int
    rows_per_call: int = 1

    def __post_init__(self) -> None:
        if self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1 row, got {self.micro_batch}")

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        rows = None
        if self.condition is not None:
            rows = self.condition.repeat(len(x) // len(self.condition), *[1] * (self.condition.ndim - 1))
        if len(x) <= self.micro_batch:
            return self.fn(x, t, rows)
        v = torch.empty_like(x)
        for start in range(0, len(x), self.micro_batch):
            part = slice(start, start + self.micro_batch)
            v[part] = self.fn(x[part], t[part], None if rows is None else rows[part])
        return v

    def subset(self, samples: Tensor) -> BoundVelocity:
        """The same for these of the B samples only, (b,) positions."""
        return replace(self, condition=None if self.condition is None else self.condition[samples])


@dataclass(frozen=True, eq=False)
class State:
    """x (M, *E) at t (M,) float64, and the last H network outputs, newest first, with their times (M,) each."""

    x: Tensor
    t: Tensor
    outputs: tuple[Tensor, ...] = ()
    times: tuple[Tensor, ...] = ()

    def map(self, change: Callable[..., Tensor], *others: State) -> State:
        """change(tensor, *the same tensor of the others) on every tensor: reshape, select or merge rows."""
        return State(
            change(self.x, *(other.x for other in others)),
            change(self.t, *(other.t for other in others)),
            tuple(change(*same) for same in zip(self.outputs, *(o.outputs for o in others), strict=True)),
            tuple(change(*same) for same in zip(self.times, *(o.times for o in others), strict=True)),
        )


class Solver(abc.ABC):
    """Knows one rule of stepping dx/dt = v. Frozen: everything that changes is in State."""

    order: int
    evals_per_step: int  # network calls

    def init(self, x: Tensor, t: Tensor) -> State:
        """x (M, *E), t () or (M,) -> a state that has not seen the network."""
        return State(x, t.to(x.device, torch.float64).expand(len(x)))

    @abc.abstractmethod
    def observe(self, f: VelocityFn, state: State) -> State:
        """Call the network at the state's own (x, t)."""

    @abc.abstractmethod
    def advance(self, f: VelocityFn, state: State, t_next: Tensor) -> State:
        """From an observed state to t_next (M,) or ()."""

    def nfe(self, num_steps: int) -> int:
        """Network calls per sample for num_steps steps ending at t = 0."""
        return num_steps * self.evals_per_step


class LinearMultistep(Solver):
    """A solver that is one function: x_next = a x + sum_h b_h m_h with scalars from the times alone.

    The search scores edges of such a solver from inner products, without making a single candidate.
    """

    evals_per_step = 1

    @abc.abstractmethod
    def coefficients(self, times: Sequence[Tensor], t_next: Tensor) -> tuple[Tensor, list[Tensor]]:
        """times: of the outputs, newest (the current) first; all broadcastable to t_next. -> a, [b_0, b_1, ...]."""

    def observe(self, f: VelocityFn, state: State) -> State:
        outputs = (f(state.x, state.t), *state.outputs)[: self.order]
        return replace(state, outputs=outputs, times=(state.t, *state.times)[: self.order])

    def advance(self, f: VelocityFn, state: State, t_next: Tensor) -> State:
        t_next = t_next.expand_as(state.t)
        a, b = self.coefficients(state.times, t_next)
        x = rowwise(a, state.x) * state.x
        for weight, output in zip(b, state.outputs, strict=True):
            x = x + rowwise(weight, x) * output
        return replace(state, x=x, t=t_next)


def rowwise(weight: Tensor, x: Tensor) -> Tensor:
    """weight (M,) or () float64 -> x's dtype, shaped to multiply x (M, *E)."""
    return weight.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


# --------------------------------------------------------------------------------------------------------------
# The one loop
# --------------------------------------------------------------------------------------------------------------


def walk(solver: Solver, f: VelocityFn, x: Tensor, times: Tensor) -> Iterator[State]:
    """x (M, *E) at times[0]; times (K+1,) or (K+1, M). Yields the observed state at each time, the last unobserved."""
    times = times.to(x.device)
    state = solver.init(x, times[0])
    for t_next in times[1:]:
        state = solver.observe(f, state)
        yield state
        state = solver.advance(f, state, t_next)
    yield state


@torch.no_grad()
def trajectory(solver: Solver, f: VelocityFn, x: Tensor, times: Tensor) -> Tensor:
    """x (M, *E) at times[0], times (N+1,) -> the states at all of them, (N+1, M, *E)."""
    return torch.stack([state.x for state in walk(solver, f, x, times)])


@torch.no_grad()
def sample(solver: Solver, f: VelocityFn, noise: Tensor, steps: StepSchedule, group: Tensor | None = None) -> Tensor:
    """Run a step schedule: noise (B, *E), group (B,) condition indices for an analytic start -> x0 (B, *E).

    A per-sample schedule needs one row per noise, in the same order.
    """
    if steps.times.ndim == 2 and len(steps.times) != len(noise):
        raise ValueError(f"the schedule has times for {len(steps.times)} samples, the noise has {len(noise)}")
    times = steps.times.movedim(-1, 0)  # (K+1, B), or unchanged (K+1,)
    for state in walk(solver, f, steps.initial_state(noise, group), times):
        final = state.x
    return final
