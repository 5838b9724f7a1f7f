"""The base class of a `task=`: a dataclass of options that runs on a configuration.

Every task is in a file of its own.
"""

from __future__ import annotations

import abc
from typing import Annotated

from annotated_types import Ge, Gt, Le
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

# Kinds of numbers that options have.
Whole = Annotated[int, Ge(0)]
Count = Annotated[int, Ge(1)]
Amount = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Ge(0), Le(1)]


class Task(abc.ABC):
    """One job of the command line.

    Its fields are the keys of its yaml in `conf/task`, with the same defaults.
    """

    @abc.abstractmethod
    def __call__(self, cfg: DictConfig) -> Logger | None:
        """Run on the composed configuration; return the logger if the task has logged with it."""
