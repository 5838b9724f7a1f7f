"""Pipelines of diffusers as models: their own loop gives velocities, samples and pictures."""

import inspect

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from helpers import mostly_slow
from models.pipelines import audio, edits, images, videos  # noqa: F401  (registers families)
from models.pipelines.parts import FAMILIES, Family

import oss_exp
from oss_exp.data.noise import HELD_OUT
from oss_exp.models.pipeline import Pipeline, decoded
from oss_exp.models.pipeline.calls import SuspendedCalls
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler, sample
from oss_exp.tasks.trajectories import Trajectories

QUICK = ("dit", "flux", "stable_audio", "stable_diffusion_3", "wan")


@pytest.fixture(scope="module", params=mostly_slow(FAMILIES, *QUICK))
def family(request) -> Family:
    torch.manual_seed(0)
    return FAMILIES[request.param]()


@pytest.fixture
def model(family):
    model = Pipeline(family.pipe, family.prompts, **family.call)
    yield model
    model.release()


def noises(model: Pipeline, seed: int = 0) -> torch.Tensor:
    count = len(model.prompts)
    return torch.randn(count, *model.event_shape, generator=torch.Generator().manual_seed(seed))


def start(model: Pipeline, noise: torch.Tensor, time: float) -> torch.Tensor:
    """Return the first state; a pipeline without latents gives its network the noise."""
    takes_latents = "latents" in inspect.signature(type(model.pipe).__call__).parameters
    one, _ = model.convention.network_input(torch.ones_like(noise), at(model, time))
    return noise * time if takes_latents else noise / one


def pipeline_output(
    family: Family, model: Pipeline, noise: torch.Tensor, num_steps: int, seed: int
) -> torch.Tensor:
    """Return what the pipeline makes of the noise of this seed with its present scheduler."""
    call = model.call | {
        model.calls.condition_argument: list(model.prompts),
        "num_inference_steps": num_steps,
        "output_type": "pt",
    }
    if "latents" not in inspect.signature(type(model.pipe).__call__).parameters:
        draws = torch.Generator().manual_seed(seed)
        return decoded(model.pipe(**call, generator=draws))

    draws = [torch.Generator().manual_seed(i) for i in range(len(noise))]  # as in our own calls
    latents = family.latents(first_latents(model, noise, num_steps), draws)
    return decoded(model.pipe(**call, latents=latents, generator=draws))


def first_latents(model: Pipeline, noise: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Scale the noise to the state with which the pipeline's scheduler begins."""
    scheduler = model.pipe.scheduler
    if isinstance(scheduler, oss_exp.OSSScheduler):
        return noise

    t = model.noise_schedule.nodes(num_steps)[0]
    latents, _ = model.convention.network_input(noise * float(t), t.expand(len(noise)))
    if isinstance(scheduler, EulerDiscreteScheduler):  # its states are larger than network inputs
        scheduler.set_timesteps(num_steps)
        latents = latents * (scheduler.sigmas[0] ** 2 + 1) ** 0.5 / scheduler.init_noise_sigma
    return latents


def at(model: Pipeline, time: float) -> torch.Tensor:
    return torch.full((len(model.prompts),), time, dtype=torch.float64)


def test_a_time_has_one_answer(family, model):
    """The order of the times, their number in a call and the call of the pipeline do not matter."""
    velocity = model.velocity(None)
    x = noises(model)
    first = velocity(x, at(model, 0.7))
    second = velocity(x, at(model, 0.3))

    assert first.shape == x.shape
    assert not torch.equal(first, second)

    other = Pipeline(family.pipe, family.prompts, **family.call)
    again = other.velocity(None)
    assert torch.equal(again(x, at(model, 0.3)), second)
    assert torch.equal(again(x, at(model, 0.7)), first)

    both = velocity(torch.cat([x, x]), torch.cat([at(model, 0.3), at(model, 0.7)]))
    assert torch.equal(both, torch.cat([second, first]))

    other.release()


def test_on_its_own_times_the_samples_are_the_pipelines_own(family, model):
    noise = noises(model)
    grid = model.noise_schedule.nodes(family.num_steps)
    x = start(model, noise, float(grid[0]))
    result = model.decode(sample(Euler(), model.velocity(None), x, StepSchedule(grid)))
    expected = pipeline_output(family, model, noise, family.num_steps, seed=0)

    assert result.shape == expected.shape
    assert float(expected.std()) > 1e-3
    torch.testing.assert_close(result, expected, rtol=0, atol=family.atol)


@pytest.fixture(scope="module")
def compared(family):
    """A searched schedule and the pipeline's own, compared on the noises of the search."""
    model = Pipeline(family.pipe, family.prompts, **family.call)
    noise = noises(model, seed=2)
    strategies = {
        "pipeline": oss_exp.ClosedForm(model.noise_schedule),
        "oss": oss_exp.OSSShared(start="pinned"),
    }
    comparison = oss_exp.compare(
        model,
        noise,
        num_steps=4,
        num_teacher_steps=12,
        solver=Euler(),
        held_out=noise,
        decode=lambda x0: x0,
        strategies=strategies,
    )
    model.release()
    return comparison


def test_a_searched_schedule_is_no_worse_than_the_pipelines_own(compared):
    means = {row["strategy"]: row["psnr"]["mean"] for row in compared.rows}
    assert means["oss"] >= means["pipeline"]


def test_a_searched_schedule_runs_in_the_pipeline(family, model, compared, monkeypatch):
    steps = compared.schedules["oss"][4]
    noise = noises(model, seed=1)
    x = start(model, noise, steps.start_time)
    expected = model.decode(sample(Euler(), model.velocity(None), x, steps))

    monkeypatch.setattr(family.pipe, "scheduler", steps.scheduler(family.pipe.scheduler))
    result = pipeline_output(family, model, noise, 4, seed=1)

    torch.testing.assert_close(result, expected, rtol=0, atol=family.atol)


def test_a_search_leaves_nothing_on_the_pipeline(family):
    scheduler = family.pipe.scheduler
    hooks = num_hooks(family)
    model = Pipeline(family.pipe, family.prompts, **family.call)

    oss_exp.search(model, num_steps=2, num_teacher_steps=4)

    assert family.pipe.scheduler is scheduler
    assert num_hooks(family) == hooks


def num_hooks(family: Family) -> list[int]:
    """Count the forward hooks of every network of the pipeline."""
    parts = family.pipe.components.values()
    return [len(part._forward_hooks) for part in parts if isinstance(part, torch.nn.Module)]


def test_recorded_predictions_are_decoded_in_a_call_of_their_own_prompts(monkeypatch):
    """Some pipelines paste the image of a sample in at their end."""
    family = images.stable_diffusion()
    model = Pipeline(family.pipe, family.prompts, **family.call)
    x0 = torch.randn(2, *model.event_shape)
    begun = []
    begin = SuspendedCalls.begin
    monkeypatch.setattr(
        SuspendedCalls,
        "begin",
        lambda calls, samples: begun.append(samples) or begin(calls, samples),
    )

    steps = StepSchedule(torch.tensor([1.0, 0.5, 0.0]))
    index, condition = torch.tensor([HELD_OUT + 5, HELD_OUT]), torch.tensor([0, 1])
    recorder = Trajectories(1).recorder("label", model, steps, index, condition)
    recorder(0, x0)
    assert begun == [(1,)]
