"""The midpoint method in sigma, at a geometric mean: "DPM2" of the k-diffusion family."""

from dataclasses import dataclass

from torch import Tensor

from oss_exp.checks import require_range
from oss_exp.solvers.base import Singlestep, State
from oss_exp.tensors import rowwise
from oss_exp.velocity import VelocityFn


@dataclass(frozen=True)
class DPM2(Singlestep):
    """Second order: eps is taken at sigma'^r sigma^(1-r) and extrapolated along the step (2206.00364, App. D.2, alpha).

    r = 1/2 is the midpoint of k-diffusion's DPM2. The steps from t = 1 and into t = 0, which have no geometric mean in
    sigma, are Euler's, with one call.
    """

    order = 2

    r: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(at_least=0.01, at_most=1, r=self.r)

    def inner_step(self, f: VelocityFn, state: State, t_next: Tensor) -> Tensor:
        x, v, start = state.x, state.outputs[0], state.t
        sigma = (t_next / (1 - t_next)) ** self.r * (start / (1 - start)) ** (1 - self.r)
        middle = sigma / (1 + sigma)
        x_middle = self.euler(state, middle)
        eps_change = (
            x_middle + rowwise(1 - middle, x) * f(x_middle, middle) - x - rowwise(1 - start, x) * v
        )
        return (
            self.euler(state, t_next)
            + rowwise((t_next - start) / (1 - start) / (2 * self.r), x) * eps_change
        )
