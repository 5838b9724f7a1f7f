"""Published tables keep their numbers, stretch to other lengths, and fit their chains."""

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from oss_exp.cli import CONF
from oss_exp.distances import XtMSE
from oss_exp.noise import (
    DDPMPath,
    EDMPath,
    EDMSchedule,
    FlowSchedule,
    cosine_betas,
    scaled_linear_betas,
)
from oss_exp.noise.published_tables import AlignYourSteps, OSSComfyUI
from oss_exp.solvers import Euler
from oss_exp.stepsize import ClosedForm, Problem

SD15_30 = [
    999, 954, 907, 855, 819, 782, 744, 713, 684, 654, 623, 592, 559, 528, 499,
    470, 437, 401, 364, 328, 291, 256, 221, 183, 149, 114, 70, 41, 21, 4,
]  # fmt: skip
SDXL_30 = [
    999, 953, 904, 850, 813, 777, 738, 695, 650, 602, 556, 510, 462, 417, 374,
    331, 290, 250, 214, 182, 155, 131, 108, 85, 66, 49, 32, 20, 12, 3,
]  # fmt: skip
STABLE_DIFFUSION = scaled_linear_betas(1000, 0.00085, 0.012)
SCHEDULES = [*map(AlignYourSteps, AlignYourSteps.tables), *map(OSSComfyUI, OSSComfyUI.tables)]
DIFFUSERS = {
    "sd15": "StableDiffusionSigmas",
    "sdxl": "StableDiffusionXLSigmas",
    "svd": "StableDiffusionVideoSigmas",
}


def levels(schedule, num_steps: int) -> torch.Tensor:
    """Return the nodes in the units of the tables."""
    nodes = schedule.nodes(num_steps)
    return EDMPath().native(nodes) if isinstance(schedule, AlignYourSteps) else nodes


def problem(grid: torch.Tensor) -> Problem:
    """Return a problem on this grid whose network costs nothing."""
    return Problem(lambda x, t: x, torch.ones(2, 3), grid, Euler(), XtMSE())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_schedule_of_the_tables_length_is_the_table(schedule):
    table = torch.tensor(schedule.tables[schedule.table], dtype=torch.float64)
    nodes = levels(schedule, len(table) - 1)
    rtol = 1e-12 if isinstance(schedule, AlignYourSteps) else 0
    torch.testing.assert_close(nodes[:-1], table[:-1], rtol=rtol, atol=0)
    assert nodes[-1] == 0


def test_the_tables_have_their_published_lengths():
    ays = [len(sigmas) - 1 for sigmas in AlignYourSteps.tables.values()]
    assert ays == [10, 10, 10, 10, 30, 30]
    comfyui = [len(OSSComfyUI.tables[table]) - 1 for table in ("flux", "wan", "chroma")]
    assert comfyui == [10, 20, 40]


@pytest.mark.parametrize("table", DIFFUSERS)
def test_align_your_steps_equals_diffusers(table):
    from diffusers.schedulers import AysSchedules

    np.testing.assert_allclose(
        levels(AlignYourSteps(table), 10), AysSchedules[DIFFUSERS[table]], rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(
    ("table", "betas", "published"),
    [
        ("sd15", STABLE_DIFFUSION, [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]),
        ("sdxl", STABLE_DIFFUSION, [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]),
        ("sd15_30", STABLE_DIFFUSION, SD15_30),
        ("sdxl_30", STABLE_DIFFUSION, SDXL_30),
        (
            "deepfloyd_if",
            cosine_betas(1000, 0.999),
            [995, 920, 811, 686, 555, 418, 315, 174, 109, 12],
        ),
    ],
)
def test_sigmas_stand_at_the_published_indices_of_their_chain(table, betas, published):
    """The authors publish both sigmas, to three decimals, and whole time indices."""
    indices = DDPMPath(betas).native(AlignYourSteps(table).nodes(len(published))[:-1])
    np.testing.assert_allclose(indices, published, rtol=0, atol=0.6)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 19, 20, 33, 100])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_other_lengths_are_log_linear(schedule, num_steps):
    table = schedule.tables[schedule.table]
    places = np.linspace(0, 1, len(table))
    targets = np.linspace(0, 1, num_steps + 1)
    expected = np.exp(np.interp(targets, places, np.log(table)))[:-1]
    np.testing.assert_allclose(levels(schedule, num_steps), [*expected, 0], rtol=1e-11, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_nodes_strictly_decrease_from_at_most_1_to_0(schedule):
    for num_steps in (1, 2, 3, 5, 20, 200):
        nodes = schedule.nodes(num_steps)
        assert nodes.dtype == torch.float64
        assert len(nodes) == num_steps + 1
        assert 0 < nodes[0] <= 1
        assert nodes[-1] == 0
        assert bool((nodes.diff() < 0).all())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_twice_the_steps_keep_every_level(schedule):
    num_steps = len(schedule.tables[schedule.table]) - 1
    assert torch.equal(schedule.nodes(2 * num_steps)[::2], schedule.nodes(num_steps))


@pytest.mark.parametrize("start", ["pinned", "analytic"])
@pytest.mark.parametrize("name", ["ays", "oss_comfyui"])
def test_yaml_plans_every_budget_from_every_table(name, start):
    cfg = OmegaConf.load(CONF / "stepsize" / f"{name}.yaml")
    for table in instantiate(cfg).schedule.tables:
        strategy = instantiate(cfg, start=start, schedule={"table": table})
        assert strategy.baseline
        plans = strategy.plan(problem(FlowSchedule(1.0).nodes(20)), range(1, 21))
        for k, steps in plans.items():
            assert steps.num_steps == k
            nodes = strategy.schedule.nodes(k + (start == "analytic"))[1:]
            assert torch.equal(steps.times[-len(nodes) :], nodes)


def test_a_schedule_from_beyond_the_teacher_is_refused():
    grid = EDMSchedule(0.002, 80.0, 7.0).nodes(20)
    with pytest.raises(
        ValueError, match=r"OSSComfyUI\(table='wan'\) puts its second time, 0.9970, above"
    ):
        ClosedForm(OSSComfyUI("wan"), "pinned").plan(problem(grid), [20])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: AlignYourSteps("sd3"),
            "table must be one of sd15, sdxl, svd, deepfloyd_if, sd15_30, sdxl_30, got 'sd3'",
        ),
        (lambda: OSSComfyUI("FLUX"), "table must be one of flux, wan, chroma, got 'FLUX'"),
        (lambda: OSSComfyUI("flux").nodes(0), "num_steps must be from 1 to .*, got 0"),
    ],
)
def test_impossible_arguments_are_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        make()
