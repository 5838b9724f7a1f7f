"""Nodes that every path of a search contains: an expert's switch, or the first steps that a distilled model is given.

Legend: N+1 nodes counted from the noise, K steps; nodes of a layer are (W, b), sources (S, b), targets (J, b).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oss_exp.schedule import StartKind

SAME = 1e-6  # times nearer than this are one node


def with_nodes(grid: Tensor, times: Sequence[float]) -> Tensor:
    """Return the grid (N+1,) with these times among its nodes. Raises ValueError for one outside of it."""
    for time in times:
        if not 0 < time <= float(grid[0]) + SAME:
            raise ValueError(
                f"a search must visit t = {time:g}, and its teacher goes from {float(grid[0]):g} to 0; choose a time "
                "between these"
            )
        if float((grid - time).abs().min()) > SAME:
            grid = torch.cat([grid, grid.new_tensor([time])]).sort(descending=True).values
    return grid


@dataclass(frozen=True, eq=False)
class Required:
    """nodes (R,) ascending, of which the first `head` are the path's first nodes in their order.

    fewest: the steps that visit them all.
    """

    nodes: Tensor
    head: int
    fewest: int

    @classmethod
    def of(
        cls,
        grid: Tensor,
        must_visit: Sequence[float],
        first_times: Sequence[float],
        start: StartKind,
        num_steps: int,
    ) -> Required:
        """The nodes nearest to these times, for paths of so many steps or more. ValueError where there is no path."""
        asked = f"must_visit={[*must_visit]} and first_sigmas={[*first_times]}"
        first, others = (
            torch.tensor([int((grid - time).abs().argmin()) for time in times], dtype=torch.long)
            for times in (first_times, must_visit)
        )
        last = int(first[-1]) if len(first) else -1
        others = others[~torch.isin(others, first)].unique()
        nodes = torch.cat([first, others])
        if (
            bool((first.diff() < 1).any())
            or bool((nodes >= len(grid) - 1).any())
            or bool((others < last).any())
        ):
            raise ValueError(
                f"{asked} need nodes of their own, the first ones first and above all others; search with more "
                "teacher steps, or other times"
            )
        if start == "pinned" and last >= 0 and int(first[0]) != 0:
            raise ValueError(
                f"first_sigmas={[*first_times]} begin below the teacher's first time, {float(grid[0]):g}, at which a "
                "pinned start is; begin with it, or choose start=free or start=analytic"
            )
        count = len(nodes) + int(start == "pinned" and not bool((nodes == 0).any()))
        if count > num_steps or (num_steps - len(first) > len(grid) - 2 - last):
            raise ValueError(
                f"{asked}, with the start, are {count} nodes of the {num_steps} at which a schedule of {num_steps} "
                f"steps calls the network, between nodes {last + 1} and {len(grid) - 2}; search more steps, or ask for "
                "fewer nodes"
            )
        return cls(nodes.to(grid.device), len(first), count)

    def starts(self, sources: Tensor) -> Tensor:
        """(W, b) -> whether a path may begin there."""
        return self._before(sources) == 0

    def allowed(self, sources: Tensor, targets: Tensor) -> Tensor:
        """(S, J, b): edges that jump over no required node."""
        return self._before(targets)[None] == self._up_to(sources)[:, None]

    def layer(self, nodes: Tensor, step: int, calls_left: int) -> Tensor:
        """nodes (W, 1) ascending -> those at which a path may be, so many calls before its end, and contain all."""
        if step < self.head:
            return self.nodes[step].reshape(1, 1)
        ahead = len(self.nodes) - self._up_to(nodes)
        behind = self._before(nodes)
        return nodes[(behind >= self.head) & (behind <= step) & (ahead < calls_left)][:, None]

    def steps(self, wanted: int, stride: int, num_nodes: int) -> int:
        """As many steps as wanted, or as a path of every stride-th node and the required ones can make."""
        free = sum(node > self._last for node in range(0, num_nodes, stride))
        return max(self.fewest, min(wanted, self.head + free))

    def behind_the_head(self, nodes: Tensor) -> Tensor:
        """(k, b) ascending -> the same, with those after the first steps behind them."""
        step = torch.arange(len(nodes), device=nodes.device)[:, None]
        return torch.where(
            step < self.head, nodes, torch.maximum(nodes, self._last + 1 + step - self.head)
        )

    @property
    def _last(self) -> int:
        """The last of the first nodes."""
        return int(self.nodes[self.head - 1]) if self.head else -1

    def window(self, nodes: Tensor, step: int) -> Tensor:
        """nodes (W, b) of a band -> the same and the required ones."""
        if step < self.head:
            return self.nodes[step].expand(1, nodes.shape[1])
        return (
            torch.cat([nodes, self.nodes[self.head :, None].expand(-1, nodes.shape[1])])
            .sort(dim=0)
            .values
        )

    def fixed(self, nodes: Tensor) -> Tensor:
        """(b,) whether these must stay where they are."""
        return torch.isin(nodes, self.nodes)

    def _before(self, nodes: Tensor) -> Tensor:
        return torch.searchsorted(self.nodes, nodes.contiguous())

    def _up_to(self, nodes: Tensor) -> Tensor:
        return torch.searchsorted(self.nodes, nodes.contiguous(), right=True)
