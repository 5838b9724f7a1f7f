"""How far a pipeline's own rounding of its clock moves the steps of a schedule."""

import pytest
import torch
from models.pipelines.images import aura_flow, flux, stable_diffusion
from models.pipelines.videos import ltx_image_to_video

import oss_exp
from oss_exp import Euler, OSSShared
from oss_exp.models.pipeline import Pipeline


@pytest.mark.parametrize("make", [flux, aura_flow])
def test_a_clock_in_bfloat16(make):
    family = make()
    family.pipe.to(torch.bfloat16)
    model = Pipeline(family.pipe, family.prompts, **family.call)
    clocks = []

    def hear(_, args: tuple, kwargs: dict) -> None:
        clocks.append(float(kwargs["timestep"].flatten()[0]))

    hook = family.pipe.transformer.register_forward_pre_hook(hear, with_kwargs=True)
    searched = OSSShared(start="pinned")  # which calls at no other times than the teacher's
    steps = oss_exp.search(
        model, num_steps=4, num_teacher_steps=9, solver=Euler(), strategy=searched
    )
    hook.remove()
    model.release()
    moved = max(min(abs(clock - float(t)) for clock in clocks) for t in steps.times[:-1])

    assert steps.about("native")["rounding"] == pytest.approx(moved, abs=1e-9)
    assert 1e-5 < moved < 4e-3


def test_a_clock_that_is_told_as_it_is():
    for family in (stable_diffusion(), ltx_image_to_video()):
        steps = oss_exp.search(
            Pipeline(family.pipe, family.prompts, **family.call),
            num_steps=3,
            num_teacher_steps=7,
            solver=Euler(),
        )
        assert steps.about("native")["rounding"] < 1e-6


def test_a_clock_in_whole_numbers():
    """A network that hears the next whole number."""
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
