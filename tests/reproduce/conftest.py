"""Hydra's configuration, for the tests that compose it."""

from collections.abc import Iterator

import pytest
from hydra import initialize_config_dir

from oss_exp.cli import CONF


@pytest.fixture
def composing() -> Iterator[None]:
    """Let Hydra read conf/."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield
