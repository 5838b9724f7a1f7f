"""The dynamic program of OSS (arXiv 2503.21774, Algorithms 1 and 2).

The teacher runs N small steps and leaves N+1 nodes: times t_0 > ... > t_N = 0, with its
state T_j at each (X_j in docs/concepts.md). A student takes K large steps from node to
node. This file finds the K nodes at which the student should call the network so that
it ends near T_N.

The words are those of dynamic programming:

    state   (r, j): a student stands at node j after r steps. One state of the sampler, x
            with the solver's memory, is kept for it: that of the best path so far.
    action  An edge of the graph, which is a step from one node to any later one, taken by
            one rule: a solver's step of some order (`edges.py`).
    parent  The node from which the best action comes.
    cost    The distance of the student's x to T_j after the step, by `Problem.distance`.
            It is not a sum over the path: only the state where a path stands counts.
    stage   Stage r fills the table of all states (r, j) from those of stage r-1.
            (docs/concepts.md calls it round r.)
    budget  k, a number of steps to find a path for. One run serves several.

Stage 0 is the start, before any network call. A free start puts the noise, as it is, at
every node of layer 0 (below). A pinned one puts it at node 0 only. An analytic one jumps
from the noise towards the mean of the data, to every node of layer 0.

Stage r works as follows. The network is called once at every source, which is a node of
stage r-1. For every target j, all legal actions are scored: each source before j, with
each order that its history allows. The cheapest one is taken, and its end, parent,
order and cost become the entry of j. Where k is a budget, node N is one of the targets of
stage k, and following the parents back from it gives the schedule.

Example: N = 4, K = 2, a start pinned to node 0, Euler steps.

    stage 1   source 0           targets 1, 2, 3    one action each: 0->1, 0->2, 0->3
    stage 2   sources 1, 2, 3    target 4           three actions: 1->4, 2->4, 3->4

If 2->4 ends nearest to T_4, then 4 has parent 2, 2 has parent 0, and the student calls
the network at nodes 0 and 2. The program needs the network at nodes 0, 1, 2 and 3. The
call at node 0 is the teacher's own first one, so three calls are new.

Every stage begins with an empty table, so a path of k stages has exactly k steps, and a
student that runs the schedule ends as far from T_N as the table says. The program is
greedy: a state keeps one x, the nearest to T_j, although another might end nearer to
T_N. `refine.py` repairs some of that.

A full search, a coarse pilot and a narrow band differ only in their `layers`: layer r has
the nodes at which a student may stand after r steps. One schedule for each sample, and
one that all samples share, differ only in the `Objective`, which says over which samples
a minimum is taken.

Legend: B samples, k steps of a path, W nodes of a layer (S as sources, J as targets).
Arrays of nodes are (W, b), where b is B, or 1 where all samples have the same entries; it
may differ from one array to the next. Nodes ascend from noise to data along W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oss_exp.schedule import StartKind, analytic_jump
from oss_exp.solvers.base import LinearMultistep, State
from oss_exp.stepsize.oss.edges import Edges, LinearEdges, TriedEdges
from oss_exp.stepsize.oss.objectives import Objective
from oss_exp.stepsize.oss.required import Required
from oss_exp.stepsize.problem import Problem


@dataclass(frozen=True, eq=False)
class SolverPath:
    """The path of a student whose steps are a solver's.

    Attributes:
        nodes: (k, b) nodes of its network calls.
        orders: (k, b) orders of its steps.
        costs: (k, B) distance of each sample to the teacher after every step.
    """

    nodes: Tensor
    orders: Tensor
    costs: Tensor


@dataclass(frozen=True, eq=False)
class Stage:
    """The table of one stage: the best action into each of its targets.

    The samplers' states are not in it. `Edges` holds them, for the newest stage only.

    Attributes:
        sources: (S, b) nodes that the steps start from.
        targets: (J, b) nodes that the steps lead to.
        parent: (J, b) position, among the sources, of the one where the best step starts.
        orders: (J, b) order of that step.
        cost: (J, B) distance to the teacher after it; infinite where no path leads.
    """

    sources: Tensor
    targets: Tensor
    parent: Tensor
    orders: Tensor
    cost: Tensor


@dataclass(frozen=True, eq=False)
class Solution:
    """The result of the dynamic program.

    Attributes:
        paths: the best path of every budget k.
        costs: (B,) final distance of the path of every budget k, measured at its last x.
        stages: the tables of stages 1, 2, ...
    """

    paths: dict[int, SolverPath]
    costs: dict[int, Tensor]
    stages: list[Stage]


@torch.no_grad()
def recurse(
    problem: Problem,
    layers: Sequence[Tensor],
    budgets: Sequence[int],
    start: StartKind,
    objective: Objective,
    required: Required | None = None,
) -> Solution:
    """Run the dynamic program for several budgets at once.

    Args:
        problem: what the student should come close to.
        layers: legal nodes (W, b) after r steps, for r = 0, ..., max(budgets) - 1. Node
            N is in none of them; it is added to the targets of stage k for every budget
            k.
        budgets: numbers of steps to solve for.
        start: where a student begins.
        objective: what the samples' costs become before the minimum is taken.
        required: nodes over which no step may jump.
    """
    end = problem.num_nodes  # node N
    edges = _edges(problem, layers, objective)
    stages: list[Stage] = []
    paths: dict[int, SolverPath] = {}
    costs: dict[int, Tensor] = {}

    # Stage 0: the nodes at which a path may begin.
    sources = layers[0]
    reachable = torch.ones_like(sources, dtype=torch.bool)
    if required is not None:
        reachable = required.starts(sources)
    edges.begin(sources, start_states(problem, sources, start))

    for r in range(1, len(layers) + 1):
        edges.observe(sources, reuse_first=r == 1)

        # Targets: the nodes of the next layer, and node N where r is a budget.
        closing = r in budgets
        inner = layers[r] if r < len(layers) else sources[:0]
        width = max(inner.shape[1], sources.shape[1])
        final = inner.new_full((int(closing), width), end)
        targets = torch.cat([inner.expand(-1, width), final])

        # Legal actions (S, J, b) go towards the data, from sources that a path reaches.
        legal = (sources[:, None] < targets[None]) & reachable[:, None]
        if required is not None:
            legal &= required.allowed(sources, targets)

        # Take the best action into every target; `edges` then holds the states there.
        parent, orders, cost = edges.choose(targets, legal)
        reachable = legal.any(0)
        cost = cost.masked_fill(~reachable, torch.inf)
        stages.append(Stage(sources, targets, parent, orders, cost))

        # Close a budget: node N is the last target.
        if closing:
            final_x = edges.state.x[-len(problem.noise) :]
            paths[r] = _trace(stages)
            costs[r] = problem.cost(final_x, torch.tensor([end], device=targets.device))

        # The other targets are the sources of the next stage.
        sources = inner
        reachable = reachable[: len(inner)]
        edges.keep_first(len(inner) * len(problem.noise))
    return Solution(paths, costs, stages)


def _edges(problem: Problem, layers: Sequence[Tensor], objective: Objective) -> Edges:
    """Return the quickest way to score the actions of this problem."""
    if not (isinstance(problem.solver, LinearMultistep) and problem.distance.quadratic):
        return TriedEdges(problem, objective)
    target_nodes = [layer.flatten() for layer in layers[1:]]
    target_nodes.append(layers[0].new_tensor([problem.num_nodes]))
    return LinearEdges(problem, objective, torch.cat(target_nodes).unique())


def start_states(problem: Problem, nodes: Tensor, start: StartKind) -> State:
    """Return the states (W*B,) of students that begin at nodes (W, b), before any network call."""
    count = len(problem.noise)
    t = problem.grid[nodes].expand(-1, count)
    x = problem.noise.expand(len(nodes), *problem.noise.shape).flatten(0, 1)
    if start == "analytic":
        mean = problem.teacher.sample_mean.repeat(len(nodes), *[1] * (x.ndim - 1))
        x = analytic_jump(x, mean, float(problem.grid[0]), t.flatten())
    return problem.solver.init(x, t.flatten())


def _trace(stages: Sequence[Stage]) -> SolverPath:
    """Follow the parents back from node N, the last target of the last stage.

    The sources of a stage are the first targets of the stage before it, so a position
    among them is a row of that stage's table.
    """
    last_stage = stages[-1]
    position = torch.full_like(last_stage.targets[-1], len(last_stage.targets) - 1)
    nodes, orders, costs = [], [], []
    for stage in reversed(stages):
        costs.append(_entries(stage.cost, position))
        orders.append(_entries(stage.orders, position))
        position = _entries(stage.parent, position)
        nodes.append(_entries(stage.sources, position))
    return SolverPath(_stacked(nodes), _stacked(orders), _stacked(costs))


def _entries(table: Tensor, position: Tensor) -> Tensor:
    """Return the entries of a table (W, b) that lie, for each sample, in row position (b,)."""
    width = max(table.shape[1], len(position))
    return table.expand(-1, width).gather(0, position.expand(width)[None])[0]


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    """Return k rows (b,), which come last step first, as (k, b) in the order of the steps."""
    return torch.stack(torch.broadcast_tensors(*reversed(rows)))
