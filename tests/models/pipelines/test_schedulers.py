"""A pipeline's velocity is its network's, whatever its scheduler's method."""

import diffusers
import pytest
import torch
from models.pipelines import images
from models.pipelines.parts import Family

from oss_exp.models.pipeline import Pipeline

METHODS = [
    ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    ("DDPMScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    ("HeunDiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("SASolverScheduler", {}),
    ("UniPCMultistepScheduler", {}),
]


@pytest.fixture(scope="module")
def family() -> Family:
    torch.manual_seed(0)
    return images.stable_diffusion()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "config"), METHODS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_velocity_does_not_depend_on_the_schedulers_method(family, method, config):
    """The nodes are distinct even where a scheduler repeats a whole timestep."""
    time = torch.tensor([0.5], dtype=torch.float64)
    original = family.pipe.scheduler
    answers = []

    for scheduler in (original, getattr(diffusers, method)(**images.SD_BETAS, **config)):
        family.pipe.scheduler = scheduler
        model = Pipeline(family.pipe, ["a red boot"], **family.call)
        x = torch.randn(1, *model.event_shape, generator=torch.Generator().manual_seed(0))
        answers.append(model.velocity(None)(x, time))
        for num_steps in (4, 50):
            assert len(model.noise_schedule.nodes(num_steps)) == num_steps + 1
        model.release()

    family.pipe.scheduler = original
    assert torch.equal(*answers)
