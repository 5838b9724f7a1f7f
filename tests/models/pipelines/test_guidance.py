"""Guidance of pipelines: what it costs, and that each sample of a batch has its own prompts and images."""

import pytest
import torch
from models.pipelines import edits, images, videos

from oss_exp.models.pipeline import Pipeline

# Rows of the network for a sample: guided in one call of twice the rows, in two calls, by text and image, or distilled.
ROWS = {
    images.stable_diffusion_ddim: 2,
    images.chroma: 2,
    images.qwen_image: 2,
    images.z_image: 2,
    images.dit: 2,
    images.flux: 1,
    edits.control_net_stable_diffusion: 2,
    edits.instruct_pix2pix: 3,
    edits.flux_control_net: 2,
    edits.inpainting_by_blending: 2,
    videos.stable_video_diffusion: 2,
}


@pytest.mark.slow
@pytest.mark.parametrize(("make", "rows"), ROWS.items(), ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_batch_is_its_samples(make, rows):
    torch.manual_seed(0)
    family = make()
    model = Pipeline(family.pipe, family.prompts, **family.call)
    velocity, times = model.velocity(None), torch.full((2,), 0.5, dtype=torch.float64)
    x = torch.randn(2, *model.event_shape, generator=torch.Generator().manual_seed(0))
    both = velocity(x, times)
    assert velocity.rows_at(times).tolist() == [rows, rows]
    for i in range(2):
        alone = model.velocity(torch.tensor([i]))(x[i : i + 1], times[:1])
        torch.testing.assert_close(alone, both[i : i + 1], rtol=0, atol=2e-5)
        other = model.velocity(torch.tensor([1 - i]))(x[i : i + 1], times[:1])
        assert float((other - alone).abs().max()) > 1e-3
    assert torch.equal(velocity(x, times), both)  # what the calls of other sizes left on the pipeline is theirs
    model.release()
