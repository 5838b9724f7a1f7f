"""The spectral distance of waveforms: in dB, and zero between equal ones."""

import pytest
import torch
from models.pipelines.audio import longcat_audio

import oss_exp
from oss_exp.evaluation.spectral import spectral_distance


@pytest.mark.parametrize("samples", [5, 3000])
def test_a_change_of_loudness_is_its_decibels(samples):
    waves = torch.randn(3, 2, samples, generator=torch.Generator().manual_seed(0))
    gain = torch.tensor([1.0, 2.0, 10.0])
    found = spectral_distance(waves * gain[:, None, None], waves)
    torch.testing.assert_close(found, 20 * gain.double().log10(), rtol=1e-3, atol=1e-6)
    assert torch.equal(
        spectral_distance(-waves, waves), torch.zeros(3, dtype=torch.float64)
    )  # a phase is not heard


def test_a_comparison_of_sounds_has_it():
    torch.manual_seed(0)
    family = longcat_audio()
    model = oss_exp.Pipeline(family.pipe, family.prompts, **family.call)
    compared = oss_exp.compare(
        model, num_steps=[2, 6], num_teacher_steps=6, held_out=2, batch_size=2, solver=oss_exp.Euler(),
        strategies={"oss": oss_exp.OSSShared("pinned")},
    )  # fmt: skip
    model.release()
    found = {row["num_steps"]: row["metrics"]["spectral, dB"] for row in compared.rows}
    assert found[2] > 0.1
    assert found[6] == pytest.approx(0, abs=1e-3)
    assert "spectral, dB" in str(compared)
