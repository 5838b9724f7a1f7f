"""Shared truth: the digits mixture of the oracles in float64, where every number is exact to rounding."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and start processes of their own

import pytest
import torch
from helpers import ORACLES, write_fashion
from safetensors.torch import load_file

from oss_exp.models.families.mixture import GaussianMixture


@pytest.fixture(scope="session")
def gmm() -> dict[str, torch.Tensor]:
    return load_file(ORACLES / "digits_gmm.safetensors")


@pytest.fixture(scope="session")
def mixture(gmm) -> GaussianMixture:
    """Float64, 10 components on 64 pixels."""
    return GaussianMixture.from_covariances(gmm["weights"], gmm["means"], gmm["covariances"], (64,))


@pytest.fixture(scope="session")
def velocity(mixture):
    return mixture.velocity(None)


@pytest.fixture(scope="session")
def oss_oracle() -> dict:
    return json.loads((ORACLES / "oss_search.json").read_text())


@pytest.fixture(scope="session")
def oss_arrays() -> dict[str, torch.Tensor]:
    return load_file(ORACLES / "oss_search.safetensors")


@pytest.fixture(scope="session")
def fashion(tmp_path_factory) -> Path:
    """A folder as Fashion-MNIST's, of two garments: a square as a bag (8), a tall bar as trousers (1)."""
    folder = tmp_path_factory.mktemp("fashion")
    pixels = torch.zeros(2, 28, 28, dtype=torch.uint8)
    pixels[0, 6:22, 6:22] = 200
    pixels[1, 2:26, 12:16] = 255
    write_fashion(folder, pixels, [8, 1])
    return folder
