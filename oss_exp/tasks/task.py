"""What a `task=` is: a dataclass of its options, in a file of its own, that does its work on a configuration."""

from __future__ import annotations

import abc
from typing import Annotated

from annotated_types import Ge, Gt, Le
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

# Numbers that options are.
Whole = Annotated[int, Ge(0)]
Count = Annotated[int, Ge(1)]
Amount = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Ge(0), Le(1)]


class Task(abc.ABC):
    """One job of the command line. Its fields are the keys of its yaml in `conf/task`, with the same defaults."""

    @abc.abstractmethod
    def __call__(self, cfg: DictConfig) -> Logger | None:
        """Do the work on the composed configuration; return the logger where it has logged as it went."""
