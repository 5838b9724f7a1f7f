"""DPM2 of the k-diffusion family: the midpoint method in sigma, at a geometric mean."""

from dataclasses import dataclass

from torch import Tensor

from oss_exp.checks import require_range
from oss_exp.solvers.base import Singlestep, State
from oss_exp.tensors import rowwise
from oss_exp.velocity import VelocityFn


@dataclass(frozen=True)
class DPM2(Singlestep):
    """A second-order method that takes eps between the ends of a step and extrapolates it.

    See Karras et al. 2022, arXiv 2206.00364, appendix D.2 (its alpha is r). The steps
    from t = 1 and into t = 0, which have no geometric mean in sigma, are Euler's, with
    one call.

    Args:
        r: the second call is at sigma'^r sigma^(1-r); 1/2 is the midpoint of
            k-diffusion's DPM2.
    """

    order = 2

    r: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(at_least=0.01, at_most=1, r=self.r)

    def inner_step(self, f: VelocityFn, state: State, t_next: Tensor) -> Tensor:
        x = state.x
        v = state.outputs[0]
        start = state.t

        # Euler to the time between.
        sigma = (t_next / (1 - t_next)) ** self.r * (start / (1 - start)) ** (1 - self.r)
        middle = sigma / (1 + sigma)
        x_middle = self.euler(state, middle)

        # The change of eps, extrapolated to the whole step.
        v_middle = f(x_middle, middle)
        eps_change = x_middle + rowwise(1 - middle, x) * v_middle - x - rowwise(1 - start, x) * v
        gain = (t_next - start) / (1 - start) / (2 * self.r)
        return self.euler(state, t_next) + rowwise(gain, x) * eps_change
