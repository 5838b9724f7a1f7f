"""FLUX's transformer as a backbone, and the shift of its times, are those of diffusers."""

import json

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from helpers import ORACLES

from oss_exp.models.families.flux import PromptedFlux
from oss_exp.models.tiny import tiny
from oss_exp.noise import FlowSchedule
from oss_exp.noise.schedules import flux_shift

PROMPTS = ["a red bicycle", "two cats, sleeping", "a bag"]
HEIGHT = 48
WIDTH = 32


@pytest.fixture
def pipe() -> FluxPipeline:
    return tiny("FluxPipeline", {})[0]


def noise(count: int) -> torch.Tensor:
    return torch.randn(
        count, 8, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(1)
    )


@torch.no_grad()
def test_the_network_gives_diffusers_velocity_at_any_time(pipe):
    x = noise(3)
    t = torch.tensor([0.003, 0.4567, 0.9989])
    text, pooled, text_ids = pipe.encode_prompt(PROMPTS, max_sequence_length=30)

    expected = pipe.transformer(
        hidden_states=FluxPipeline._pack_latents(x, *x.shape),
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=t,
        guidance=torch.full((3,), 3.5),
        img_ids=pipe._prepare_latent_image_ids(3, HEIGHT // 16, WIDTH // 16, "cpu", torch.float32),
        txt_ids=text_ids,
    ).sample

    backbone = PromptedFlux(pipe.transformer, 3.5, patch=2, text=text, pooled=pooled)
    velocity = backbone(x, t, torch.arange(3))
    torch.testing.assert_close(
        velocity, FluxPipeline._unpack_latents(expected, HEIGHT, WIDTH, 8), rtol=0, atol=1e-5
    )
    assert (velocity - backbone(x, t, torch.tensor([1, 0, 0]))).abs().amax((1, 2, 3)).min() > 1e-2


@torch.no_grad()
def test_half_precision_does_not_round_the_clock(pipe):
    text, pooled, _ = pipe.encode_prompt(PROMPTS[:1], max_sequence_length=30)
    backbone = PromptedFlux(pipe.transformer, 3.5, patch=2, text=text, pooled=pooled).to(
        torch.bfloat16
    )
    x = noise(1).expand(3, -1, -1, -1).bfloat16()
    t = torch.tensor([0.9980, 0.9970, 0.9962])  # one and the same time in bfloat16
    v = backbone(x, t, torch.tensor([0, 0, 0])).float()
    assert (v[0] - v[1]).abs().max() > 1e-3
    assert (v[1] - v[2]).abs().max() > 1e-3


PIXELS = {
    256: (256, 256),
    1024: (512, 512),
    4096: (1024, 1024),
    2304: (576, 1024),
    4032: (1008, 1024),
    512: (256, 512),
}


def test_shifts_are_those_of_diffusers():
    listed = json.loads((ORACLES / "fm_shift.json").read_text())["flux"]
    # The other shift is used by OptimalSteps' script only.
    ours = [case for case in listed if case["max_shift"] == 1.15]

    assert len(ours) == 24

    for case in ours:
        shift = flux_shift(*PIXELS[case["image_seq_len"]])
        assert np.log(shift) == pytest.approx(case["mu"], abs=1e-12)
        nodes = FlowSchedule(shift).nodes(case["num_steps"])
        np.testing.assert_allclose(nodes, case["sigmas"], rtol=0, atol=1e-6)
