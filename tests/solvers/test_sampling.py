"""Sampling a schedule: its start, its network calls, and steps with fitted weights."""

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


def test_a_free_start_uses_the_noise_as_it_is(velocity, gmm):
    times = float64(0.9, 0.4, 0)
    free = sample(Euler(), velocity, gmm["z"], StepSchedule(times, Free()))
    assert torch.equal(free, run(Euler(), velocity, gmm["z"], times))


def test_an_analytic_start_saves_the_first_call(mixture, gmm):
    label = torch.arange(16) % 10
    f = mixture.velocity(label)
    times = float64(0.9, 0.4, 0)
    saved = sample(Euler(), f, gmm["z"], StepSchedule(times, Analytic(gmm["means"])), group=label)
    full = sample(Euler(), f, gmm["z"], StepSchedule(float64(1, *times)))

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
    """Return the sample and each step's prediction of x0."""
    predictions = []

    def watch(step, prediction):
        assert step == len(predictions)
        predictions.append(prediction)

    x0 = sample(solver, f, noise, steps, **more, watch=watch)
    assert len(predictions) == steps.num_steps
    return x0, predictions


every_guidance = pytest.mark.parametrize("guidance", [1.0, 1.5])
watched_solvers = pytest.mark.parametrize(
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


@every_guidance
@watched_solvers
def test_a_watch_costs_no_call_and_changes_no_sample(solver, guidance, mixture, gmm):
    f = mixture.velocity(torch.arange(16) % 10, Guidance(guidance))
    rows = []

    def counted(x, t, condition):
        rows.append(len(x))
        return f.fn(x, t, condition)

    plain = sample(solver, replace(f, fn=counted), gmm["z"], StepSchedule(PINNED))
    plain_rows = sum(rows)
    rows.clear()
    micro_batches = replace(f, fn=counted, micro_batch=5)
    x0, _ = watched(solver, micro_batches, gmm["z"], StepSchedule(PINNED))

    assert difference(x0, plain) < 1e-12
    assert sum(rows) == plain_rows


@every_guidance
@watched_solvers
def test_a_watch_sees_what_the_network_predicts_at_each_step(solver, guidance, mixture, gmm):
    f = mixture.velocity(torch.arange(16) % 10, Guidance(guidance))
    inputs = {}

    def recorded(x, t, condition):
        inputs[float(t[0])] = x  # the last call at this time comes after any within a step
        return f.fn(x, t, condition)

    steps = StepSchedule(PINNED)
    x0, predictions = watched(solver, replace(f, fn=recorded), gmm["z"], steps)

    for t, prediction in zip(PINNED, predictions, strict=False):
        x = inputs[float(t)]
        assert difference(prediction, x - t * f(x, t.expand(16))) < 1e-12
    if not isinstance(solver, AdamsBashforth | UniPC):
        assert difference(predictions[-1], x0) < 1e-14, "their step into t = 0 is Euler's"


def test_a_watch_of_fitted_steps_sees_the_networks_predictions(mixture, gmm):
    label = torch.arange(16) % 10
    f = mixture.velocity(label, Guidance(1.5))
    fitted = weights_of(DPMSolverPP(1, lower_order_final=False), PINNED, f.mix)
    steps = StepSchedule(PINNED, steps=FittedSteps(fitted, gmm["means"]))
    x0, predictions = watched(Euler(), f, gmm["z"], steps, group=label)
    assert difference(predictions[-1], x0) < 1e-14

    # A plain function.
    plain, expected = watched(Euler(), lambda x, t: f(x, t), gmm["z"], StepSchedule(PINNED))

    assert torch.equal(plain, expected[-1])
    assert max(difference(a, b) for a, b in zip(predictions, expected, strict=True)) < 1e-13


# --------------------------------------------------------------------------------------------------
# Fitted weights
# --------------------------------------------------------------------------------------------------


def weights_of(solver, times, mix=(1.0,)) -> torch.Tensor:
    """Return the weights over x, noise, mean and predictions that make this solver's steps."""
    orders = solver.orders(len(times) - 1)
    weights = torch.zeros(len(orders), 3 + solver.order * len(mix), dtype=torch.float64)
    for step, order in enumerate(orders):
        past_times = [times[step - h] for h in range(order)]
        weights[step, 0], b = solver.coefficients(past_times, times[step + 1])
        over_outputs = torch.outer(torch.stack(b), float64(*mix))
        weights[step, 3 : 3 + order * len(mix)] = over_outputs.flatten()
    return weights


@every_guidance
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_solvers_weights_give_its_samples(order, guidance, mixture, gmm):
    """Order 1 is Euler's. Under guidance each of the network's two outputs has its weight."""
    solver = DPMSolverPP(order, lower_order_final=False)
    label = torch.arange(16) % 10
    f = mixture.velocity(label, Guidance(guidance))
    weights = weights_of(solver, PINNED, (1.0,) if guidance == 1 else f.mix)
    steps = StepSchedule(PINNED, steps=FittedSteps(weights, gmm["means"]))

    result = sample(Euler(), f, gmm["z"], steps, group=label)

    assert difference(result, run(solver, f, gmm["z"], PINNED)) < 1e-13
    if order == 1:
        assert difference(result, run(Euler(), f, gmm["z"], PINNED)) < 1e-13


def test_weights_of_noise_and_mean_alone_give_the_mean_at_0(velocity, gmm):
    """Every step is an analytic jump; the network is called all the same."""
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
