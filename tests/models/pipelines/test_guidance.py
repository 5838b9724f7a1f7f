"""Guidance of pipelines: what it costs, and that each sample of a batch has its own prompts and images."""

import pytest
import torch
from models.pipelines import edits, images, videos

import oss_exp
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
@pytest.mark.parametrize(
    ("make", "rows"), ROWS.items(), ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_batch_is_its_samples(make, rows):
    torch.manual_seed(0)
    family = make()
    model = Pipeline(family.pipe, family.prompts, **family.call)
    velocity = model.velocity(None)
    times = torch.full((2,), 0.5, dtype=torch.float64)
    x = torch.randn(2, *model.event_shape, generator=torch.Generator().manual_seed(0))
    both = velocity(x, times)

    assert velocity.rows_at(times).tolist() == [rows, rows]

    for i in range(2):
        alone = model.velocity(torch.tensor([i]))(x[i : i + 1], times[:1])
        torch.testing.assert_close(alone, both[i : i + 1], rtol=0, atol=2e-5)
        other = model.velocity(torch.tensor([1 - i]))(x[i : i + 1], times[:1])
        assert float((other - alone).abs().max()) > 1e-3

    assert torch.equal(
        velocity(x, times), both
    )  # what the calls of other sizes left on the pipeline is theirs

    model.release()


@pytest.mark.parametrize(
    ("make", "mix"),
    [
        (images.stable_diffusion_ddim, (-2, 3)),
        (images.pixart_sigma, (-2, 3)),  # whose network says something of its variance too
        (images.chroma, (3, -2)),  # two calls
        (videos.wan, None),
        (edits.instruct_pix2pix, None),  # of text and image
        (edits.inpainting_by_blending, (-2, 3)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_answers_apart_make_the_pipelines_own(make, mix):
    torch.manual_seed(0)
    family = make()
    plain = Pipeline(family.pipe, family.prompts, **family.call)
    model = Pipeline(family.pipe, family.prompts, guidance_apart=True, **family.call)
    velocity = model.velocity(None)
    x = torch.randn(4, *model.event_shape)
    t = torch.tensor([0.6, 0.3, 0.3, 0.6], dtype=torch.float64)
    outputs = velocity.outputs(x, t)

    assert len(outputs) == ROWS.get(make, 2)
    assert mix is None or velocity.mix == pytest.approx(mix, rel=1e-4)
    torch.testing.assert_close(
        velocity.combine(outputs), plain.velocity(None)(x, t), rtol=1e-4, atol=1e-4
    )

    model.release()
    plain.release()


def test_fitted_steps_weigh_both_answers():
    """One step, which is the least squares of more: on the noises of the search it is better with both answers."""
    torch.manual_seed(0)
    family = images.stable_diffusion_ddim()
    noise = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    means = {}

    for apart in (False, True):
        model = Pipeline(family.pipe, family.prompts, guidance_apart=apart, **family.call)

        compared = oss_exp.compare(
            model,
            noise,
            1,
            num_teacher_steps=12,
            held_out=noise,
            decode=lambda x0: x0,
            strategies={
                "fit": oss_exp.OSSFit(start="pinned", objective="mean", refine=False, history=1)
            },
        )

        means[apart] = compared.rows[0]["psnr"]["mean"]

    assert means[True] > means[False]

    with pytest.raises(ValueError, match="fitted to guided and unguided answers apart"):
        compared.schedules["fit"][1].scheduler(family.pipe.scheduler)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            images.flux,
            "FluxPipeline asks its network once for a sample",
        ),  # its guidance is a number it takes
        (
            images.qwen_image,
            "the guidance of QwenImagePipeline is no sum of its network's answers",
        ),  # rescaled
        (
            videos.wan_two_experts,
            "the guidance of WanPipeline is no sum .* the same at all times",
        ),  # two scales
        (
            images.dit,
            "in a way that is not known here; call it with guidance_apart=False",
        ),  # of some channels
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_guidance_that_cannot_be_kept_apart(make, message):
    torch.manual_seed(0)
    family = make()
    model = Pipeline(family.pipe, family.prompts, guidance_apart=True, **family.call)
    with pytest.raises(ValueError, match=message):
        oss_exp.search(model, num_steps=2, num_teacher_steps=4)
