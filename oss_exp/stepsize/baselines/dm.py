"""DM-NonUniform: times that minimise a bound on the error of a multistep sampler.

Xue et al. 2024, "Accelerating Diffusion Sampling with Optimized Time Steps"
(arXiv 2402.17376). It needs neither a network nor images. A multistep exponential
integrator in lambda = log(alpha / sigma) is linear in the network's outputs. If the
output at node i is wrong by sigma_i^p / alpha_i, the sample is wrong by at most the sum
of these errors, each times the weight of its output.

Legend: K steps between nodes lambda_0 < ... < lambda_K, step s starts at node s; (...)
are batch dimensions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from scipy.optimize import LinearConstraint, NonlinearConstraint, minimize
from torch import Tensor
from torch.nn.functional import pad

from oss_exp.checks import require_choice, require_range
from oss_exp.noise import CosinePath, GaussianPath
from oss_exp.noise.schedules import require_sigmas
from oss_exp.schedule import StepSchedule
from oss_exp.stepsize.base import begin_at, check_num_steps
from oss_exp.stepsize.problem import Problem

Init = Literal["unif", "unif_t", "quad", "edm"]


@dataclass(frozen=True)
class DM:
    """The K-step schedule of the least error bound between two noise levels.

    It is one schedule for all samples. Its first time becomes the teacher's first node
    and its last one 0, so that all students share one noise.

    Args:
        path: alpha and sigma of the network. For p = 1 all paths agree.
        p: exponent of the assumed error sigma^p / alpha. The authors' code has 2, and
            advises 1 for pixels.
        separate_steps: the number of first steps that each count the norm of their
            terms; the terms of later steps may cancel. None means all steps. The
            authors' code has 3 and advises 0 above 7 steps. Below 2, from about 6 steps
            on, the least bound is useless: all terms cancel, the nodes pile up at the
            data end, and the authors' schedules are those where a descent stops. From 2
            on every `init` leads to one optimum.
        init: where the optimiser starts, evenly spaced in: "unif" log SNR, "unif_t" the
            network's native time, "quad" its square root, "edm" (sigma / alpha)^(1/7).
        sigma_min: sigma / alpha at the last node.
        sigma_max: sigma / alpha at the first node.
    """

    per_sample: ClassVar[bool] = False
    baseline: ClassVar[bool] = True

    path: GaussianPath = field(default_factory=CosinePath)
    p: float = 2
    separate_steps: int | None = None
    init: Init = "unif"
    sigma_min: float = 0.0105
    sigma_max: float = 152.0

    def __post_init__(self) -> None:
        require_range(above=0, at_most=100, p=self.p)
        require_sigmas(self.sigma_min, self.sigma_max)
        require_range(at_least=0, separate_steps=self.separate_steps)
        require_choice(get_args(Init), init=self.init)

    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        """Return the optimal schedules.

        Raises ValueError where the second time is not below the teacher's first, or
        where the path does not reach sigma_min and sigma_max.
        """
        start_time = float(problem.grid[0])
        low = -math.log(self.sigma_max)
        high = -math.log(self.sigma_min)
        remedy = (
            f"choose a smaller sigma_max (now {self.sigma_max}) or a teacher that starts at more "
            "noise"
        )
        plans = {}
        for k in check_num_steps(num_steps, problem.num_nodes):
            guess = spaced(self.init, self.path, low, high, k)
            lambdas = optimise(guess, self.path, self.p, self.separate_steps)
            times = torch.sigmoid(-lambdas)
            times[-1] = 0
            plans[k] = StepSchedule(begin_at(times, start_time, "DM", remedy))
        return plans

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        return 0


def spaced(init: Init, path: GaussianPath, low: float, high: float, num_steps: int) -> Tensor:
    """Return K+1 log SNRs, float64, from exactly `low` to exactly `high`.

    They are evenly spaced in the quantity that `init` names, see `DM`.
    """

    def evenly(first: Tensor, last: Tensor, power: int) -> Tensor:
        ends = first ** (1 / power), last ** (1 / power)
        return torch.linspace(*ends, num_steps + 1, dtype=torch.float64) ** power

    # Native times at both ends, and at clean data.
    ends = torch.tensor([low, high, math.inf], dtype=torch.float64)
    noise, data, clean = path.native(torch.sigmoid(-ends))

    def evenly_in_native(power: int) -> Tensor:
        share = evenly(torch.ones(()), (data - clean) / (noise - clean), power)
        return -torch.logit(path.canonical(clean + (noise - clean) * share))

    ratios = torch.exp(-ends[:2])  # sigma / alpha
    rules: dict[str, Callable[[], Tensor]] = {
        "unif": lambda: evenly(ends[0], ends[1], 1),
        "unif_t": lambda: evenly_in_native(1),
        "quad": lambda: evenly_in_native(2),
        "edm": lambda: -evenly(ratios[0], ratios[1], 7).log(),
    }
    nodes = rules[init]()
    nodes[0] = low
    nodes[-1] = high
    return nodes


# --------------------------------------------------------------------------------------------------
# Objective
# --------------------------------------------------------------------------------------------------


def terms(lambdas: Tensor, path: GaussianPath, p: float) -> Tensor:
    """Return the weight of output s - n in step s, times that output's error, (..., 3, K).

    Steps have order 1, 2, 3, ..., 3, 2, 1. The rows n beyond a step's order are 0.

    Args:
        lambdas: (..., K+1) increasing log SNRs.
        path: alpha and sigma of the network.
        p: exponent of the assumed error.
    """
    # The assumed error sigma^p / alpha of each output.
    h = lambdas.diff(dim=-1)
    starts = lambdas[..., :-1]
    num_steps = h.shape[-1]
    t = torch.sigmoid(-starts)
    scale = path.scale(t)
    error = (t * scale) ** p / (torch.sigmoid(starts) * scale)  # 1 - t without cancellation

    # H_k = integral of u^k e^u from 0 to h; a, b: the two steps before (1 where there is none).
    h0 = torch.expm1(h)
    h1 = h * h.exp() - h0
    h2 = h**2 * h.exp() - 2 * h1
    b = pad(h, (1, 0), value=1.0)[..., :num_steps]
    a = pad(h, (2, 0), value=1.0)[..., :num_steps]
    zero = torch.zeros_like(h)

    # Integrals of the Lagrange basis over the newest 1, 2 or 3 outputs, newest first.
    first = torch.stack([h0, zero, zero], dim=-2)
    second = torch.stack([h0 + h1 / b, -h1 / b, zero], dim=-2)
    third = torch.stack(
        [
            (h2 + (2 * b + a) * h1 + b * (a + b) * h0) / (b * (a + b)),
            -(h2 + (a + b) * h1) / (a * b),
            (h2 + b * h1) / (a * (a + b)),
        ],
        dim=-2,
    )

    # The weights of each step's order.
    step = torch.arange(num_steps)
    order = 1 + torch.minimum(step, num_steps - 1 - step)
    weights = torch.where(order == 1, first, torch.where(order == 2, second, third))
    weights = weights * starts.exp().unsqueeze(-2)
    errors = [pad(error, (n, 0))[..., :num_steps] for n in range(3)]
    return weights * torch.stack(errors, dim=-2)


def parts(
    lambdas: Tensor, path: GaussianPath, p: float, separate_steps: int | None
) -> tuple[Tensor, Tensor]:
    """Return the smooth part (...) and the signed totals (..., K) of each output.

    See `objective`, which has the same arguments.
    """
    step_terms = terms(lambdas, path, p)
    num_steps = step_terms.shape[-1]
    step = torch.arange(num_steps)
    first = num_steps if separate_steps is None else separate_steps
    separate = (step < first) | (step == 0) | (step == num_steps - 1)

    # Norms of the separate steps.
    smooth = torch.linalg.vector_norm(step_terms[..., separate], dim=-2).sum(-1)

    # Sums of the other steps' terms over each output.
    shared = torch.where(separate, 0.0, step_terms)
    totals = (pad(shared[..., n, n:], (0, n)) for n in range(min(3, num_steps)))
    return smooth, sum(totals, shared.new_zeros(()))


def objective(lambdas: Tensor, path: GaussianPath, p: float, separate_steps: int | None) -> Tensor:
    """Return the error bound (...), as the authors' released code computes it.

    The first, the last and the first `separate_steps` steps count the Euclidean norm of
    their terms. Those of the others are added up for each output, where they may
    cancel, before the absolute value is taken.

    Args:
        lambdas: (..., K+1) increasing log SNRs, float64.
        path: alpha and sigma of the network.
        p: exponent of the assumed error.
        separate_steps: None means all steps.
    """
    smooth, totals = parts(lambdas, path, p, separate_steps)
    return smooth + totals.abs().sum(-1)


# --------------------------------------------------------------------------------------------------
# Optimum
# --------------------------------------------------------------------------------------------------


@torch.inference_mode(False)
@torch.enable_grad()
def linearise(
    lambdas: Tensor, path: GaussianPath, p: float, separate_steps: int | None
) -> tuple[Tensor, Tensor]:
    """Return the smooth part and the K totals, (1+K,), and their Jacobian (1+K, K+1).

    The arguments are those of `objective`, with lambdas (K+1,).
    """
    # A copy of the nodes for each value: one backward pass serves all.
    rows = lambdas.repeat(len(lambdas), 1).requires_grad_()
    smooth, totals = parts(rows, path, p, separate_steps)
    values = torch.cat([smooth[:, None], totals], dim=1)
    (jacobian,) = torch.autograd.grad(values.diagonal().sum(), rows)
    return values[0].detach(), jacobian


def optimise(lambdas: Tensor, path: GaussianPath, p: float, separate_steps: int | None) -> Tensor:
    """Return log SNRs (K+1,) with the same ends and a locally least `objective`.

    A descent on the absolute values gets stuck at their kinks. So each of them becomes
    a variable u_i that bounds its total from both sides, -u_i <= total_i <= u_i, and
    trust-constr has a smooth problem with exact derivatives. Spacings stay above a
    thousandth of their mean.

    Args:
        lambdas: (K+1,) increasing log SNRs to start from.
        path: alpha and sigma of the network.
        p: exponent of the assumed error.
        separate_steps: None means all steps.

    Raises:
        ValueError: two of the first log SNRs are too near, or the objective is not
            finite there.
    """
    num_steps = len(lambdas) - 1
    ends = lambdas[[0, -1]].numpy()
    least = 1e-3 * (ends[1] - ends[0]) / num_steps
    if not bool((lambdas.diff() > least).all()):
        raise ValueError(
            f"the optimiser needs {num_steps + 1} distinct log SNRs to start from, got "
            f"{lambdas.tolist()}; choose another init, fewer steps, or a sigma_min and sigma_max "
            "that the path reaches"
        )
    start = float(objective(lambdas, path, p, separate_steps))
    if not 0 < start < math.inf:
        raise ValueError(
            f"the objective is {start} for p = {p} and log SNRs {lambdas.tolist()}; "
            "choose a smaller p, a larger sigma_min or a smaller sigma_max"
        )
    if num_steps == 1:
        return lambdas
    inner = _minimum(lambdas, path, p, separate_steps, least, start)
    optimum = torch.tensor([ends[0], *inner, ends[1]], dtype=torch.float64)
    return optimum if objective(optimum, path, p, separate_steps) < start else lambdas


def _minimum(
    lambdas: Tensor,
    path: GaussianPath,
    p: float,
    separate_steps: int | None,
    least: float,
    scale: float,
) -> np.ndarray:
    """Return the inner nodes (K-1,) of a local minimum with spacings of `least` or more.

    The objective is divided by `scale`.
    """
    # Variables: the inner nodes, then a bound for each total that any step adds to.
    num_steps = len(lambdas) - 1
    ends = lambdas[[0, -1]].numpy()
    _, totals = parts(lambdas, path, p, separate_steps)
    rows = [0, *(1 + totals.nonzero()[:, 0]).tolist()]
    free = num_steps - 1
    bounds = len(rows) - 1

    @lru_cache(maxsize=1)
    def evaluate(inner: bytes) -> tuple[np.ndarray, np.ndarray]:
        nodes = torch.tensor([ends[0], *np.frombuffer(inner), ends[1]], dtype=torch.float64)
        values, jacobian = linearise(nodes, path, p, separate_steps)
        return (values[rows] / scale).numpy(), (jacobian[rows, 1:-1] / scale).numpy()

    def at(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return evaluate(x[:free].tobytes())

    def margins(x: np.ndarray) -> np.ndarray:
        totals = at(x)[0][1:]
        return np.concatenate([x[free:] - totals, x[free:] + totals])

    def margins_jacobian(x: np.ndarray) -> np.ndarray:
        jacobian = at(x)[1][1:]
        unit = np.eye(bounds)
        return np.block([[-jacobian, unit], [jacobian, unit]])

    # Constraints: spacings, and the bounds of the totals.
    spacing = np.diff(np.eye(num_steps + 1), axis=0)  # (K, K+1): nodes -> steps
    monotone = np.hstack([spacing[:, 1:-1], np.zeros((num_steps, bounds))])
    lowest: Any = least - spacing[:, [0, -1]] @ ends  # scipy annotates numbers only
    constraints: list[LinearConstraint | NonlinearConstraint] = [
        LinearConstraint(monotone, lowest, np.inf, keep_feasible=True)
    ]
    if bounds:
        jac: Any = margins_jacobian  # pyright infers text from scipy's default
        constraints.append(NonlinearConstraint(margins, 0, np.inf, jac=jac))

    # Descent.
    inner = lambdas[1:-1].numpy()
    with warnings.catch_warnings():
        # A step in the bounds alone, which enter linearly.
        warnings.filterwarnings("ignore", "delta_grad == 0.0")
        result = minimize(
            lambda x: at(x)[0][0] + x[free:].sum(),
            np.concatenate([inner, np.abs(at(inner)[0][1:])]),
            jac=lambda x: np.concatenate([at(x)[1][0], np.ones(bounds)]),
            method="trust-constr",
            constraints=constraints,
            options={"maxiter": 500},
        )
    return result.x[:free]
