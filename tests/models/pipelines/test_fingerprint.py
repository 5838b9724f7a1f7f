"""A pipeline's fingerprint changes with what changes its velocity, and with nothing else."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from models.pipelines.images import SD_BETAS, flux, stable_diffusion, stable_diffusion_of
from models.pipelines.parts import Family
from peft import LoraConfig

from oss_exp.models.pipeline import Pipeline


def family_of(make=stable_diffusion) -> Family:
    """Build a family from the same random numbers."""
    torch.manual_seed(0)
    return make()


def fingerprint(family: Family, **call) -> str:
    return Pipeline(family.pipe, family.prompts, **family.call | call).fingerprint


def with_adapter() -> Family:
    family = family_of()
    family.pipe.unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style"
    )
    return family


def test_adapters_change_the_fingerprint():
    adapted = with_adapter()
    pipe = adapted.pipe
    fingerprints = {"none": fingerprint(family_of()), "adapter": fingerprint(adapted)}
    pipe.unet.set_adapters("style", weights=0.5)
    fingerprints["half its weight"] = fingerprint(adapted)
    pipe.unet.disable_adapters()
    fingerprints["disabled"] = fingerprint(adapted)
    pipe.unet.enable_adapters()
    pipe.unet.fuse_lora()
    fingerprints["fused"] = fingerprint(adapted)

    assert len(set(fingerprints.values())) == len(fingerprints), fingerprints


def test_weights_and_training_change_the_fingerprint():
    quantised = family_of()
    quantised.pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    changed = family_of()
    changed.pipe.unet.conv_in.weight.data.flatten()[-1] += 1e-3
    fingerprints = {
        "plain": fingerprint(family_of()),
        "v": fingerprint(stable(prediction_type="v_prediction")),
        "betas": fingerprint(stable(beta_end=0.02)),
        "float8": fingerprint(quantised),
        "one number": fingerprint(changed),
    }

    assert len(set(fingerprints.values())) == len(fingerprints), fingerprints


def stable(**config) -> Family:
    return family_of(lambda: stable_diffusion_of(EulerDiscreteScheduler(**SD_BETAS | config)))


def test_other_changes_keep_the_fingerprint():
    """They are the solver, its spacing and its shift, and the autoencoder."""
    plain = fingerprint(family_of())
    assert fingerprint(stable(use_karras_sigmas=True)) == plain
    ddim = family_of(lambda: stable_diffusion_of(DDIMScheduler(**SD_BETAS, clip_sample=False)))
    assert fingerprint(ddim) == plain

    other = family_of()
    other.pipe.vae.decoder.conv_in.weight.data += 1
    assert fingerprint(other) == plain

    flow = family_of(flux)
    expected = fingerprint(flow)
    flow.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)

    assert fingerprint(flow) == expected

    flow.pipe.scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    assert fingerprint(flow) != expected


def test_offloaded_weights_keep_the_fingerprint():
    """Between calls, weights of `enable_sequential_cpu_offload` are on no device."""
    accelerate = pytest.importorskip("accelerate")
    family = family_of()
    expected = fingerprint(family)
    accelerate.cpu_offload(family.pipe.unet, torch.device("cpu"))
    assert next(family.pipe.unet.parameters()).is_meta
    assert fingerprint(family) == expected
