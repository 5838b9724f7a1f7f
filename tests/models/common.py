"""Configurations and oracles that the tests of several models read."""

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor

from oss_exp.cli import CONF


def composed(*overrides: str) -> DictConfig:
    """Return the configuration of the main job with these overrides."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


def without_prefix(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the arrays whose names begin with a prefix, by the rest of their names."""
    names = [name for name in arrays if name.startswith(prefix)]
    return {name.removeprefix(prefix): arrays[name] for name in names}


def difference(result: Tensor, expected: Tensor) -> float:
    """Return the largest error as a share of the largest expected value."""
    return float((result - expected).abs().max() / expected.abs().max())
