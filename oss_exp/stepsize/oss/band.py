"""Coarse to fine: the layers of nodes that a search goes through.

Legend: N+1 nodes counted from the noise, K steps, k one budget; paths are (k, b), b = B or 1.
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
    """Coarse to fine: search every `stride`-th node, then halve the stride again and again down to 1, each time among
    the `width` nearest nodes of that stride on either side of the path so far, and twice as many at stride 1.

    Coarse grids too small for all the steps are searched with fewer, and the path is stretched for the next; a grid
    that leaves the pilot fewer than three nodes is searched whole. Where a path touches the edge of its band, the band
    is laid around it anew and searched again, at most `shifts` times a level: 2 double the calls, and with Euler steps
    find what the whole search finds.
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
        """Whether the pilot has the three nodes that it needs."""
        return num_nodes > 2 * self.stride

    def levels(self, num_nodes: int, num_steps: int) -> list[tuple[int, int]]:
        """(stride, steps) of the pilot and of each level after it, the last (1, num_steps)."""
        pilot = len(range(0, num_nodes, self.stride))
        levels = [(self.stride, min(num_steps, pilot // 3))]
        for level in range(1, self.stride.bit_length()):
            stride = self.stride >> level
            levels.append(
                (
                    stride,
                    min(num_steps, len(range(0, num_nodes, stride)) // 2)
                    if stride > 1
                    else num_steps,
                )
            )
        return levels

    def reach(self, stride: int) -> int:
        """Nodes of this stride on either side of the path."""
        return self.width if stride > 1 else 2 * self.width


def layers(
    num_nodes: int,
    budgets: Sequence[int],
    start: StartKind,
    stride: int,
    device,
    required: Required | None = None,
) -> list[Tensor]:
    """max(budgets) x (W, 1): every stride-th node from which the data can be reached in exactly the calls left.

    Required nodes are among them, and those are not from which a path could not contain them all.
    """
    nodes = torch.arange(0, num_nodes, stride, device=device)[:, None]
    if required is not None:
        nodes = torch.cat([nodes[:, 0], required.nodes]).unique()[:, None]
    result = []
    for r in range(budgets[-1]):
        to_go = (
            min(k for k in budgets if k > r) - r
        )  # calls left, this one included, for the nearest budget
        layer = nodes[r : len(nodes) - to_go + 1] if r or start != "pinned" else nodes[:1]
        result.append(layer if required is None else required.layer(layer, r, budgets[-1] - r))
    return result


def stretch(path: Tensor, num_steps: int, num_nodes: int) -> Tensor:
    """path (k, b) of k steps over N nodes -> (num_steps, b): the same curve of node against share of the steps."""
    k = len(path)
    closed = torch.cat([path, torch.full_like(path[:1], num_nodes)]).double()
    at = torch.arange(num_steps, device=path.device, dtype=torch.float64) * k / num_steps
    low = at.long()
    between = torch.lerp(closed[low], closed[low + 1], (at - low)[:, None]).round().long()
    return torch.stack([strictly_monotone(column, num_nodes) for column in between.T], dim=1)


def strictly_monotone(nodes: Tensor, num_nodes: int) -> Tensor:
    """nodes (k,) ascending with repeats -> strictly ascending within 0 .. N-1, each moved as little as may be."""
    steps = torch.arange(len(nodes), device=nodes.device)
    risen = (nodes - steps).cummax(0).values + steps
    return torch.minimum(risen, num_nodes - len(nodes) + steps)
