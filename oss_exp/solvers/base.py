"""ODE solvers with explicit state.

A solver object holds its settings only. `observe` calls the network at the state's
(x, t), `advance` steps to the next time, and all that later steps need travels in
`State`.

Legend: M rows, *E event dims, H remembered outputs, K steps.
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
"""rule(times of the outputs, newest first; time to reach) -> the weights of a sum of vectors."""


@dataclass(frozen=True, eq=False)
class State:
    """The state of a sampler between two steps.

    Attributes:
        x: (M, *E) the sample.
        t: (M,) float64 its canonical time.
        outputs: the last H remembered outputs, (M, *E) each, newest first.
        times: the times (M,) of these outputs.
        order: (M,) order of the step that led here; None before the first step, and for
            solvers that are not linear multistep.
        step: the number of steps so far.
    """

    x: Tensor
    t: Tensor
    outputs: tuple[Tensor, ...] = ()
    times: tuple[Tensor, ...] = ()
    order: Tensor | None = None
    step: int = 0

    def map(self, change: Callable[..., Tensor], *others: State) -> State:
        """Return a state with `change` applied to each tensor and the same ones of the others.

        Example: `state.map(lambda rows: rows[:2])` keeps the first two rows.
        """
        columns = zip(self._tensors, *(other._tensors for other in others), strict=True)
        x, t, *memory = (change(*tensors) for tensors in columns)

        # In the order of `_tensors`.
        size = len(self.outputs)
        outputs = tuple(memory[:size])
        times = tuple(memory[size : 2 * size])
        order = None if self.order is None else memory[-1]
        return State(x, t, outputs, times, order, self.step)

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        order = () if self.order is None else (self.order,)
        return (self.x, self.t, *self.outputs, *self.times, *order)


class _Ordered:
    """Declares `order`, which is a class attribute of some solvers and a field of others."""

    order: int


@dataclass(frozen=True)
class Solver(_Ordered, abc.ABC):
    """One rule of stepping dx/dt = v. It is frozen: all that changes is in `State`.

    Attributes:
        order: order of accuracy. A multistep solver can take any single step at any
            order up to it.

    Args:
        calibration: an amplitude table, or its file, that `sample` applies before each
            step. A search and its teacher run without it.
    """

    calibration: Calibration | str | Path | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.calibration, str | Path):
            object.__setattr__(self, "calibration", Calibration.load(self.calibration))

    @property
    def evals_per_step(self) -> int:
        """Network calls of one step; a step that ends at t = 0 may need fewer."""
        return 1

    @property
    def amplitude_table(self) -> Calibration | None:
        """The calibration as a table; None without one."""
        assert not isinstance(self.calibration, str | Path)
        return self.calibration

    def init(self, x: Tensor, t: Tensor) -> State:
        """Return the state at x (M, *E) and t, () or (M,), before any network call."""
        return State(x, t.to(x.device, torch.float64).expand(len(x)))

    @abc.abstractmethod
    def observe(self, f: VelocityFn, state: State) -> State:
        """Call the network once at the state's (x, t), and return the state that remembers it."""

    @abc.abstractmethod
    def advance(
        self, f: VelocityFn, state: State, t_next: Tensor, order: int | Tensor | None = None
    ) -> State:
        """Return the state after one step from an observed state.

        Args:
            f: the velocity, which singlestep solvers call again within the step.
            state: an observed state.
            t_next: time to reach, () or (M,).
            order: order of the step, () or (M,); None means the highest that is
                possible.
        """

    def orders(self, num_steps: int) -> Sequence[int | None]:
        """Return the default order of each of num_steps steps down to t = 0.

        None stands for a step without an order.
        """
        return [self.order] * num_steps


class Singlestep(Solver):
    """A solver that remembers no earlier step and calls the network again within a step.

    A step of order p makes p calls.
    """

    @property
    def evals_per_step(self) -> int:
        return self.order

    @property
    def singular_at(self) -> tuple[float, ...]:
        """Times at which the method's own variable is infinite.

        Steps from or to them are Euler's, with one call.
        """
        return (1.0, 0.0)

    @abc.abstractmethod
    def inner_step(self, f: VelocityFn, state: State, t_next: Tensor) -> Tensor:
        """Return x (M, *E) at t_next (M,) from an observed state; neither time is singular."""

    def advance(
        self, f: VelocityFn, state: State, t_next: Tensor, order: int | Tensor | None = None
    ) -> State:
        t_next = t_next.expand_as(state.t)
        x = self.euler(state, t_next)
        regular = t_next > 0
        if 1.0 in self.singular_at:
            regular = regular & (state.t < 1)
        if self.evals_per_step > 1 and bool(regular.any()):
            # Rows that start or end at a singular time get regular ones, whatever they are;
            # their result is not used.
            start = torch.where(regular, state.t, 0.6)
            end = torch.where(regular, t_next, 0.4)
            inner = self.inner_step(f, replace(state, t=start), end)
            x = inner.where(rowwise(regular, x).bool(), x)
        return replace(state, x=x, t=t_next, step=state.step + 1)

    def observe(self, f: VelocityFn, state: State) -> State:
        return replace(state, outputs=(f(state.x, state.t),), times=(state.t,))

    @staticmethod
    def euler(state: State, t: Tensor) -> Tensor:
        """Return the Euler step from an observed state to t (M,)."""
        return state.x + rowwise(t - state.t, state.x) * state.outputs[0]


class LinearMultistep(Solver):
    """A solver whose step is x_next = a x + sum_h b_h m_h, with scalars from the times alone.

    The outputs m are what the network predicts, in the form `prediction`: the velocity
    v, x0 = x - t v, or eps = x + (1 - t) v. A step of order p uses the p newest
    outputs. Order 1 is the same Euler step in all three forms; `higher_order` is what
    makes a method.

    Some methods work in a variable that is infinite at t = 1 or t = 0, such as log-SNR.
    A step with such a time among its own takes a lower order instead, see `at_ends`.
    The search scores the steps of these solvers from inner products, without taking
    them (`LinearEdges`).

    Attributes:
        prediction: the form of the outputs.
        singular_at: times at which the method's own variable is infinite. (At t = 1 an
            eps-method remembers x0, because there eps is x itself.)
        lower_order_final: whether the last steps have lower orders; a field in solvers
            that offer it.
    """

    prediction: ClassVar[Literal["v", "x0", "eps"]]
    singular_at: ClassVar[tuple[float, ...]] = ()
    lower_order_final: bool = False

    def higher_order(self, times: Sequence[Tensor], t_next: Tensor) -> list[Tensor]:
        """Return [a, b_0, b_1, ...] of a step of order 2 or more at regular times.

        Args:
            times: of the outputs, newest first; their number is the order.
            t_next: time to reach.
        """
        raise NotImplementedError

    def coefficients(self, times: Sequence[Tensor], t_next: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return a and [b_0, b_1, ...] of a step.

        Args:
            times: of the outputs, newest first, that of the current state being the
                newest. Their number is the order.
            t_next: time to reach. Its shape and those of the times broadcast with each
                other, and a and each b with the common shape.
        """
        a, *b = self.at_ends(self._any_order, times, t_next)
        return a, b

    def orders(self, num_steps: int) -> list[int]:
        """Return the order of each step: no more than there are outputs.

        With `lower_order_final`, no more than there are steps left, either.
        """
        orders = []
        for step in range(num_steps):
            order = min(self.order, step + 1)
            if self.lower_order_final:
                order = min(order, num_steps - step)
            orders.append(order)
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
        """Return the velocity v at (x, t) in the form `prediction`; it is linear in (x, v)."""
        if self.prediction == "v":
            return v
        minus_t = rowwise(-t, x)
        if self.prediction == "x0":
            return x + minus_t * v
        return x + torch.where(rowwise(t, x) < 1, 1 + minus_t, minus_t) * v

    def remember(self, state: State, output: Tensor) -> State:
        """Return the state with one more output, of which the newest `order` are kept."""
        outputs = (output, *state.outputs)[: self.order]
        return replace(state, outputs=outputs, times=(state.t, *state.times)[: self.order])

    def by_order(
        self, rule: WeightRule, times: Sequence[Tensor], t: Tensor, order: Tensor
    ) -> list[Tensor]:
        """Return the weights of rows whose steps have different orders.

        Each row uses the times of its own order, and has weight 0 for the outputs
        beyond it.

        Example: with the Euler rule for order 1 and Adams-Bashforth for order 2, steps
        of 0.1 from t = 0.5, and the orders (1, 2) of two rows:

            a   = (1, 1)
            b_0 = (-0.1, -0.15)
            b_1 = (0, 0.05)

        Args:
            rule: gives the weights [a, b_0, ...] for the times of one order.
            times: (M,) each, of the outputs, newest first.
            t: (M,) times to reach.
            order: (M,) order of each row.

        Raises:
            ValueError: an order is below 1 or above the number of outputs.
        """
        highest = len(times)
        weights: list[Tensor] = []
        for o in order.unique().tolist():
            if not 1 <= o <= highest:
                raise ValueError(
                    f"a step of order {o} is not possible: {highest} outputs allow orders 1 to "
                    f"{highest}"
                )

            # This order's weights, for its own rows.
            zeros = [torch.zeros_like(t)] * (highest - o)
            candidates = [*self.at_ends(rule, times[:o], t), *zeros]
            if not weights:
                weights = candidates
                continue
            for p, candidate in enumerate(candidates):
                weights[p] = torch.where(order == o, candidate, weights[p])
        return weights

    def at_ends(self, rule: WeightRule, times: Sequence[Tensor], t_next: Tensor) -> list[Tensor]:
        """Return the weights of a step, with a lower order where one of its times is singular.

        The oldest output is dropped, and its weight is 0, until the rule has regular
        times only; order 1 is always possible. Dropping the oldest is enough for t = 1,
        at which only the first output of a run can be.

        Example: DPM-Solver++ at order 2, whose log-SNR is infinite at both ends. Three
        rows, each with its own order:

            times         to     a      b_0    b_1
            0.8, 0.9      0.6    0.75   0.40   -0.15    regular: second order
            0.8, 1.0      0.6    0.75   0.25    0       the older output is at t = 1: Euler's
            0.1, 0.2      0.0    0      1       0       no log-SNR at the end: Euler's

        Args:
            rule: gives the weights [a, b_0, ...] at regular times.
            times: of the outputs, newest first.
            t_next: times to reach.
        """
        # Rows where the rule holds.
        regular = torch.ones_like(t_next, dtype=torch.bool)
        if 1.0 in self.singular_at:
            regular = regular & (times[-1] < 1)
        if 0.0 in self.singular_at:
            regular = regular & (t_next > 0)
        if len(times) == 1 or bool(regular.all()):
            return rule(times, t_next)

        # The other rows: one order lower.
        lower = self.at_ends(rule, times[:-1], t_next)
        lower = [*lower, torch.zeros_like(lower[0])]
        if not bool(regular.any()):
            return lower

        # Singular rows get regular times, whatever they are. Their result is not used, but
        # infinities there would spoil the gradient of the others.
        times = [torch.where(regular, time, 0.5 + 0.1 * h) for h, time in enumerate(times)]
        weights = rule(times, torch.where(regular, t_next, 0.4))
        for p, low in enumerate(lower):
            weights[p] = torch.where(regular, weights[p], low)
        return weights

    def _any_order(self, times: Sequence[Tensor], t_next: Tensor) -> list[Tensor]:
        """Return [a, b_0, ...] of the method's step, or of Euler's for a single output.

        The Euler step x + (t' - t) v, written over each form of output:

            v      x + (t' - t) v               a = 1                    b_0 = t' - t
            x0     (t'/t) x + (1 - t'/t) x0     a = t'/t                 b_0 = 1 - t'/t
            eps    a x + (t' - a t) eps         a = (1 - t') / (1 - t)   b_0 = t' - a t

        From t = 0.5 to 0.4 the weights (a, b_0) are (1, -0.1), (0.8, 0.2) and
        (1.2, -0.2). At t = 1 an eps-method remembers x0, with the weights t', 1 - t'.
        """
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
    """Return the solver that a schedule's provenance names.

    Schedules are searched without calibration. One that a record names, as files of
    earlier versions do, is left out, so that no file is read because a schedule names it.

    Args:
        record: `_target_`, a public name, and the solver's arguments. An empty record
            is Euler.

    Raises:
        ValueError: the name is not a solver's, or the solver refuses the arguments.
    """
    arguments = {**record, "calibration": None}
    target = arguments.pop("_target_", "oss_exp.Euler")

    # The class.
    try:
        kind = named_object(str(target))
    except ValueError:
        kind = None
    if not (isinstance(kind, type) and issubclass(kind, Solver)):
        raise ValueError(
            f"the schedule's solver {target} is no solver of oss_exp; give the solver itself"
        )

    # Its arguments: JSON's true is no number.
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
    """Return the sum (M, *E) of vectors (M, *E), each times its weight (M,)."""
    first, *others = (rowwise(weight, x) * x for weight, x in zip(weights, vectors, strict=True))
    return sum(others, first)
