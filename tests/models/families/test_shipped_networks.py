"""The shipped networks are those of their provenance, and draw the class of the condition."""

import json

import pytest
import torch
from hydra.utils import instantiate
from models.common import composed

from oss_exp.distances import XtMSE
from oss_exp.evaluation.classifier import FashionFeatures
from oss_exp.evaluation.psnr import psnr
from oss_exp.files import ASSETS
from oss_exp.noise import FlowSchedule
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler, sample
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.stepsize import OSSShared, Problem

NETWORKS = ["unet_fashion", "dit_fashion"]
PHOTOGRAPHS = "unet_cifar10"
IMAGES = {"flux_fashion": 480_000, "video_fashion": 360_000, PHOTOGRAPHS: 50_000}
RELATIVES = ["flux_fashion", "mar_fashion", "video_fashion"]


def load(name: str, *overrides: str):
    """Load a model of conf/."""
    return instantiate(composed(f"model={name}", *overrides).model)


def noise(count: int, seed: int, channels: int = 1) -> torch.Tensor:
    return torch.randn(count, channels, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NETWORKS, PHOTOGRAPHS, *RELATIVES])
def test_a_shipped_network_is_that_of_its_provenance(name):
    record = json.loads((ASSETS / f"{name}.json").read_text())
    least, most = (5e6, 10e6) if name == PHOTOGRAPHS else (1e6, 4e6)
    assert (ASSETS / f"{name}.safetensors").stat().st_size < 2.05 * most  # float16

    model = load(name)
    if name not in RELATIVES:  # their fingerprints are not of the file alone
        assert model.fingerprint == record["sha256"]

    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    assert least < record["parameters"] < most
    assert f"model={name}" in record["made_by"].removeprefix("oss-exp task=pretrain ").split()
    assert record["training"]["steps"] == record["training"]["of"]
    assert record["training"]["seconds"] > 600
    assert record["data"]["images"] == IMAGES.get(name, 60_000)
    assert record["hardware"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_samples_show_the_class_of_their_condition(name):
    model = load(name, "model.guidance.scale=1.5")
    labels = torch.arange(100) % 10
    steps = StepSchedule(FlowSchedule(shift=3.0).nodes(16))
    images = model.generate(DPMSolverPP(2, lower_order_final=True), steps, noise(100, 0), labels)
    predictions = FashionFeatures.from_asset().logits(images).argmax(1)
    assert (predictions == labels).double().mean() >= 0.85


@pytest.mark.slow
def test_garments_of_videos_move_as_asked():
    moves = {"moving left": (0, -1), "moving right": (0, 1), "rising": (1, -1), "falling": (1, 1)}
    prompts = [f"{garment} {move}" for garment in ("trousers", "boot") for move in moves]
    model = load("video_fashion", "model.guidance.scale=3", f"+model.prompts={prompts}")
    x = torch.randn(8, 1, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    steps = StepSchedule(FlowSchedule(shift=3.0).nodes(10))
    videos = model.generate(Euler(), steps, x, torch.arange(8))[:, 0]

    # The garment's middle, across and down, from the first frame to the last.
    share = videos / videos.sum((2, 3), keepdim=True)
    place = torch.linspace(-1, 1, 32)
    middle = torch.stack([(share * place).sum((2, 3)), (share * place[:, None]).sum((2, 3))])
    travel = middle[:, :, -1] - middle[:, :, 0]
    for number, (axis, sign) in enumerate(2 * list(moves.values())):
        assert sign * travel[axis, number] > 0.5, prompts[number]
        assert travel[1 - axis, number].abs() < 0.2, prompts[number]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NETWORKS, PHOTOGRAPHS])
def test_a_searched_schedule_beats_a_uniform_one(name):
    model = load(name)
    channels = model.event_shape[0]
    labels = torch.arange(16) % 10
    grid = FlowSchedule(shift=1.0).nodes(20)
    velocity = model.velocity(labels)
    x = noise(16, 2, channels)
    search = OSSShared(start="pinned", band=None, refine=False, objective="log_mean")
    problem = Problem(model.velocity(labels), noise(16, 1, channels), grid, Euler(), XtMSE())
    searched = search.plan(problem, [5])[5]
    teacher = sample(Euler(), velocity, x, StepSchedule(grid))

    def decibels(steps: StepSchedule) -> float:
        images = model.decode(sample(Euler(), velocity, x, steps))
        return float(psnr(images, model.decode(teacher)).mean())

    assert decibels(searched) > decibels(StepSchedule(grid[::4])) + 1
