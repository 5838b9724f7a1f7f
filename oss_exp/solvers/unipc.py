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
    """Orders 1 to 3, data prediction (Zhao et al. 2023, arXiv 2302.04867, Alg. 5-8), one network call a step.

    variant bh1 has B(h) = h, bh2 B(h) = e^h - 1. The corrector acts in `observe`: the call at the predicted state
    corrects that state, at its predictor's order, and is remembered as it is; together they are one order better. Right
    after a step from t = 1, where h is infinite, bh2's corrector takes its limit and bh1, which has none, does not
    correct. The last state is never observed, so never corrected.
    lower_order_final: the last step but one at most of order 2. (The last, into t = 0, is always of order 1.)
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
        current, *older = self._extra(times, t_next, corrector=False)
        return [t_next / times[0], 1 - t_next / times[0] + current, *older]

    def observe(self, f: VelocityFn, state: State) -> State:
        output = self.output(state.x, f(state.x, state.t), state.t)
        if state.order is None:
            return self.remember(state, output)
        weights = self.by_order(self._correction, state.times, state.t, state.order)
        corrected = state.x + combine(weights, (output, *state.outputs))
        return self.remember(replace(state, x=corrected), output)

    def _correction(self, times: Sequence[Tensor], t: Tensor) -> list[Tensor]:
        """Weights of [the new output, current, older ...] that turn the predicted state into the corrected one."""
        if len(times) > 1:
            new, *corrected = self._extra(times, t, corrector=True)
            return [
                new,
                *(
                    c - p
                    for c, p in zip(corrected, self._extra(times, t, corrector=False), strict=True)
                ),
            ]
        start = torch.where(times[0] < 1, times[0], 0.5)
        new = -(1 - t) * self._b(log_snr(start) - log_snr(t)) / 2
        new = torch.where(times[0] < 1, new, (1 - t) / 2 if self.variant == "bh2" else 0.0)
        return [new, -new]

    def _b(self, hh: Tensor) -> Tensor:
        return hh if self.variant == "bh1" else torch.expm1(hh)

    def _extra(self, times: Sequence[Tensor], t_next: Tensor, corrector: bool) -> list[Tensor]:
        """Weights of [the new output (corrector only), current, older ...] beyond those of the Euler step."""
        lambdas = [log_snr(t) for t in times]
        h = log_snr(t_next) - lambdas[0]
        hh, size = -h, len(times)
        ratios = [(older - lambdas[0]) / h for older in lambdas[1:]] + [
            torch.ones_like(h)
        ] * corrector
        ratios = torch.stack(torch.broadcast_tensors(*ratios), dim=-1)  # (..., p)
        if size == 2 and not corrector:
            rho = torch.full_like(ratios, 0.5)
        else:
            goals, g = [], torch.expm1(hh) / hh - 1
            for i in range(1, ratios.shape[-1] + 1):
                goals.append(g * factorial(i) / self._b(hh))
                g = g / hh - 1 / factorial(i + 1)
            powers = torch.arange(ratios.shape[-1], device=h.device)[:, None]
            right = torch.stack(goals, dim=-1).expand_as(ratios)
            rho = torch.linalg.solve(ratios[..., None, :] ** powers, right)
        scaled = (-(1 - t_next) * self._b(hh))[..., None] * rho / ratios
        weights = list(scaled.unbind(-1))
        new = [weights.pop()] if corrector else []
        return [*new, -sum(weights + new, torch.zeros_like(h)), *weights]
