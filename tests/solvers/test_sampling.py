"""Running schedules: starts, counts of network calls, and steps with fitted weights."""

from dataclasses import replace

import pytest
import torch
from references import PINNED, difference, float64, run

from oss_exp.models.guidance import Guidance
from oss_exp.schedule import Analytic, FittedSteps, Free, SolverSteps, StepSchedule
from oss_exp.solvers import Euler, nfe, sample, walk
from oss_exp.solvers.adams_bashforth import AdamsBashforth
from oss_exp.solvers.dpm2 import DPM2
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.solvers.heun import Heun
from oss_exp.solvers.unipc import UniPC


def test_every_yielded_state_but_the_last_has_seen_the_network_at_its_own_time(velocity, gmm):
    states = list(walk(AdamsBashforth(2), velocity, gmm["z"], PINNED))
    assert [state.t[0].item() for state in states] == PINNED.tolist()
    for state in states[:-1]:
        assert torch.equal(state.outputs[0], velocity(state.x, state.t))
    assert states[-1].times[0][0] > 0


def test_a_free_start_uses_the_noise_as_it_is_and_an_analytic_one_saves_the_first_call(
    mixture, gmm
):
    label = torch.arange(16) % 10
    f = mixture.velocity(label)
    rest = float64(0.9, 0.4, 0)
    free = sample(Euler(), f, gmm["z"], StepSchedule(rest, Free()))
    assert torch.equal(free, run(Euler(), f, gmm["z"], rest))
    saved = sample(Euler(), f, gmm["z"], StepSchedule(rest, Analytic(gmm["means"])), group=label)
    full = sample(Euler(), f, gmm["z"], StepSchedule(float64(1, *rest)))

    assert difference(saved, full) < 1e-12


def test_a_per_sample_schedule_for_other_samples_is_refused(velocity, gmm):
    steps = StepSchedule(float64([1, 0], [0.9, 0]), Free(), samples=(0, 1))
    with pytest.raises(ValueError, match="2 samples, the noise has 3"):
        sample(Euler(), velocity, gmm["z"][:3], steps)


def test_nfe_is_that_of_the_sample_with_the_most_calls():
    steps = StepSchedule(float64([1, 0.5, 0], [0.9, 0.5, 0]), Free(), samples=(0, 1))
    assert nfe(Heun("sigma"), steps) == 3  # two, but three for the second sample
    assert nfe(Euler(), steps) == 2
    fitted = StepSchedule(PINNED, steps=FittedSteps(torch.ones(6, 4), torch.zeros(1, 64)))
    assert nfe(Heun("sigma"), fitted) == 6


# --------------------------------------------------------------------------------------------------
# Predictions of x0 on the way
# --------------------------------------------------------------------------------------------------


def watched(solver, f, noise, steps, **more) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The sample, and the predictions of x0 of its steps."""
    seen = []
    x0 = sample(
        solver, f, noise, steps, **more, watch=lambda step, clean: seen.append((step, clean))
    )
    assert [step for step, _ in seen] == list(range(steps.num_steps))
    return x0, [clean for _, clean in seen]


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize(
    "solver",
    [
        Euler(),
        Heun("t"),
        DPM2(0.5),
        DPMSolverPP(2, False),
        AdamsBashforth(2),
        UniPC(2, "bh2", False),
    ],
)
def test_a_watch_sees_what_the_network_predicts_at_each_step_and_costs_no_call(
    solver, guidance, mixture, gmm
):
    f = mixture.velocity(torch.arange(16) % 10, Guidance(guidance))
    steps = StepSchedule(PINNED)
    asked = []

    def counted(x, t, condition):
        asked.append((x, t))
        return f.fn(x, t, condition)

    plain = sample(solver, replace(f, fn=counted), gmm["z"], steps)
    calls = list(asked)
    found, seen = watched(solver, replace(f, fn=counted, micro_batch=5), gmm["z"], steps)
    assert difference(found, plain) < 1e-12
    assert sum(len(x) for x, _ in asked) == 2 * sum(len(x) for x, _ in calls)
    own = [
        next(x for x, at in calls[::-1] if at[0] == t) for t in PINNED[:-1]
    ]  # after any call within a step

    for x, t, clean in zip(own, PINNED, seen, strict=False):
        assert difference(clean, x - t * f(x, t.expand(16))) < 1e-12
    if not isinstance(solver, AdamsBashforth | UniPC):
        assert difference(seen[-1], found) < 1e-14, "their step into t = 0 is Euler's"


def test_a_watch_of_fitted_steps_sees_the_networks_predictions(mixture, gmm):
    label = torch.arange(16) % 10
    f = mixture.velocity(label, Guidance(1.5))
    fitted = spelled_out(DPMSolverPP(1, lower_order_final=False), PINNED, f.mix)
    steps = StepSchedule(PINNED, steps=FittedSteps(fitted, gmm["means"]))
    found, seen = watched(Euler(), f, gmm["z"], steps, group=label)
    assert difference(seen[-1], found) < 1e-14
    plain, same = watched(
        Euler(), lambda x, t: f(x, t), gmm["z"], StepSchedule(PINNED)
    )  # a plain function

    assert torch.equal(plain, same[-1])
    assert max(difference(a, b) for a, b in zip(seen, same, strict=True)) < 1e-13


# --------------------------------------------------------------------------------------------------
# Fitted weights
# --------------------------------------------------------------------------------------------------


def spelled_out(solver, times, mix=(1.0,)) -> torch.Tensor:
    """The weights over x, noise, mean and the predictions of x0 with which a run is one of this solver's."""
    orders = solver.orders(len(times) - 1)
    weights = torch.zeros(len(orders), 3 + solver.order * len(mix), dtype=torch.float64)
    for step, order in enumerate(orders):
        known = [times[step - h] for h in range(order)]
        weights[step, 0], b = solver.coefficients(known, times[step + 1])
        weights[step, 3 : 3 + order * len(mix)] = torch.outer(
            torch.stack(b), float64(*mix)
        ).flatten()
    return weights


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_weights_that_spell_out_a_solver_give_what_it_gives(order, guidance, mixture, gmm):
    """Order 1 is Euler's. Under guidance the network's answers have a weight each, and the solver mixes them first."""
    solver = DPMSolverPP(order, lower_order_final=False)
    label = torch.arange(16) % 10
    f = mixture.velocity(label, Guidance(guidance))
    weights = spelled_out(solver, PINNED, (1.0,) if guidance == 1 else f.mix)
    found = sample(
        Euler(),
        f,
        gmm["z"],
        StepSchedule(PINNED, steps=FittedSteps(weights, gmm["means"])),
        group=label,
    )

    assert difference(found, run(solver, f, gmm["z"], PINNED)) < 1e-13
    if order == 1:
        assert difference(found, run(Euler(), f, gmm["z"], PINNED)) < 1e-13


def test_the_weights_of_noise_and_mean(velocity, gmm):
    """The analytic jump, at every step anew; the network is called all the same."""
    weights = torch.stack([torch.zeros(6), PINNED[1:], 1 - PINNED[1:], torch.zeros(6)], dim=1)
    label = torch.arange(16) % 10
    steps = StepSchedule(float64(0.9, 0), Free(), steps=FittedSteps(weights[-1:], gmm["means"]))
    assert torch.equal(sample(Euler(), velocity, gmm["z"], steps, group=label), gmm["means"][label])
    steps = StepSchedule(PINNED, steps=FittedSteps(weights, gmm["means"]))
    assert torch.equal(sample(Euler(), velocity, gmm["z"], steps, group=label), gmm["means"][label])


def test_stored_orders_need_a_solver_that_takes_them(velocity, gmm):
    steps = StepSchedule(PINNED, steps=SolverSteps(torch.ones(len(PINNED) - 1, dtype=torch.long)))
    with pytest.raises(ValueError, match="takes none; choose run_orders=fixed"):
        sample(Heun("t"), velocity, gmm["z"], steps)
