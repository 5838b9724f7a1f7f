"""A pipeline's fingerprint changes with what changes its velocity, and with nothing else."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from models.pipelines.images import SD_BETAS, flux, stable_diffusion, stable_diffusion_of
from models.pipelines.parts import Family
from peft import LoraConfig

from oss_exp.models.pipeline import Pipeline


def family_of(make=stable_diffusion) -> Family:
    torch.manual_seed(0)
    return make()


def fingerprint(family: Family, **call) -> str:
    return Pipeline(family.pipe, family.prompts, **family.call | call).fingerprint


@pytest.fixture(scope="module")
def adapted() -> Family:
    family = family_of()
    family.pipe.unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style"
    )
    return family


def test_what_changes_the_velocity(adapted):
    plain = fingerprint(family_of())
    pipe = adapted.pipe
    fingerprints = {"plain": plain, "adapted": fingerprint(adapted)}
    pipe.unet.set_adapters("style", weights=0.5)
    fingerprints["half"] = fingerprint(adapted)
    pipe.unet.disable_adapters()
    fingerprints["off"] = fingerprint(adapted)
    pipe.unet.enable_adapters()
    pipe.unet.fuse_lora()
    fingerprints["fused"] = fingerprint(adapted)
    fingerprints["v"] = fingerprint(stable(prediction_type="v_prediction"))
    fingerprints["betas"] = fingerprint(stable(beta_end=0.02))

    quantised = family_of()
    quantised.pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    fingerprints["float8"] = fingerprint(quantised)
    one = family_of()
    weight = one.pipe.unet.conv_in.weight
    weight.data.flatten()[-1] += 1e-3
    fingerprints["one number"] = fingerprint(one)

    assert len(set(fingerprints.values())) == len(fingerprints), fingerprints


def stable(**config) -> Family:
    return family_of(lambda: stable_diffusion_of(EulerDiscreteScheduler(**SD_BETAS | config)))


def test_what_does_not(adapted):
    """The solver, its spacing and its shift, the autoencoder, offloading, the prompts."""
    plain = fingerprint(family_of())
    assert fingerprint(stable(use_karras_sigmas=True)) == plain
    assert (
        fingerprint(
            family_of(lambda: stable_diffusion_of(DDIMScheduler(**SD_BETAS, clip_sample=False)))
        )
        == plain
    )

    other = family_of()
    other.pipe.vae.decoder.conv_in.weight.data += 1
    assert fingerprint(other) == plain

    flow = family_of(flux)
    expected = fingerprint(flow)
    flow.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)

    assert fingerprint(flow) == expected

    flow.pipe.scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    assert fingerprint(flow) != expected


def test_weights_that_are_offloaded():
    """Those of `enable_sequential_cpu_offload` are on no device between calls."""
    accelerate = pytest.importorskip("accelerate")
    family = family_of()
    expected = fingerprint(family)
    accelerate.cpu_offload(family.pipe.unet, torch.device("cpu"))
    assert next(family.pipe.unet.parameters()).is_meta
    assert fingerprint(family) == expected
