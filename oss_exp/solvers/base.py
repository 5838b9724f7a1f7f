"""ODE solvers with explicit state, and the one sampling loop.

A solver remembers nothing: `observe` calls the network at (x, t), `advance` jumps to the next time, and what later
steps need travels in `State`. Legend: M rows, *E event dims, H remembered outputs, K steps.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from oss_exp.calibration import Calibration
from oss_exp.names import named_object
from oss_exp.tensors import rowwise
from oss_exp.velocity import VelocityFn

WeightRule = Callable[[Sequence[Tensor], Tensor], list[Tensor]]
"""(times of the outputs, newest first; time to reach) -> a weight for each of some vectors."""


@dataclass(frozen=True, eq=False)
class State:
    """x (M, *E) at t (M,) float64, and the last H remembered outputs, newest first, with their times (M,) each.

    order (M,): of the step that led here, None before the first. step: the number of steps taken so far.
    """

    x: Tensor
    t: Tensor
    outputs: tuple[Tensor, ...] = ()
    times: tuple[Tensor, ...] = ()
    order: Tensor | None = None
    step: int = 0

    def map(self, change: Callable[..., Tensor], *others: State) -> State:
        """change(tensor, *the same tensor of the others) on every tensor: reshape, select or merge rows."""
        return State(
            change(self.x, *(other.x for other in others)),
            change(self.t, *(other.t for other in others)),
            tuple(
                change(*same)
                for same in zip(self.outputs, *(o.outputs for o in others), strict=True)
            ),
            tuple(
                change(*same) for same in zip(self.times, *(o.times for o in others), strict=True)
            ),
            None if self.order is None else change(self.order, *(other.order for other in others)),
            self.step,
        )


class _Ordered:
    """Declares `order`, which is a class attribute of some solvers and a field of others."""

    order: int


@dataclass(frozen=True)
class Solver(_Ordered, abc.ABC):
    """Knows one rule of stepping dx/dt = v. Frozen: everything that changes is in State.

    order:       of accuracy; a multistep solver can take any single step at any order up to it.
    calibration: an amplitude table (or its file) that `sample` applies before each network call; a search and its
                 teacher run without.
    """

    calibration: Calibration | str | Path | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.calibration, str | Path):
            object.__setattr__(self, "calibration", Calibration.load(self.calibration))

    @property
    def evals_per_step(self) -> int:
        """Network calls of a step whose ends are both regular."""
        return 1

    @property
    def amplitude_table(self) -> Calibration | None:
        """The calibration, which has been read if a file was given."""
        assert not isinstance(self.calibration, str | Path)
        return self.calibration

    def init(self, x: Tensor, t: Tensor) -> State:
        """x (M, *E), t () or (M,) -> a state that has not seen the network."""
        return State(x, t.to(x.device, torch.float64).expand(len(x)))

    @abc.abstractmethod
    def observe(self, f: VelocityFn, state: State) -> State:
        """Call the network, once, at the state's own (x, t)."""

    @abc.abstractmethod
    def advance(
        self, f: VelocityFn, state: State, t_next: Tensor, order: int | Tensor | None = None
    ) -> State:
        """From an observed state to t_next (M,) or (), by a step of this order, () or (M,) (default: the highest)."""

    def orders(self, num_steps: int) -> Sequence[int | None]:
        """The order of each of num_steps steps down to t = 0, where nothing else chooses it; None: steps have none."""
        return [self.order] * num_steps


class Singlestep(Solver):
    """A solver that remembers nothing from earlier steps, and calls the network again within a step (`inner_step`).

    Methods of order p make p calls.
    """

    @property
    def evals_per_step(self) -> int:
        return self.order

    @property
    def singular_at(self) -> tuple[float, ...]:
        """Times at which the method's own variable is infinite; steps from or to them are Euler's, with one call."""
        return (1.0, 0.0)

    @abc.abstractmethod
    def inner_step(self, f: VelocityFn, state: State, t_next: Tensor) -> Tensor:
        """From an observed state to x at t_next (M,), neither end singular."""

    def advance(
        self, f: VelocityFn, state: State, t_next: Tensor, order: int | Tensor | None = None
    ) -> State:
        t_next = t_next.expand_as(state.t)
        x = self.euler(state, t_next)
        regular = t_next > 0
        if 1.0 in self.singular_at:
            regular = regular & (state.t < 1)
        if self.evals_per_step > 1 and bool(regular.any()):
            # Any regular times do where the answer is not used.
            start, end = torch.where(regular, state.t, 0.6), torch.where(regular, t_next, 0.4)
            inner = self.inner_step(f, replace(state, t=start), end)
            x = inner.where(rowwise(regular, x).bool(), x)
        return replace(state, x=x, t=t_next, step=state.step + 1)

    def observe(self, f: VelocityFn, state: State) -> State:
        return replace(state, outputs=(f(state.x, state.t),), times=(state.t,))

    @staticmethod
    def euler(state: State, t: Tensor) -> Tensor:
        """The Euler step from an observed state to t (M,)."""
        return state.x + rowwise(t - state.t, state.x) * state.outputs[0]


class LinearMultistep(Solver):
    """A solver that is one function: x_next = a x + sum_h b_h m_h with scalars from the times alone.

    The outputs m are the network's answers as `prediction`: the velocity v, x0 = x - t v, or eps = x + (1 - t) v.
    Order 1 is the same Euler step for all of them; `higher_order` is what makes a method.

    singular_at: times at which the method's own variable is infinite. A node at t = 1 is left out of a polynomial in
                 sigma or log-SNR, and no polynomial in log-SNR reaches t = 0: such steps have a lower order, exactly.
                 (At t = 1 an eps-method remembers x0, for eps is x itself there.)
    The search scores edges of such a solver from inner products, without making a single candidate.
    """

    prediction: ClassVar[Literal["v", "x0", "eps"]]
    singular_at: ClassVar[tuple[float, ...]] = ()
    lower_order_final: bool = False  # a field in solvers that offer it

    def higher_order(self, times: Sequence[Tensor], t_next: Tensor) -> list[Tensor]:
        """[a, b_0, b_1, ...] for two or more times, none of them singular. Arguments as in `coefficients`."""
        raise NotImplementedError

    def coefficients(self, times: Sequence[Tensor], t_next: Tensor) -> tuple[Tensor, list[Tensor]]:
        """times: of the outputs, newest (the current) first; their number is the order. All broadcast to t_next.

        -> a, [b_0, b_1, ...].
        """
        a, *b = self.at_ends(self._any_order, times, t_next)
        return a, b

    def orders(self, num_steps: int) -> list[int]:
        """Warm-up: no more than there are outputs. lower_order_final: no more than there are steps left."""
        orders = [min(self.order, step + 1) for step in range(num_steps)]
        if self.lower_order_final:
            orders = [min(order, num_steps - step) for step, order in enumerate(orders)]
        return orders

    def observe(self, f: VelocityFn, state: State) -> State:
        return self.remember(state, self.output(state.x, f(state.x, state.t), state.t))

    def advance(
        self, f: VelocityFn, state: State, t_next: Tensor, order: int | Tensor | None = None
    ) -> State:
        t_next = t_next.expand_as(state.t)
        order = len(state.outputs) if order is None else order
        order = torch.as_tensor(order, device=state.t.device).expand(len(state.t))
        weights = self.by_order(self._any_order, state.times, t_next, order)
        x = combine(weights, (state.x, *state.outputs))
        return replace(state, x=x, t=t_next, order=order, step=state.step + 1)

    def output(self, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """The velocity v at (x, t), in the form that is remembered; linear in (x, v)."""
        if self.prediction == "v":
            return v
        data = rowwise(-t, x)
        if self.prediction == "x0":
            return x + data * v
        return x + torch.where(rowwise(t, x) < 1, 1 + data, data) * v

    def remember(self, state: State, output: Tensor) -> State:
        outputs = (output, *state.outputs)[: self.order]
        return replace(state, outputs=outputs, times=(state.t, *state.times)[: self.order])

    def by_order(
        self, rule: WeightRule, times: Sequence[Tensor], t: Tensor, order: Tensor
    ) -> list[Tensor]:
        """rule(times of the row's order, t) with both ends seen to, each row (M,) at its own order, 0 beyond it."""
        weights: list[Tensor] = []
        highest = len(times)
        for o in order.unique().tolist():
            if not 1 <= o <= highest:
                raise ValueError(
                    f"a step of order {o} was asked for; {highest} outputs allow orders 1 to {highest}"
                )
            found = [*self.at_ends(rule, times[:o], t), *[torch.zeros_like(t)] * (highest - o)]
            if weights:
                found = [
                    torch.where(order == o, new, old)
                    for new, old in zip(found, weights, strict=True)
                ]
            weights = found
        return weights

    def at_ends(self, rule: WeightRule, times: Sequence[Tensor], t_next: Tensor) -> list[Tensor]:
        """rule(times, t_next), with lower orders (and zeros for the outputs left out) where a time is singular."""
        regular = torch.ones_like(t_next, dtype=torch.bool)
        if 1.0 in self.singular_at:
            regular = regular & (times[-1] < 1)
        if 0.0 in self.singular_at:
            regular = regular & (t_next > 0)
        if len(times) == 1 or bool(regular.all()):
            return rule(times, t_next)
        lower = self.at_ends(rule, times[:-1], t_next)
        lower = [*lower, torch.zeros_like(lower[0])]
        if not bool(regular.any()):
            return lower
        # Any regular times do where the answer is not used; infinities would spoil its gradient.
        times = [torch.where(regular, time, 0.5 + 0.1 * h) for h, time in enumerate(times)]
        higher = rule(times, torch.where(regular, t_next, 0.4))
        return [torch.where(regular, high, low) for high, low in zip(higher, lower, strict=True)]

    def _any_order(self, times: Sequence[Tensor], t_next: Tensor) -> list[Tensor]:
        if len(times) > 1:
            return self.higher_order(times, t_next)
        t = times[0]
        if self.prediction == "v":
            return [torch.ones_like(t_next), t_next - t]
        if self.prediction == "x0":
            return [t_next / t, 1 - t_next / t]
        inner = torch.where(t < 1, t, 0.5)
        a = (1 - t_next) / (1 - inner)
        return [torch.where(t < 1, a, t_next), torch.where(t < 1, t_next - a * inner, 1 - t_next)]


def named_solver(record: Mapping[str, Any]) -> Solver:
    """Return the solver that a schedule's provenance names: `_target_`, a public name, and its arguments.

    An empty record is Euler's. Raises ValueError where it names something else, or arguments that the solver refuses.
    """
    target, arguments = record.get("_target_", "oss_exp.Euler"), {**record}
    arguments.pop("_target_", None)
    try:
        kind = named_object(str(target))
    except ValueError:
        kind = None
    if not (isinstance(kind, type) and issubclass(kind, Solver)):
        raise ValueError(
            f"the schedule's solver {target} is no solver of oss_exp; give the solver itself"
        )
    for name, value in arguments.items():
        if isinstance(value, bool) and not isinstance(getattr(kind, name, value), bool):
            raise ValueError(
                f"the schedule's solver {target} has {name}={value}, which is no number"
            )
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(
            f"the schedule's solver {target} cannot be made: {error}; give the solver itself"
        ) from None


def combine(weights: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
    """sum of weight (M,) * vector (M, *E)."""
    first, *rest = (rowwise(weight, x) * x for weight, x in zip(weights, vectors, strict=True))
    return sum(rest, first)
