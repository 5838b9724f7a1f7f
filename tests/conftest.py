"""Fixtures of all tests: the digits mixture in float64, the oracles, and folders of images.

Fixtures import slow modules themselves: pytest-xdist's main process reads this file too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

# Tests run side by side, and start processes of their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import signal
import tempfile
from typing import TYPE_CHECKING

import pytest

# Caches move elsewhere if the home folder cannot be written.
if not os.access(Path.home(), os.W_OK):
    for name in ("OSS_EXP_CACHE", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        os.environ.setdefault(name, tempfile.gettempdir())

if TYPE_CHECKING:
    import torch

    from oss_exp.models.families.mixture import GaussianMixture

ORACLES = Path(__file__).parent / "oracles"

# A shell makes its background processes ignore interrupts; some tests send them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def gmm() -> dict[str, torch.Tensor]:
    """The tensors of the digits mixture: weights, means, covariances, noises z and states."""
    from safetensors.torch import load_file

    return load_file(ORACLES / "digits_gmm.safetensors")


@pytest.fixture(scope="session")
def mixture(gmm) -> GaussianMixture:
    """The digits mixture in float64: 10 components on 64 pixels, exact to rounding."""
    from oss_exp.models.families.mixture import GaussianMixture

    return GaussianMixture.from_covariances(gmm["weights"], gmm["means"], gmm["covariances"], (64,))


@pytest.fixture(scope="session")
def velocity(mixture):
    """The exact velocity of the digits mixture, over all classes."""
    return mixture.velocity(None)


@pytest.fixture(scope="session")
def oss_oracle() -> dict:
    """The released search's schedules and costs."""
    return json.loads((ORACLES / "oss_search.json").read_text())


@pytest.fixture(scope="session")
def oss_arrays() -> dict[str, torch.Tensor]:
    """The released search's grids, states and amplitudes."""
    from safetensors.torch import load_file

    return load_file(ORACLES / "oss_search.safetensors")


@pytest.fixture(scope="session")
def fashion(tmp_path_factory) -> Path:
    """A folder in Fashion-MNIST's format: a square as bag (8) and a tall bar as trousers (1)."""
    import numpy as np
    from helpers import write_fashion

    folder = tmp_path_factory.mktemp("fashion")
    pixels = np.zeros((2, 28, 28), np.uint8)
    pixels[0, 6:22, 6:22] = 200
    pixels[1, 2:26, 12:16] = 255
    write_fashion(folder, pixels, [8, 1])
    return folder


@pytest.fixture(scope="session")
def garments(tmp_path_factory) -> Path:
    """A folder of Fashion-MNIST with 300 test images, 30 of each class, as both splits."""
    folder = tmp_path_factory.mktemp("garments")
    for file in (ORACLES / "fashion").glob("*.gz"):
        shutil.copy(file, folder)
        shutil.copy(file, folder / file.name.replace("t10k", "train"))
    return folder


# --------------------------------------------------------------------------------------------------
# Skips: continuous integration fails on a skipped test without a reason here
# --------------------------------------------------------------------------------------------------

LEFT_OUT = pytest.StashKey[int]()
# The environment variable that names a trainer in place of trainer=gpu, such as cpu.
GPU = "OSS_EXP_GPU_TESTS"


def pytest_collection_modifyitems(config, items) -> None:
    """Deselect the tests of a GPU on machines without one; skips would hide others."""
    if not any(item.get_closest_marker("gpu") for item in items) or os.environ.get(GPU):
        return
    import torch

    if torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=left_out)
    config.stash[LEFT_OUT] = len(left_out)
    if hasattr(config, "workeroutput"):  # in a process of pytest-xdist
        config.workeroutput["left_out"] = len(left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Take over the count of a process of pytest-xdist."""
    count = getattr(node, "workeroutput", {}).get("left_out", 0)
    node.config.stash[LEFT_OUT] = max(count, node.config.stash.get(LEFT_OUT, 0))


SKIPS = {
    "tests/data/test_cifar10.py": "needs the CIFAR-10 archive, which no package ships",
    "tests/evaluation/test_inception.py": (
        "needs the public Inception-V3 weights, which no package ships"
    ),
    "tests/models/families/test_psdenoiser.py": (
        "needs 21cmpsdenoiser without the simulators that it depends on"
    ),
    "tests/models/pipelines/test_pretrained.py::test_quantised_weights": "needs torchao",
    "tests/test_full_disk.py": "needs the right to mount a file system",
    "tests/test_cli.py::test_a_gpu_that_is_not_there": "needs a machine without a GPU",
}


def pytest_terminal_summary(terminalreporter) -> None:
    """Count the tests left out, and list every skipped test with its reason."""
    if count := terminalreporter.config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"left out {count} tests: they need a GPU, or {GPU}=cpu")
    for test in _skipped(terminalreporter):
        reasons = [reason for place, reason in SKIPS.items() if test.startswith(place)]
        reason = reasons[0] if reasons else "not on the list of skips"
        terminalreporter.write_line(f"skipped {test}: {reason}")


def pytest_sessionfinish(session) -> None:
    """Fail a run of continuous integration that skips a test without a reason."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if "CI" not in os.environ or reporter is None:
        return
    if any(not test.startswith(tuple(SKIPS)) for test in _skipped(reporter)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _skipped(reporter) -> list[str]:
    """Return the names of the skipped tests, sorted."""
    return sorted({report.nodeid for report in reporter.stats.get("skipped", [])})
