"""Nodes that every path of a search must contain.

They are an expert's switch, or the first steps of a distilled model.

Legend: N+1 nodes counted from the noise, K steps. Nodes of a layer are (W, b), sources
(S, b), targets (J, b).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oss_exp.schedule import StartKind

SAME = 1e-6  # times nearer than this are one node


def with_nodes(grid: Tensor, times: Sequence[float]) -> Tensor:
    """Return the grid (N+1,) with these times among its nodes.

    Raises ValueError for a time outside of the grid.
    """
    for time in times:
        if not 0 < time <= float(grid[0]) + SAME:
            raise ValueError(
                f"a search must visit t = {time:g}, and its teacher goes from {float(grid[0]):g} "
                "to 0; choose a time between these"
            )
        if float((grid - time).abs().min()) > SAME:
            grid = torch.cat([grid, grid.new_tensor([time])]).sort(descending=True).values
    return grid


@dataclass(frozen=True, eq=False)
class Required:
    """Required nodes: a head of first nodes, and others that may come at any step.

    Args:
        nodes: (R,) ascending. The first `head` of them are the path's first nodes in
            this order.
        head: the number of given first nodes.
        fewest: the fewest steps that visit all of them.
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
        """Return the nodes nearest to some times, for paths of `num_steps` steps or more.

        Args:
            grid: (N+1,) the teacher's times.
            must_visit: times that may come at any step.
            first_times: the path's first times.
            start: where a student begins.
            num_steps: the fewest steps that will be searched.

        Raises:
            ValueError: no path contains all of these nodes.
        """
        # The nearest nodes.
        first = _nearest(grid, first_times)
        others = _nearest(grid, must_visit)
        others = others[~torch.isin(others, first)].unique()
        nodes = torch.cat([first, others])
        last = int(first[-1]) if len(first) else -1

        # Their order.
        times = f"must_visit={[*must_visit]} and first_sigmas={[*first_times]}"
        descends = bool((first.diff() < 1).any()) or bool((others < last).any())
        if descends or bool((nodes >= len(grid) - 1).any()):
            raise ValueError(
                f"{times} need nodes of their own, the first ones first and above all others; "
                "search with more teacher steps, or other times"
            )
        if start == "pinned" and last >= 0 and int(first[0]) != 0:
            raise ValueError(
                f"first_sigmas={[*first_times]} begin below the teacher's first time, "
                f"{float(grid[0]):g}, at which a pinned start is; begin with it, or choose "
                "start=free or start=analytic"
            )

        # Their number.
        count = len(nodes) + int(start == "pinned" and not bool((nodes == 0).any()))
        if count > num_steps or (num_steps - len(first) > len(grid) - 2 - last):
            raise ValueError(
                f"{times}, with the start, are {count} nodes of the {num_steps} at which a "
                f"schedule of {num_steps} steps calls the network, between nodes {last + 1} and "
                f"{len(grid) - 2}; search more steps, or ask for fewer nodes"
            )
        return cls(nodes.to(grid.device), len(first), count)

    def starts(self, sources: Tensor) -> Tensor:
        """Return whether a path may begin at each of the sources (W, b)."""
        return self._before(sources) == 0

    def allowed(self, sources: Tensor, targets: Tensor) -> Tensor:
        """Return whether each edge (S, J, b) jumps over no required node."""
        return self._before(targets)[None] == self._up_to(sources)[:, None]

    def layer(self, nodes: Tensor, step: int, calls_left: int) -> Tensor:
        """Return the nodes of a layer from which a path can still contain all required nodes.

        Args:
            nodes: (W, 1) ascending.
            step: the number of calls before this layer.
            calls_left: the calls to come, this layer's included.
        """
        if step < self.head:
            return self.nodes[step].reshape(1, 1)
        ahead = len(self.nodes) - self._up_to(nodes)
        behind = self._before(nodes)
        return nodes[(behind >= self.head) & (behind <= step) & (ahead < calls_left)][:, None]

    def steps(self, wanted: int, stride: int, num_nodes: int) -> int:
        """Return `wanted` steps, or as many as a path of every `stride`-th node can have.

        The required nodes are part of that path.
        """
        free = sum(node > self._last_of_head for node in range(0, num_nodes, stride))
        return max(self.fewest, min(wanted, self.head + free))

    def behind_the_head(self, nodes: Tensor) -> Tensor:
        """Return a path (k, b) whose nodes after the head are moved behind it."""
        step = torch.arange(len(nodes), device=nodes.device)[:, None]
        earliest = self._last_of_head + 1 + step - self.head
        return torch.where(step < self.head, nodes, torch.maximum(nodes, earliest))

    def window(self, nodes: Tensor, step: int) -> Tensor:
        """Return the nodes (W, b) of a band together with the required ones, ascending."""
        if step < self.head:
            return self.nodes[step].expand(1, nodes.shape[1])
        others = self.nodes[self.head :, None].expand(-1, nodes.shape[1])
        return torch.cat([nodes, others]).sort(dim=0).values

    def fixed(self, nodes: Tensor) -> Tensor:
        """Return whether each of the nodes (b,) must stay where it is."""
        return torch.isin(nodes, self.nodes)

    @property
    def _last_of_head(self) -> int:
        return int(self.nodes[self.head - 1]) if self.head else -1

    def _before(self, nodes: Tensor) -> Tensor:
        """Count the required nodes before each node."""
        return torch.searchsorted(self.nodes, nodes.contiguous())

    def _up_to(self, nodes: Tensor) -> Tensor:
        """Count the required nodes up to each node, itself included."""
        return torch.searchsorted(self.nodes, nodes.contiguous(), right=True)


def _nearest(grid: Tensor, times: Sequence[float]) -> Tensor:
    nodes = [int((grid - time).abs().argmin()) for time in times]
    return torch.tensor(nodes, dtype=torch.long)
