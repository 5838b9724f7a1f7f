"""Pipelines of diffusers as models: their own loop gives the velocities, the samples and the pictures."""

import inspect

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from models.pipelines import audio, edits, images, videos  # noqa: F401  (they register their families)
from models.pipelines.parts import FAMILIES, Family

import oss_exp
from oss_exp.models.pipeline import Pipeline, decoded
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler, sample

QUICK = {
    "dit",
    "flux",
    "stable_audio",
    "stable_diffusion_3",
    "wan",
}  # all others together take a minute


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in FAMILIES
    ],
)
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
    """The state x at the first time; where a pipeline takes no latents, what its network gets is the noise itself."""
    takes_latents = "latents" in inspect.signature(type(model.pipe).__call__).parameters
    one, _ = model.convention.network_input(torch.ones_like(noise), at(model, time))
    return noise * time if takes_latents else noise / one


def pipeline_output(
    family: Family, model: Pipeline, noise: torch.Tensor, num_steps: int, seed: int
) -> torch.Tensor:
    """What the pipeline makes of the noise of this seed with the scheduler that it has."""
    scheduler = model.pipe.scheduler
    latents = noise
    if not isinstance(scheduler, oss_exp.OSSScheduler):
        t = model.noise_schedule.nodes(num_steps)[0]
        latents, _ = model.convention.network_input(noise * float(t), t.expand(len(noise)))
        if isinstance(
            scheduler, EulerDiscreteScheduler
        ):  # its states are larger than what the network gets
            scheduler.set_timesteps(num_steps)
            latents = latents * (scheduler.sigmas[0] ** 2 + 1) ** 0.5 / scheduler.init_noise_sigma

    draws = [torch.Generator().manual_seed(i) for i in range(len(noise))]  # as in our own calls
    call = {"latents": family.latents(latents, draws), "generator": draws}
    if "latents" not in inspect.signature(type(model.pipe).__call__).parameters:
        call = {"generator": torch.Generator().manual_seed(seed)}
    call |= {
        model.calls.condition_argument: list(model.prompts),
        "num_inference_steps": num_steps,
        "output_type": "pt",
    }

    return decoded(model.pipe(**call | model.call))


def at(model: Pipeline, time: float) -> torch.Tensor:
    return torch.full((len(model.prompts),), time, dtype=torch.float64)


def test_a_time_has_one_answer(family, model):
    """In another call of the pipeline, in another order, and several times in a call."""
    velocity = model.velocity(None)
    x = noises(model)
    first, second = (velocity(x, at(model, time)) for time in (0.7, 0.3))

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
    result = model.decode(
        sample(
            Euler(), model.velocity(None), start(model, noise, float(grid[0])), StepSchedule(grid)
        )
    )
    expected = pipeline_output(family, model, noise, family.num_steps, seed=0)

    assert result.shape == expected.shape
    assert float(expected.std()) > 1e-3
    torch.testing.assert_close(result, expected, rtol=0, atol=family.atol)


def test_a_searched_schedule_runs_in_the_pipeline(family, model):
    """On the noises of the search, in the latents that it looks at, it is at least as good as the pipeline's own."""
    compared = oss_exp.compare(
        model,
        noises(model, seed=2),
        num_steps=4,
        num_teacher_steps=12,
        solver=Euler(),
        held_out=noises(model, seed=2),
        decode=lambda x0: x0,
        strategies={
            "own": oss_exp.ClosedForm(model.noise_schedule),
            "oss": oss_exp.OSSShared(start="pinned"),
        },
    )

    means = {row["strategy"]: row["psnr"]["mean"] for row in compared.rows}
    assert means["oss"] >= means["own"]

    steps = compared.schedules["oss"][4]
    noise = noises(model, seed=1)
    expected = model.decode(
        sample(Euler(), model.velocity(None), start(model, noise, steps.start_time), steps)
    )

    before = family.pipe.scheduler
    family.pipe.scheduler = steps.scheduler(before)

    try:
        result = pipeline_output(family, model, noise, 4, seed=1)
    finally:
        family.pipe.scheduler = before

    torch.testing.assert_close(result, expected, rtol=0, atol=family.atol)


def test_nothing_is_left(family):
    pipeline_output = family.pipe.scheduler
    hooks = [len(part._forward_hooks) for part in parts(family)]
    oss_exp.search(
        Pipeline(family.pipe, family.prompts, **family.call), num_steps=2, num_teacher_steps=4
    )
    assert family.pipe.scheduler is pipeline_output
    assert [len(part._forward_hooks) for part in parts(family)] == hooks


def parts(family: Family) -> list[torch.nn.Module]:
    return [part for part in family.pipe.components.values() if isinstance(part, torch.nn.Module)]
