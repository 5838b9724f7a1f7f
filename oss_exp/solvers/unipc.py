"""UniPC: a multistep predictor, and a corrector that reuses the next step's network call."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import factorial
from typing import Literal, get_args

import torch
from torch import Tensor

from oss_exp.checks import require_choice, require_range
from oss_exp.solvers.base import LinearMultistep, State, combine
from oss_exp.solvers.dpm_solver_pp import log_snr
from oss_exp.velocity import VelocityFn

Variant = Literal["bh1", "bh2"]


@dataclass(frozen=True)
class UniPC(LinearMultistep):
    """UniPC with data prediction (Zhao et al. 2023, arXiv 2302.04867, Algorithms 5 to 8).

    The corrector acts in `observe`. The network call at the predicted state also
    corrects that state, at the order of its predictor; the output is remembered as it
    is. So a step has one call, and is one order better than its predictor. The last
    state is never observed, so it is never corrected. Right after a step from t = 1,
    where h is infinite, bh2's corrector takes its limit, and bh1, which has none, does
    not correct.

    Args:
        order: 1 to 3, of the predictor.
        variant: "bh1" has B(h) = h, "bh2" has B(h) = e^h - 1.
        lower_order_final: the last step but one has at most order 2. (The last, into
            t = 0, always has order 1.)
    """

    prediction = "x0"
    singular_at = (1.0, 0.0)

    order: int = 2
    variant: Variant = "bh2"
    lower_order_final: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(at_least=1, at_most=3, order=self.order)
        require_choice(get_args(Variant), variant=self.variant)

    def higher_order(self, times: Sequence[Tensor], t_next: Tensor) -> list[Tensor]:
        current, *older = self._beyond_euler(times, t_next, corrector=False)
        return [t_next / times[0], 1 - t_next / times[0] + current, *older]

    def observe(self, f: VelocityFn, state: State) -> State:
        output = self.output(state.x, f(state.x, state.t), state.t)
        if state.order is None:
            return self.remember(state, output)
        weights = self.by_order(self._correction, state.times, state.t, state.order)
        corrected = state.x + combine(weights, (output, *state.outputs))
        return self.remember(replace(state, x=corrected), output)

    def _correction(self, times: Sequence[Tensor], t: Tensor) -> list[Tensor]:
        """Return the weights of [new output, current, older ...] that correct a predicted state."""
        if len(times) > 1:
            new, *corrected = self._beyond_euler(times, t, corrector=True)
            predicted = self._beyond_euler(times, t, corrector=False)
            for h, weight in enumerate(predicted):
                corrected[h] = corrected[h] - weight
            return [new, *corrected]
        start = torch.where(times[0] < 1, times[0], 0.5)
        new = -(1 - t) * self._b(log_snr(start) - log_snr(t)) / 2
        new = torch.where(times[0] < 1, new, (1 - t) / 2 if self.variant == "bh2" else 0.0)
        return [new, -new]

    def _b(self, hh: Tensor) -> Tensor:
        """Return B(h) of the paper at hh = -h."""
        return hh if self.variant == "bh1" else torch.expm1(hh)

    def _beyond_euler(
        self, times: Sequence[Tensor], t_next: Tensor, corrector: bool
    ) -> list[Tensor]:
        """Return the weights that are added to those of the Euler step.

        They are of [current, older ...], and with `corrector` also of the new output,
        which then comes first.
        """
        # Positions of the other outputs, in log-SNR and relative to the step: (..., p).
        lambdas = [log_snr(t) for t in times]
        h = log_snr(t_next) - lambdas[0]
        hh = -h
        positions = []
        for older in lambdas[1:]:
            positions.append((older - lambdas[0]) / h)
        if corrector:
            positions.append(torch.ones_like(h))
        ratios = torch.stack(torch.broadcast_tensors(*positions), dim=-1)

        # The paper's rho solves a Vandermonde system.
        if len(times) == 2 and not corrector:
            rho = torch.full_like(ratios, 0.5)
        else:
            right = []
            g = torch.expm1(hh) / hh - 1
            for i in range(1, ratios.shape[-1] + 1):
                right.append(g * factorial(i) / self._b(hh))
                g = g / hh - 1 / factorial(i + 1)
            powers = torch.arange(ratios.shape[-1], device=h.device)[:, None]
            matrix = ratios[..., None, :] ** powers
            rho = torch.linalg.solve(matrix, torch.stack(right, dim=-1).expand_as(ratios))

        # Weights of differences to the current output.
        scaled = (-(1 - t_next) * self._b(hh))[..., None] * rho / ratios
        weights = list(scaled.unbind(-1))
        new = [weights.pop()] if corrector else []
        return [*new, -sum(weights + new, torch.zeros_like(h)), *weights]
