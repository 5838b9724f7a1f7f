"""A schedule records how far the pipeline's rounding of its clock moves the steps."""

import pytest
import torch
from models.pipelines.images import aura_flow, flux, stable_diffusion
from models.pipelines.videos import ltx_image_to_video

import oss_exp
from oss_exp import Euler, OSSShared
from oss_exp.models.pipeline import Pipeline


@pytest.mark.parametrize("make", [flux, aura_flow])
def test_a_clock_in_bfloat16_is_rounded(make):
    family = make()
    family.pipe.to(torch.bfloat16)
    model = Pipeline(family.pipe, family.prompts, **family.call)
    clocks = []

    def record(_, args: tuple, kwargs: dict) -> None:
        clocks.append(float(kwargs["timestep"].flatten()[0]))

    hook = family.pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    strategy = OSSShared(start="pinned")  # it calls at the teacher's times only
    steps = oss_exp.search(
        model, num_steps=4, num_teacher_steps=9, solver=Euler(), strategy=strategy
    )
    hook.remove()
    model.release()

    # The distance of every time to the nearest clock.
    distances = (steps.times[:-1, None] - torch.tensor(clocks, dtype=torch.float64)).abs()
    moved = float(distances.min(dim=1).values.max())
    assert steps.about("native")["rounding"] == pytest.approx(moved, abs=1e-9)
    assert 1e-5 < moved < 4e-3


def test_an_exact_clock_is_not_rounded():
    for family in (stable_diffusion(), ltx_image_to_video()):
        steps = oss_exp.search(
            Pipeline(family.pipe, family.prompts, **family.call),
            num_steps=3,
            num_teacher_steps=7,
            solver=Euler(),
        )
        assert steps.about("native")["rounding"] < 1e-6


def test_a_clock_in_whole_numbers_is_rounded():
    family = stable_diffusion()

    def whole(_, args: tuple, kwargs: dict) -> tuple:
        return (args[0], args[1].round(), *args[2:]), kwargs

    hook = family.pipe.unet.register_forward_pre_hook(whole, with_kwargs=True)
    model = Pipeline(family.pipe, family.prompts, **family.call)
    steps = oss_exp.search(
        model, num_steps=3, num_teacher_steps=7, solver=Euler(), must_visit=[0.4321]
    )
    hook.remove()
    clock = model.path.native(steps.times[:-1])
    expected = (model.path.canonical(clock.round()) - steps.times[:-1]).abs().max()

    assert steps.about("native")["rounding"] == pytest.approx(float(expected), abs=1e-7)
