"""The spectral distance of waveforms is in dB, and zero between equal ones."""

import pytest
import torch
from models.pipelines.audio import longcat_audio

import oss_exp
from oss_exp.evaluation.spectral import spectral_distance


@pytest.mark.parametrize("samples", [5, 3000])
def test_a_change_of_loudness_is_its_decibels(samples):
    waves = torch.randn(3, 2, samples, generator=torch.Generator().manual_seed(0))
    gain = torch.tensor([1.0, 2.0, 10.0])
    decibels = spectral_distance(waves * gain[:, None, None], waves)
    torch.testing.assert_close(decibels, 20 * gain.double().log10(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("samples", [5, 3000])
def test_a_change_of_sign_is_no_distance(samples):
    waves = torch.randn(3, 2, samples, generator=torch.Generator().manual_seed(0))
    distance = spectral_distance(-waves, waves)
    assert torch.equal(distance, torch.zeros(3, dtype=torch.float64))


def test_a_comparison_of_sounds_has_the_spectral_distance():
    torch.manual_seed(0)
    family = longcat_audio()
    model = oss_exp.Pipeline(family.pipe, family.prompts, **family.call)
    comparison = oss_exp.compare(
        model,
        num_steps=[2, 6],
        num_teacher_steps=6,
        held_out=2,
        batch_size=2,
        solver=oss_exp.Euler(),
        strategies={"oss": oss_exp.OSSShared("pinned")},
    )
    model.release()

    decibels = {row["num_steps"]: row["metrics"]["spectral, dB"] for row in comparison.rows}
    assert decibels[2] > 0.1
    assert decibels[6] == pytest.approx(0, abs=1e-3)
    assert "spectral, dB" in str(comparison)
