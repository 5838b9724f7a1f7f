"""Pipelines of diffusers that change images: ControlNets, masks, instructions and references."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    CogView4ControlPipeline,
    ControlNetModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxInpaintPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLInpaintPipeline,
)
from models.pipelines.images import SMALL, cogview_4_parts
from models.pipelines.parts import Family, family, shipped

from oss_exp.models.tiny.images import (
    FLUX,
    LARGER,
    flux_parts,
    flux_transformer,
    stable_diffusion_3_parts,
    stable_diffusion_parts,
    stable_diffusion_xl_parts,
)
from oss_exp.models.tiny.parts import lively

FLUX_CALL = FLUX | {"guidance_scale": 3.5}


def image(height: int = 24, width: int = 24, channels: int = 3, count: int = 1) -> torch.Tensor:
    """Draw images (count, channels, height, width) in [0, 1]."""
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(5))


def mask(height: int = 24, width: int = 24) -> torch.Tensor:
    """Return a mask (1, 1, height, width) whose right half is to be painted."""
    return (torch.arange(width) >= width // 2).float().expand(1, 1, height, width)


def exact(pipe: Any) -> Any:
    """Set the variance of a pipeline's encoder to zero, so that it draws the same latents."""
    head = getattr(pipe.vae, "quant_conv", None)
    if head is None:
        head = pipe.vae.encoder.conv_out
    variances = slice(len(head.weight) // 2, None)
    head.weight.data[variances] = 0
    head.bias.data[variances] = -60
    return pipe


def control_net(network: Any) -> ControlNetModel:
    return ControlNetModel.from_unet(
        network, conditioning_channels=3, conditioning_embedding_out_channels=(8, 8)
    )


@family
def control_net_stable_diffusion() -> Family:
    parts = stable_diffusion_parts()
    pipe = StableDiffusionControlNetPipeline(**parts, controlnet=control_net(parts["unet"]))
    pictures = list(image(count=2).split(1))
    return Family(lively(pipe), SMALL | {"image": pictures})


@family
def control_net_stable_diffusion_xl() -> Family:
    parts = stable_diffusion_xl_parts()
    pipe = StableDiffusionXLControlNetPipeline(
        **parts, controlnet=control_net(parts["unet"]), add_watermarker=False
    )
    return Family(lively(pipe), SMALL | {"image": image(), "controlnet_conditioning_scale": 0.7})


@family
def inpainting() -> Family:
    """A network with the mask and the masked image in its input."""
    pipe = StableDiffusionInpaintPipeline(**stable_diffusion_parts(in_channels=9))
    return Family(
        exact(lively(pipe)), SMALL | {"image": image(), "mask_image": mask(), "strength": 1.0}
    )


@family
def inpainting_by_blending() -> Family:
    """A network without the mask; the loop restores the image outside of it after each step.

    Its first state is noise alone, while the chain's last time still has 6.4 % of the image.
    """
    pipe = StableDiffusionInpaintPipeline(**stable_diffusion_parts())
    return Family(
        exact(lively(pipe)),
        SMALL | {"image": image(), "mask_image": mask(), "strength": 1.0},
        atol=2e-3,
    )


@family
def inpainting_xl_by_blending() -> Family:
    pipe = StableDiffusionXLInpaintPipeline(**stable_diffusion_xl_parts(), add_watermarker=False)
    return Family(
        exact(lively(pipe)),
        SMALL | {"image": image(), "mask_image": mask(), "strength": 1.0},
        atol=2e-3,
    )


@family
def control_net_stable_diffusion_3() -> Family:
    parts = stable_diffusion_3_parts()
    pipe = StableDiffusion3ControlNetPipeline(
        *parts, SD3ControlNetModel.from_transformer(parts[0], 1, 0)
    )
    call = SMALL | {"max_sequence_length": 16, "control_image": image()}
    return Family(exact(lively(pipe)), call)


@family
def instruct_pix2pix() -> Family:
    """Guided by the text and by the image: three rows for a sample."""
    pipe = StableDiffusionInstructPix2PixPipeline(**stable_diffusion_parts(in_channels=8))
    return Family(
        lively(pipe), {"guidance_scale": 3.0, "image_guidance_scale": 1.5, "image": image(count=2)}
    )


@family
def flux_control() -> Family:
    """The control image is in the network's channels."""
    pipe = FluxControlPipeline(*flux_parts(), flux_transformer(64, out_channels=32))
    return Family(exact(lively(pipe)), FLUX_CALL | {"control_image": image(48, 32)})


@family
def flux_control_net() -> Family:
    """FLUX with a ControlNet and true guidance."""
    transformer = flux_transformer(32)
    net = FluxControlNetModel.from_transformer(
        transformer, num_layers=1, num_single_layers=1, attention_head_dim=12, num_attention_heads=2
    )
    pipe = FluxControlNetPipeline(*flux_parts(), transformer, net)
    call = FLUX_CALL | {
        "control_image": image(48, 32),
        "true_cfg_scale": 2.0,
        "negative_prompt": ["dull", "bad"],
    }

    return Family(exact(lively(pipe)), call)


@family
def flux_fill() -> Family:
    pipe = FluxFillPipeline(*flux_parts(), flux_transformer(2 * 32 + 4 * 64, out_channels=32))
    call = FLUX_CALL | {"image": image(48, 32), "mask_image": mask(48, 32), "strength": 1.0}
    return Family(exact(lively(pipe)), call)


@family
def flux_inpainting_by_blending() -> Family:
    pipe = FluxInpaintPipeline(*flux_parts(), flux_transformer(32))
    call = FLUX_CALL | {"image": image(48, 32), "mask_image": mask(48, 32), "strength": 1.0}
    return Family(
        exact(lively(pipe)), call, latents=lambda state, _: pipe._unpack_latents(state, 48, 32, 8)
    )


@family
def flux_kontext() -> Family:
    return shipped("FluxKontextPipeline", guidance_scale=3.5, image=image(48, 32))


@family
def cogview_4_control() -> Family:
    """The control image is in the network's channels; its clock is not the noise level."""
    pipe = CogView4ControlPipeline(*cogview_4_parts(8))
    return Family(exact(lively(pipe)), SMALL | LARGER | {"control_image": image(32, 32)})
