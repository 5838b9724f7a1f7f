"""The layers of nodes that a search goes through, coarse to fine.

Legend: N+1 nodes counted from the noise, K steps, k one budget. Paths are (k, b), b = B
or 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oss_exp.checks import require_range
from oss_exp.schedule import StartKind
from oss_exp.stepsize.oss.required import Required


@dataclass(frozen=True)
class Band:
    """A coarse-to-fine search: a pilot on a coarse grid, then finer grids around its path.

    The stride is halved again and again down to 1. A coarse grid that is too small for
    all the steps is searched with fewer, and the path is stretched for the next level.
    A grid that leaves the pilot fewer than three nodes is searched whole.

    Args:
        stride: the pilot searches every stride-th node; a power of two.
        width: nodes of a level's stride on either side of the path that the level
            searches; twice as many at stride 1.
        shifts: where a path touches the border of its band, the band is laid around it
            and searched again, at most so many times for each level. Two double the
            calls, and with Euler steps find what the whole search finds.
    """

    stride: int = 8
    width: int = 1
    shifts: int = 0

    def __post_init__(self) -> None:
        if self.stride < 2 or self.stride & (self.stride - 1):
            raise ValueError(f"stride must be a power of two (2, 4, 8, ...), got {self.stride!r}")
        require_range(at_least=1, width=self.width)
        require_range(at_least=0, shifts=self.shifts)

    def fits(self, num_nodes: int) -> bool:
        """Return whether the pilot has the three nodes that it needs."""
        return num_nodes > 2 * self.stride

    def levels(self, num_nodes: int, num_steps: int) -> list[tuple[int, int]]:
        """Return (stride, steps) of the pilot and of each level after it.

        The last one is (1, num_steps).
        """
        pilot = len(range(0, num_nodes, self.stride))
        levels = [(self.stride, min(num_steps, pilot // 3))]
        stride = self.stride // 2
        while stride > 1:
            count = len(range(0, num_nodes, stride))
            levels.append((stride, min(num_steps, count // 2)))
            stride //= 2
        return [*levels, (1, num_steps)]

    def reach(self, stride: int) -> int:
        """Return how many nodes of this stride are searched on either side of the path."""
        return self.width if stride > 1 else 2 * self.width


def layers(
    num_nodes: int,
    budgets: Sequence[int],
    start: StartKind,
    stride: int,
    device,
    required: Required | None = None,
) -> list[Tensor]:
    """Return the layers of a search, max(budgets) times (W, 1).

    Layer r has every `stride`-th node, and the required ones, from which the data can
    be reached in exactly the calls that are left.

    Args:
        num_nodes: N.
        budgets: ascending numbers of steps.
        start: where a student begins; "pinned" leaves node 0 alone in the first layer.
        stride: distance between nodes.
        device: that of the layers.
        required: nodes that every path contains.
    """
    nodes = torch.arange(0, num_nodes, stride, device=device)[:, None]
    if required is not None:
        nodes = torch.cat([nodes[:, 0], required.nodes]).unique()[:, None]

    result = []
    for r in range(budgets[-1]):
        # Calls left for the nearest budget, this layer's included.
        calls_left = min(k for k in budgets if k > r) - r
        layer = nodes[r : len(nodes) - calls_left + 1] if r or start != "pinned" else nodes[:1]
        if required is not None:
            layer = required.layer(layer, r, budgets[-1] - r)
        result.append(layer)
    return result


def stretch(path: Tensor, num_steps: int, num_nodes: int) -> Tensor:
    """Return a path (num_steps, b) on the same curve of node against share of the steps.

    Args:
        path: (k, b) nodes.
        num_steps: steps of the new path.
        num_nodes: N.
    """
    k = len(path)
    closed = torch.cat([path, torch.full_like(path[:1], num_nodes)]).double()

    # Linear interpolation between the nodes.
    position = torch.arange(num_steps, device=path.device, dtype=torch.float64) * k / num_steps
    low = position.long()
    share = (position - low)[:, None]
    nodes = torch.lerp(closed[low], closed[low + 1], share).round().long()
    return torch.stack([strictly_monotone(column, num_nodes) for column in nodes.T], dim=1)


def strictly_monotone(nodes: Tensor, num_nodes: int) -> Tensor:
    """Return strictly ascending nodes within 0 to N-1, each moved as little as possible.

    Args:
        nodes: (k,) ascending, with repeats.
        num_nodes: N.
    """
    steps = torch.arange(len(nodes), device=nodes.device)
    risen = (nodes - steps).cummax(0).values + steps
    return torch.minimum(risen, num_nodes - len(nodes) + steps)
