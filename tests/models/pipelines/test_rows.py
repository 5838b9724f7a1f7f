"""NFE of a pipeline: the rows that its denoiser really sees."""

import pytest
import torch
from models.pipelines.audio import longcat_audio
from models.pipelines.edits import control_net_stable_diffusion
from models.pipelines.images import chroma, flux, stable_diffusion
from models.pipelines.videos import ltx, wan, wan_two_experts

from oss_exp.models.pipeline import Pipeline
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler, nfe, sample


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "call", "rows"),
    [
        (flux, {}, 1),  # the guidance is an input of the network
        (stable_diffusion, {}, 2),  # a batch of twice the rows
        (stable_diffusion, {"guidance_scale": 1.0}, 1),
        (ltx, {}, 2),
        (wan, {}, 2),  # two calls
        (chroma, {}, 2),
        (longcat_audio, {}, 2),
        (wan_two_experts, {}, 2),
        (wan_two_experts, {"guidance_scale": 1.0}, 1),
        (control_net_stable_diffusion, {}, 2),  # a ControlNet is not the denoiser
    ],
)
def test_nfe_counts_the_rows_of_the_denoiser(make, call, rows):
    family = make()
    model = Pipeline(family.pipe, family.prompts, **family.call | call)
    steps = StepSchedule(torch.tensor([0.9, 0.6, 0.3, 0.0], dtype=torch.float64))
    velocity = model.velocity(None)
    assert nfe(Euler(), steps, velocity) == 3  # before the first call, one row a step
    sample(Euler(), velocity, torch.ones(2, *model.event_shape), steps)
    assert nfe(Euler(), steps, velocity) == 3 * rows
    model.release()
