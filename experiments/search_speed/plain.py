"""Algorithm 1 of the OSS paper (arXiv 2503.21774) as a research script would write it.

This is the yardstick for the library's speed. One sample at a time, the network batched over the
nodes, every candidate of every round materialised. Each round fills a fresh row (exactly k steps),
so that its schedules can be compared with the library's one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def search(velocity, noise: Tensor, grid: Tensor, num_steps: int) -> list[list[int]]:
    """Search a schedule for every sample.

    Args:
        velocity: v = velocity(x (M, *E), t (M,)).
        noise: Samples (B, *E).
        grid: Times (N+1,), decreasing.
        num_steps: Number of steps K.

    Returns:
        The K nodes of every sample, noise first.
    """
    return [search_one(velocity, z, grid, num_steps) for z in noise]


def search_one(velocity, z: Tensor, grid: Tensor, num_steps: int) -> list[int]:
    """Return the K nodes of one sample (*E)."""
    end = len(grid) - 1
    times = grid.to(z.dtype)

    # Teacher.
    teacher = [z]
    for i in range(end):
        v = velocity(teacher[-1][None], grid[i : i + 1])[0]
        teacher.append(teacher[-1] + (times[i + 1] - times[i]) * v)
    teacher = torch.stack(teacher)

    # Rounds.
    state = z.expand(end, *z.shape)
    reached = torch.ones(end, dtype=torch.bool)
    later = torch.arange(end)[:, None] < torch.arange(end + 1)[None]
    parents = []
    for _ in range(num_steps):
        v = velocity(state, grid[:-1])
        step = (times[None] - times[:-1, None]).reshape(end, end + 1, *[1] * z.ndim)
        candidates = state[:, None] + step * v[:, None]  # (N, N+1, *E)
        cost = (candidates - teacher[None]).square().flatten(2).mean(2)
        cost = cost.masked_fill(~(later & reached[:, None]), torch.inf)
        best, parent = cost.min(0)
        parents.append(parent)
        state = candidates[parent, torch.arange(end + 1)][:end]
        reached = best[:end].isfinite()

    # Backtrack.
    path = []
    node = end
    for parent in reversed(parents):
        node = int(parent[node])
        path.append(node)
    return path[::-1]
