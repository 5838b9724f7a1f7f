"""The command line inside the test's own process, which saves the seconds that a new one needs to start."""

import logging
import sys

import pytest
from hydra.core.global_hydra import GlobalHydra

from oss_exp.cli import main


def run_cli(*arguments: str) -> None:
    """`oss-exp ARGUMENTS`, W&B offline; SystemExit where the command ends with an error."""
    handlers = logging.root.handlers[:]
    GlobalHydra.instance().clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WANDB_MODE", "offline")
            patch.setattr(sys, "argv", ["oss-exp", *arguments])
            main()
    finally:
        GlobalHydra.instance().clear()
        logging.root.handlers = handlers  # Hydra's write to a stream that pytest closes
