"""Guidance of pipelines: its cost, and its answers apart."""

import pytest
import torch
from models.pipelines import edits, images, videos

import oss_exp
from oss_exp.models.pipeline import Pipeline

# Network rows of a sample: 1 is distilled, 2 is guided by text, 3 by text and image.
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
def test_the_samples_of_a_batch_are_independent(make, rows):
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

    # Calls of other sizes have left nothing on the pipeline.
    assert torch.equal(velocity(x, times), both)

    model.release()


@pytest.mark.parametrize(
    ("make", "mix"),
    [
        (images.stable_diffusion_ddim, (-2, 3)),
        (images.pixart_sigma, (-2, 3)),  # its network answers a variance too
        (images.chroma, (3, -2)),  # two calls
        (videos.wan, None),
        (edits.instruct_pix2pix, None),  # guided by text and image
        (edits.inpainting_by_blending, (-2, 3)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_answers_apart_mix_to_the_pipelines_answer(make, mix):
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


def test_one_fitted_step_is_better_with_both_answers():
    """It is a least-squares fit, here to the noises of the comparison."""
    torch.manual_seed(0)
    family = images.stable_diffusion_ddim()
    noise = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    strategy = oss_exp.OSSFit(start="pinned", objective="mean", refine=False, history=1)
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
            strategies={"fit": strategy},
        )
        means[apart] = compared.rows[0]["psnr"]["mean"]

    assert means[True] > means[False]
    with pytest.raises(ValueError, match="fitted to guided and unguided answers apart"):
        compared.schedules["fit"][1].scheduler(family.pipe.scheduler)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        # Guidance is an input of the network.
        (images.flux, "FluxPipeline asks its network once for a sample"),
        # The norm is rescaled.
        (
            images.qwen_image,
            "the guidance of QwenImagePipeline is no sum of its network's answers",
        ),
        # There are two scales.
        (
            videos.wan_two_experts,
            "the guidance of WanPipeline is no sum .* the same at all times",
        ),
        # Some channels are guided.
        (images.dit, "in a way that is not known here; call it with guidance_apart=False"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_guidance_that_is_no_sum_is_refused(make, message):
    torch.manual_seed(0)
    family = make()
    model = Pipeline(family.pipe, family.prompts, guidance_apart=True, **family.call)
    with pytest.raises(ValueError, match=message):
        oss_exp.search(model, num_steps=2, num_teacher_steps=4)
