"""The decoder of a latent model gives the pixels of diffusers, from old and new files."""

import pytest
import torch
from diffusers import AutoencoderKL
from hydra.utils import instantiate
from omegaconf import OmegaConf

from oss_exp.cli import CONF
from oss_exp.models.decoders.image import VAE

CONFIG = {
    "latent_channels": 4,
    "block_out_channels": [8, 8, 8],
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}


def vae(checkpoint, **changes) -> VAE:
    return VAE(
        str(checkpoint),
        scaling_factor=0.18215,
        micro_batch=2,
        source="the authors",
        **CONFIG | changes,
    )


@pytest.fixture(scope="module")
def whole():
    torch.manual_seed(0)
    return AutoencoderKL(**CONFIG).requires_grad_(False)


@pytest.fixture(scope="module")
def latents():
    return torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("folder", [".", "vae"])
def test_pixels_are_those_of_diffusers(whole, latents, folder, safe, tmp_path):
    whole.save_pretrained(tmp_path / folder, safe_serialization=safe)
    pixels = vae(tmp_path)(latents)
    expected = (whole.decode(latents / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    assert pixels.shape == (5, 3, 16, 16)
    assert 0.1 < pixels.mean() < 0.9
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(vae(tmp_path)(latents.double()), pixels)


def test_a_decoder_with_a_shift_and_without_convolutions_is_that_of_diffusers(latents, tmp_path):
    whole = AutoencoderKL(**CONFIG, use_quant_conv=False, use_post_quant_conv=False).requires_grad_(
        False
    )
    whole.save_pretrained(tmp_path)

    ours = VAE(
        str(tmp_path),
        0.5,
        2,
        "",
        shift_factor=0.3,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **CONFIG,
    )

    expected = (whole.decode(latents / 0.5 + 0.3).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours(latents), expected, rtol=0, atol=1e-5)


def test_old_names_of_attention_are_read(whole, latents, tmp_path):
    old = {}

    for key, value in whole.state_dict().items():
        for ours, theirs in (
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        ):
            key = key.replace(f"attentions.0.{ours}.", f"attentions.0.{theirs}.")
        old[key] = value

    assert old.keys() != whole.state_dict().keys()

    torch.save(old, tmp_path / "diffusion_pytorch_model.bin")
    whole.save_pretrained(tmp_path / "vae")
    assert torch.equal(
        vae(tmp_path / "diffusion_pytorch_model.bin")(latents), vae(tmp_path / "vae")(latents)
    )


def test_the_vae_of_conf_is_the_public_one(monkeypatch):
    """It has 49.49 million numbers, as the decoder of Stable Diffusion."""
    monkeypatch.setattr("oss_exp.models.decoders.image.randomise", lambda *_: None)
    config = OmegaConf.load(CONF / "base" / "dit_xl_2.yaml").sizes.full.decoder
    with torch.device("meta"):
        decoder = instantiate(config, checkpoint="random")()
    assert sum(p.numel() for p in decoder.parameters()) == 49_490_179 + 20


def test_random_weights_are_reproducible_and_frozen(latents):
    first = vae("random")
    second = vae("random")
    assert torch.equal(first(latents), second(latents))
    assert not first.training
    assert not any(parameter.requires_grad for parameter in first.parameters())


@pytest.mark.parametrize("key", ["post_quant_conv.bias", "decoder.conv_out.weight"])
def test_a_missing_weight_is_refused(whole, key, tmp_path):
    tensors = whole.state_dict()
    del tensors[key]
    torch.save(tensors, tmp_path / "vae.bin")
    with pytest.raises(
        ValueError, match=rf"of another architecture than model\.decoder: .*(?s:.)*{key}"
    ):
        vae(tmp_path / "vae.bin")


def test_a_vae_of_another_width_and_a_left_over_weight_are_refused(whole, tmp_path):
    whole.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"51 weights differ, first decoder\.conv_in\.bias: "
        r"\(8,\) in the file, \(16,\) in the network",
    ):
        vae(tmp_path, block_out_channels=[8, 8, 16])
    torch.save(whole.state_dict() | {"decoder.extra": torch.zeros(1)}, tmp_path / "vae.bin")
    with pytest.raises(ValueError, match=r"decoder\.extra"):
        vae(tmp_path / "vae.bin")


def test_a_missing_file_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="the authors"):
        vae(tmp_path / "nowhere")
